"""A Redis that is killed, rolled back, emptied or replaced, under real workers with streams open:
what was charged is charged once, what is held is known again, and the audit finds no drift.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import asyncpg
import msgspec
import psutil
import pytest
from redis.asyncio import Redis

from accounting import audit, funding, keys, workspaces
from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import CLOCK, HEARD, Wallet
from accounting.contract.settings import Secret, Settings
from accounting.embedded import Server, start_redis
from accounting.worker import Worker
from tests.accounting.scene import pool_on
from tests.proxy.ends import STREAM_END, Client, chat, sse, usage_chunk
from tests.proxy.harness import credits_of
from tests.proxy.host import Host, stream_begun
from tests.waiting import eventually

pytestmark = pytest.mark.processes
GIVEN_UCR = 1_000_000_000
SOON = 20.0  # seconds; the machine may be busy


class City:
    """Redis of its own, Postgres, accounting, `python -m proxy`, and one workspace."""

    def __init__(self, folder: Path, pool: asyncpg.Pool, database_url: str, host: Host) -> None:
        self.folder = folder
        self.pool = pool
        self.host = host
        self.server: Server
        self.redis: Redis
        self._database_url = database_url
        self._accounting: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self.secret = keys.new_secret()
        self.workspace_id = ""
        self.given_ucr = 0
        self.charged = 0

    async def open(self) -> Self:
        await self.start_accounting()
        await eventually(lambda: self.redis.exists(keyspace.EPOCH), SOON)
        workspace = await workspaces.create(self.pool, self.redis, "Acme")
        self.workspace_id = workspace.id
        await self.give(GIVEN_UCR)
        await keys.create(self.pool, self.redis, workspace.id, "key", self.secret)
        await (await self.host.start()).until_ready()
        return self

    async def start_accounting(self) -> Worker:
        self._stopping = asyncio.Event()
        settings = Settings(
            database_url=Secret(self._database_url),
            redis_url=Secret(self.server.url),
            redis_timeout_seconds=5.0,
            heartbeat_seconds=0.2,
        )
        worker = Worker(settings)
        self._accounting = asyncio.create_task(worker.run(self._stopping))
        return worker

    async def stop_accounting(self) -> None:
        if self._accounting is not None:
            self._stopping.set()
            await self._accounting
            self._accounting = None

    async def give(self, amount_ucr: int) -> None:
        self.given_ucr += amount_ucr
        await funding.give(
            self.pool,
            self.redis,
            self.workspace_id,
            kind="promo",
            amount_ucr=amount_ucr,
            expires_at=None,
            source_ref=new_id("test"),
        )

    # Redis

    def start_redis(self) -> None:
        self.server = start_redis(self.folder)
        self.redis = Redis.from_url(self.server.url)

    async def lose_redis(self) -> None:
        """As `kill -9` does."""
        os.kill(self.server.pid, signal.SIGKILL)
        await eventually(lambda: not self.server.alive())
        await self.redis.aclose()

    def copy(self) -> Path:
        """What Redis has on its disk by now."""
        kept = self.folder / "kept"
        shutil.copytree(self.folder / "redis", kept)
        return kept

    async def roll_back(self, kept: Path) -> None:
        """Kill Redis and start it on what it had then."""
        await self.lose_redis()
        shutil.rmtree(self.folder / "redis")
        shutil.move(kept, self.folder / "redis")
        self.start_redis()

    # Load

    async def serve(self, count: int) -> None:
        """Requests one after the other, all of them served."""
        for _ in range(count):
            answer = await self.host.ask(self.secret.reveal(), chat())
            assert answer.status == 200, answer
            self.charged += credits_of(answer)

    async def stream(self) -> tuple[Client, Any]:
        return await stream_begun(self.host, self.secret.reveal())

    async def finish(self, client: Client, upstream: Any) -> None:
        upstream >> sse(usage_chunk(10, 20)) + STREAM_END
        events = [await client.event() for _ in range(2)]
        self.charged += round(events[-2]["credits_used"] * 1_000_000)

    async def serves_again(self) -> None:
        """The gate of every worker has opened; refused until then with 503, never 401."""

        async def served() -> bool:
            answer = await self.host.ask(self.secret.reveal(), chat())
            assert answer.status in (200, 503), answer
            if answer.status == 200:
                self.charged += credits_of(answer)
            return answer.status == 200

        await eventually(lambda: self.redis.exists(keyspace.EPOCH), SOON)
        await eventually(served, SOON)
        await self.host.until_ready()  # the other worker's gate as well

    # What is left

    async def wallet(self) -> Wallet:
        packed: Any = await self.redis.hget(keyspace.workspace_key(self.workspace_id), "w")
        return msgspec.msgpack.decode(packed, type=Wallet)

    async def held(self) -> int:
        """For streams that are open, once everything else has been settled."""

        async def only_held() -> int:
            wallet = await self.wallet()
            settled = wallet.balance == self.given_ucr - self.charged and not wallet.unused
            return wallet.held if settled else 0

        return int(await eventually(only_held, SOON))

    async def posted(self) -> int:
        """µcr of usage in the ledger."""
        return int(
            await self.pool.fetchval("select coalesce(sum(charge_ucr), 0) from usage_records")
        )

    async def settled(self) -> None:
        """All is posted once, and in both stores alike."""
        await eventually(self._all_posted, SOON)
        findings = await audit.audit(self.pool, self.redis, 900)
        assert [finding for finding in findings if finding.drifted] == []

    async def _all_posted(self) -> bool:
        wallet = await self.wallet()
        left = self.given_ucr - self.charged
        return await self.posted() == self.charged and (wallet.balance, wallet.held) == (left, 0)


@asynccontextmanager
async def city_on(folder: Path, database_url: str) -> AsyncIterator[City]:
    async with pool_on(database_url, size=8) as pool:
        city = City(folder, pool, database_url, Host.__new__(Host))
        city.start_redis()
        city.host = await Host(folder, city.server.url).open()
        city.host.env["TOLLGATE_WORKERS"] = "2"
        try:
            yield await city.open()
        finally:
            await city.host.close()
            await city.stop_accounting()
            await city.redis.aclose()
            city.server.stop()


@pytest.fixture
async def city(tmp_path: Path, database_url: str) -> AsyncIterator[City]:
    async with city_on(tmp_path, database_url) as city:
        yield city


async def test_killed_with_its_file_whole_it_loses_nothing(city: City) -> None:
    await city.serve(3)
    stream = await city.stream()
    held = await city.held()
    await city.lose_redis()
    city.start_redis()
    await city.serves_again()
    assert await city.held() == held
    await city.finish(*stream)
    await city.settled()


@pytest.mark.parametrize("is_posted", [True, False], ids=["posted", "not posted"])
async def test_rolled_back_it_is_told_what_it_lost(city: City, is_posted: bool) -> None:
    """Requests, an open stream, a top-up and a revocation are all in the seconds it lost."""
    await city.serve(3)
    other = keys.new_secret()
    key = await keys.create(city.pool, city.redis, city.workspace_id, "other", other)
    await eventually(lambda: _equal(city.posted(), city.charged), SOON)
    if not is_posted:
        await city.stop_accounting()
    kept = city.copy()
    await city.serve(4)
    stream = await city.stream()
    await city.give(1000)
    await keys.revoke(city.pool, city.redis, city.workspace_id, key.id)
    held = await city.held()
    if is_posted:
        await eventually(lambda: _equal(city.posted(), city.charged), SOON)
    await city.roll_back(kept)
    if not is_posted:
        await city.start_accounting()
    await city.serves_again()
    assert await city.held() == held
    assert (await city.host.ask(other.reveal(), chat())).status == 401
    await city.finish(*stream)
    await city.serve(2)
    await city.settled()


@pytest.mark.parametrize("how", ["flushed", "replaced"])
async def test_emptied_it_is_filled_and_told_the_rest(city: City, how: str) -> None:
    await city.serve(3)
    stream = await city.stream()
    held = await city.held()
    await city.stop_accounting()
    await city.serve(4)  # on the stream alone, and in the workers' tails
    assert await city.held() == held  # all of it settled
    if how == "flushed":
        await city.redis.flushall()
    else:
        await city.lose_redis()
        shutil.rmtree(city.folder / "redis")
        city.start_redis()
    await city.start_accounting()
    await city.serves_again()
    assert await city.held() == held
    await city.finish(*stream)
    await city.settled()


async def test_emptied_before_a_settle_it_is_told_what_came_before(city: City) -> None:
    """A worker settles into the empty Redis before it has found it so: the number of that batch
    says nothing of those that came before."""
    await city.serve(3)
    stream = await city.stream()
    await city.stop_accounting()
    await city.serve(8)
    await city.held()  # all of it settled
    await city.redis.flushall()
    await city.finish(*stream)
    await city.start_accounting()
    await city.serves_again()
    await city.settled()


@pytest.mark.parametrize("orderly", [False, True], ids=["killed", "stopped"])
async def test_rolled_back_with_its_workers_gone_the_tails_are_told(
    city: City, orderly: bool
) -> None:
    """The whole host loses power: Redis its last seconds, the workers their lives; or they were
    stopped within the seconds that Redis has lost."""
    await city.serve(3)
    await eventually(lambda: _equal(city.posted(), city.charged), SOON)
    await city.stop_accounting()
    kept = city.copy()
    await city.serve(4)
    workers = city.host.workers()
    if orderly:
        city.host.process.terminate()
    else:
        for one in (city.host.process, *workers):
            one.kill()
    await city.host.ended()
    await eventually(lambda: not any(map(_lives, workers)), SOON)
    await city.roll_back(kept)
    await city.start_accounting()
    await (await city.host.start()).until_ready()
    await city.serves_again()
    await city.settled()


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def test_workers_taken_to_be_lost_leave_and_are_replaced(city: City) -> None:
    """Their host was away for longer than anybody waits."""
    await city.serve(2)
    client, upstream = await city.stream()
    before = {worker.pid for worker in city.host.workers()}
    for worker in city.host.workers():
        worker.suspend()
    try:
        await city.redis.hincrby(CLOCK, "ms", 3_600_000)
        await eventually(lambda: _equal(city.redis.zcard(HEARD), 0), SOON)
        assert (await city.wallet()).held == 0
    finally:
        for worker in city.host.workers():
            worker.resume()
    await eventually(lambda: len(city.host.log("boot retired by others")) == 2, SOON)
    await city.finish(client, upstream)  # it drains, and is charged late
    await city.serves_again()
    await city.settled()
    await eventually(lambda: not before & {worker.pid for worker in city.host.workers()}, SOON)


async def _equal(found: Any, wanted: int) -> bool:
    return bool(await found == wanted)
