"""Postgres is down, hangs, or has no connection to spare: requests are served, and wait to be
posted; who asks for the account is told to come again."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest

from accounting.embedded import Server, start_postgres
from accounting.migrate import migrate
from tests.accounting.scene import pool_on
from tests.outages.town import SOON, Town, is_outage
from tests.waiting import eventually

pytestmark = pytest.mark.processes
LOST, BACK = "Postgres does not answer", "Postgres answers again"
_ALL = 200  # more than it has


class Postgres:
    """One of a test's own, to be harmed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Server = start_postgres(folder, fsync=False)

    def signal(self, number: int) -> None:
        if self.server.alive():
            root = psutil.Process(self.server.pid)
            for process in (root, *root.children(recursive=True)):
                process.send_signal(number)

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.server.stop()


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[Postgres]:
    found = Postgres(tmp_path / "own")
    yield found
    found.stop()


@pytest.fixture
async def town(tmp_path: Path, postgres: Postgres) -> AsyncIterator[Town]:
    url = postgres.server.url
    await migrate(url)
    async with pool_on(url, size=4) as pool:
        found = Town(tmp_path, url, pool)
        try:
            yield await found.open()
        finally:
            postgres.signal(signal.SIGCONT)
            await found.close()


async def is_out(town: Town) -> None:
    """All that is served without it, until accounting has noticed."""
    await eventually(lambda: LOST in town.accounting.said, SOON)
    await town.serve(5)
    is_outage(await town.account())
    await town.serve(5)
    await eventually(town.is_charged, SOON)


async def is_back(town: Town, outages: int = 1) -> None:
    await town.books_balance()
    assert (await town.account()).status == 200
    await town.told()
    await eventually(lambda: town.accounting.said[-1] == BACK, SOON)
    said = town.accounting.said
    assert said == [LOST, BACK] * (len(said) // 2) and len(said) <= 2 * outages


async def test_postgres_is_down_and_started_again(town: Town, postgres: Postgres) -> None:
    await town.serve(3)
    stream = await town.stream()
    town.begin()
    postgres.server.stop()
    await is_out(town)
    await town.finish(*stream)
    postgres.server = start_postgres(postgres.folder, fsync=False)
    await is_back(town)


async def test_postgres_is_stopped_and_goes_on(town: Town, postgres: Postgres) -> None:
    await town.serve(3)
    stream = await town.stream()
    town.begin()
    postgres.signal(signal.SIGSTOP)
    await is_out(town)
    await town.finish(*stream)
    postgres.signal(signal.SIGCONT)
    await is_back(town)


async def test_postgres_has_no_connection_to_spare(town: Town, postgres: Postgres) -> None:
    """The product's own were lost, and somebody else has taken them all."""
    await town.serve(3)
    await eventually(town.is_posted, SOON)
    town.begin()
    crowd = await crowded(postgres.server.url)
    await is_out(town)
    await asyncio.gather(*[one.close() for one in crowd])
    await is_back(town, outages=3)  # it may have got one back before all were taken


async def crowded(url: str) -> list[asyncpg.Connection]:
    """Take every connection there is, those of others too."""
    crowd = [await asyncpg.connect(url)]
    ours = {await crowd[0].fetchval("select pg_backend_pid()")}
    for _ in range(_ALL):
        await crowd[0].execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where backend_type = 'client backend' and pid <> all($1::int[])",
            list(ours),
        )
        try:
            while True:
                crowd.append(await asyncpg.connect(url))
                ours.add(await crowd[-1].fetchval("select pg_backend_pid()"))
        except asyncpg.TooManyConnectionsError:
            others = await crowd[0].fetchval(
                "select count(*) from pg_stat_activity"
                " where backend_type = 'client backend' and pid <> all($1::int[])",
                list(ours),
            )
            if not others:
                return crowd
    raise AssertionError("others always had one")
