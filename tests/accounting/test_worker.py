"""`python -m accounting` as a process: run, migrate, audit, rebuild; how they start and end."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis

from accounting import audit, partitions
from accounting.contract import scripts
from accounting.contract.keyspace import CLOCK, EPOCH, FENCED, HEARD, workspace_key
from accounting.contract.settings import Address, Secret, Settings
from accounting.worker import Worker
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on
from tests.accounting.wire import Wire
from tests.waiting import eventually, free_port

PARTITIONS = "select inhrelid::regclass::text from pg_inherits"
PARTITIONS += " where inhparent = 'usage_records'::regclass"
ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def working(database_url: str, redis_url: str) -> AsyncIterator[Worker]:
    worker = Worker(
        Settings(
            database_url=Secret(database_url),
            redis_url=Secret(redis_url),
            accounting_listen=Address("127.0.0.1", 0),
        )
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(worker.run(stopping))
    try:
        yield worker
    finally:
        stopping.set()
        await task


async def start(*words: str, **variables: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "accounting", *words,
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "TOLLGATE_ACCOUNTING_LISTEN": "127.0.0.1:0",
            **variables,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def outcome(*words: str, **variables: str) -> tuple[int | None, str, str]:
    """Exit status, stdout, stderr."""
    process = await start(*words, **variables)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), err.decode()


async def test_it_fills_redis_posts_usage_and_does_its_chores(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await redis_client.flushall()
        async with working(database_url, redis_url) as worker:
            await eventually(lambda: redis_client.exists(EPOCH))
            assert worker.counters.rebuilds == 1
            await tenant.give("topup", PLENTY)
            await tenant.give("trial", 500, datetime.now(UTC) - timedelta(hours=1))
            await Boot(redis_client).serve(tenant, 7)
            await eventually(lambda: worker.counters.events == 1)
            await eventually(lambda: worker.counters.expired_ucr == 500)
            due = {f"usage_records_{day:%Y%m%d}" for day in partitions.due(datetime.now(UTC))}
            assert due <= {row[0] for row in await pool.fetch(PARTITIONS)}


async def test_a_delta_that_could_not_be_applied_is_applied_later(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        await redis_client.set(EPOCH, "filled")
        before = await redis_client.hget(workspace_key(tenant.id), "w")
        await tenant.give("topup", 5)
        await redis_client.hset(workspace_key(tenant.id), "w", before)
        await pool.execute("update redis_deltas set applied_at = null where delta_id = 2")
        async with working(database_url, redis_url) as worker:
            await eventually(lambda: worker.counters.deltas == 1)
        assert (await tenant.wallet()).balance == 105


async def test_redis_that_loses_its_data_is_rebuilt_meanwhile(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool, working(database_url, redis_url) as worker:
        await eventually(lambda: redis_client.exists(EPOCH))
        tenant = await Tenant.make(pool, redis_client, 100)
        await redis_client.flushall()
        await eventually(lambda: redis_client.exists(EPOCH))
        assert (await tenant.wallet()).balance == 100
        await Boot(redis_client).serve(tenant, 30)
        await eventually(lambda: worker.counters.events == 1)


async def test_a_wallet_that_cannot_be_told_hinders_no_other_chore(
    database_url: str, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        lost, other = [await Tenant.make(pool, redis_client, 100) for _ in range(2)]
        await pool.execute(
            "insert into journals (kind, workspace_id, dedupe_key) values ('usage', $1, 'x')",
            lost.id,
        )
        await redis_client.delete(workspace_key(lost.id))
        await pool.execute("update redis_deltas set applied_at = null")
        async with working(database_url, redis_url) as worker:
            await other.give("trial", 500, datetime.now(UTC) - timedelta(hours=1))
            await eventually(lambda: worker.counters.expired_ucr == 500)
            await eventually(lambda: worker.counters.events == 0 and len(caplog.records) >= 1)
        assert sum(lost.id in record.getMessage() for record in caplog.records) == 1


async def test_run_starts_says_so_and_stops_in_order(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    urls = {"TOLLGATE_DATABASE_URL": database_url, "TOLLGATE_REDIS_URL": redis_url}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = await start("run", **urls)
        assert process.stderr is not None
        said = [msgspec.json.decode(await process.stderr.readline())["text"]]
        await eventually(lambda: redis_client.exists(EPOCH))
        process.send_signal(number)
        out, err = await asyncio.wait_for(process.communicate(), 30)
        said += [msgspec.json.decode(line)["text"] for line in err.splitlines()]
        assert (process.returncode, out) == (0, b"")
        assert said[0] == "accounting runs"
        assert said[-1] == "accounting has stopped"


async def test_an_outage_of_postgres_is_two_lines(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with Wire(database_url) as wire, pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        urls = {"TOLLGATE_DATABASE_URL": wire.url, "TOLLGATE_REDIS_URL": redis_url}
        process = await start("run", **urls)
        assert process.stderr is not None

        async def said() -> str:
            assert process.stderr is not None
            line = await asyncio.wait_for(process.stderr.readline(), 20)
            return str(msgspec.json.decode(line)["text"])

        assert await said() == "accounting runs"
        wire.cut()
        assert (await said()).startswith("Postgres does not answer: ")
        await Boot(redis_client).serve(tenant, 5)
        wire.mend()
        assert await said() == "Postgres answers again"
        process.terminate()
        assert await said() == "accounting has stopped"
        assert await asyncio.wait_for(process.communicate(), 20) == (b"", b"")


async def test_killed_again_and_again_it_loses_nothing(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    urls = {"TOLLGATE_DATABASE_URL": database_url, "TOLLGATE_REDIS_URL": redis_url}
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        tenants = [await Tenant.make(pool, redis_client, PLENTY) for _ in range(4)]
        boot = Boot(redis_client)
        served = 0

        async def recorded(at_least: int) -> bool:
            return await pool.fetchval("select count(*) from usage_records") >= at_least

        for _ in range(3):
            process = await start("run", **urls)
            for n in range(40):
                await boot.serve(tenants[n % 4], n)
            served += 40
            await eventually(lambda: recorded(served - 20), 20)  # noqa: B023 - awaited here
            process.kill()
            await process.communicate()
        async with working(database_url, redis_url):
            await eventually(lambda: recorded(served), 10)
            findings = await audit.audit(pool, redis_client, 900)
            assert [finding for finding in findings if finding.drifted] == []
        assert await pool.fetchval("select count(*) from usage_records") == served


async def test_migrate_says_what_it_applied(empty_database_url: str, redis_url: str) -> None:
    urls = {"TOLLGATE_DATABASE_URL": empty_database_url, "TOLLGATE_REDIS_URL": redis_url}
    status, out, err = await outcome("run", **urls)
    assert (status, out) == (1, "")
    assert "migrate" in err.splitlines()[-1]
    status, out, err = await outcome("migrate", **urls)
    assert (status, err) == (0, "")
    assert "applied 0002_ledger.sql" in out.splitlines()
    assert await outcome("migrate", **urls) == (0, "", "")


async def test_audit_and_rebuild(database_url: str, redis_url: str, redis_client: Redis) -> None:
    urls = {"TOLLGATE_DATABASE_URL": database_url, "TOLLGATE_REDIS_URL": redis_url}
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        status, out, _ = await outcome("rebuild", **urls)
        assert (status, out) == (0, "rebuilt 1 workspaces\n")
        status, out, err = await outcome("audit", **urls)
        assert (status, err) == (0, "")
        assert all(line.startswith("ok ") for line in out.splitlines()[:-1])
        assert "no payments" in out.splitlines()[-1]
        await redis_client.hset(workspace_key(tenant.id), "w", msgspec.msgpack.encode([1, 0, 1, 1]))
        status, out, _ = await outcome("audit", "--json", **urls)
        findings: dict[str, Any] = msgspec.json.decode(out)
        assert (status, findings["drifted"]) == (1, 1)
        [bad] = [finding for finding in findings["findings"] if finding["drifted"]]
        assert bad["name"] == "R1"
        assert tenant.id in bad["first"]


@pytest.mark.parametrize("verb", ["run", "audit", "rebuild"])
async def test_a_store_that_is_not_there_is_one_line(
    verb: str, database_url: str, redis_url: str
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    for urls in (
        {
            "TOLLGATE_DATABASE_URL": f"postgresql://u:secret@{nowhere}/x",
            "TOLLGATE_REDIS_URL": redis_url,
        },
        {
            "TOLLGATE_DATABASE_URL": database_url,
            "TOLLGATE_REDIS_URL": f"redis://:secret@{nowhere}",
        },
    ):
        status, out, err = await outcome(verb, **urls)
        assert (status, out) == (1, "")
        [line] = err.splitlines()
        assert line.startswith("tollgate accounting: cannot reach ")
        assert nowhere in line
        assert "secret" not in line


async def test_bad_settings_are_one_line_and_another_status(database_url: str) -> None:
    status, out, err = await outcome("run", TOLLGATE_ACCOUNTING_BATCH="none")
    assert (status, out) == (2, "")
    assert err.startswith("tollgate: TOLLGATE_ACCOUNTING_BATCH: ")
    assert len(err.splitlines()) == 1


async def test_partitions_are_made_once_by_whoever_comes_first(database_url: str) -> None:
    days = [date(2031, 5, day) for day in (1, 2, 3)]
    async with pool_on(database_url, size=8) as pool:

        async def ensure() -> None:
            async with pool.acquire() as connection:
                await partitions.ensure(connection, days)

        await asyncio.gather(*(ensure() for _ in range(6)))
        made = {row[0] for row in await pool.fetch(PARTITIONS)}
        assert {f"usage_records_{day:%Y%m%d}" for day in days} == made


async def test_what_a_lost_host_leased_is_given_back(
    database_url: str, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        tenant = await Tenant.make(pool, redis_client, 1000)
        boot = Boot(redis_client)
        await scripts.call(redis_client, "beat", [HEARD, FENCED, CLOCK], [boot.name])
        assert await boot.admit(tenant, 700)
        async with working(database_url, redis_url) as worker:
            await eventually(lambda: redis_client.hexists(CLOCK, "ms"))
            await redis_client.hincrby(CLOCK, "ms", 3_600_000)
            await eventually(lambda: worker.counters.reaped == 1)
        assert (await tenant.wallet()).held == 0
        assert sum(boot.name in record.message for record in caplog.records) == 1
