"""The consumer's loop through every interruption: nothing lost, nothing twice, nothing stuck."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from accounting import audit
from accounting.consumer import Consumer
from accounting.contract.keyspace import EPOCH, STREAM_GROUP, stream_key
from accounting.contract.settings import SHARDS, Secret, Settings
from accounting.counters import Counters
from accounting.store_states import StoreStates
from accounting.stores import open_postgres, open_redis
from accounting.usage_stream import UsageStream
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on
from tests.accounting.wire import Wire
from tests.waiting import eventually

LOGGER = "tollgate.accounting"


def settings_for(database_url: str, redis_url: str, **changes: Any) -> Settings:
    return Settings(
        database_url=Secret(database_url),
        redis_url=Secret(redis_url),
        accounting_wait_seconds=0.05,
        **changes,
    )


@asynccontextmanager
async def consuming(settings: Settings) -> AsyncIterator[Counters]:
    """A consumer at work; its counters."""
    counters = Counters()
    pool, redis = await open_postgres(settings), await open_redis(settings)
    consumer = Consumer(settings, pool, redis, counters, StoreStates())
    task = asyncio.create_task(consumer.run())
    try:
        yield counters
    finally:
        consumer.stop()
        try:
            await task
        finally:
            await redis.aclose()
            pool.terminate()


async def recorded(pool: asyncpg.Pool) -> int:
    return int(await pool.fetchval("select count(*) from usage_records"))


async def assert_clean(pool: asyncpg.Pool, redis: Redis) -> None:
    await redis.set(EPOCH, "filled")
    findings = await audit.audit(pool, redis, 900)
    assert [finding for finding in findings if finding.drifted] == []


async def test_usage_flows_into_the_ledger(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenants = [await Tenant.make(pool, redis_client, PLENTY) for _ in range(5)]
        boot = Boot(redis_client)
        async with consuming(settings_for(database_url, redis_url)) as counters:
            for n in range(50):
                await boot.serve(tenants[n % 5], n)
            await eventually(lambda: counters.events == 50)
            await eventually(lambda: counters.owned_shards == SHARDS)
            await assert_clean(pool, redis_client)
        assert counters.owned_shards == 0
        for tenant in tenants:
            assert await redis_client.xlen(stream_key(tenant.shard)) == 0
        assert (counters.entries, counters.duplicates, counters.quarantined) == (50, 0, 0)


async def test_what_was_committed_but_not_acknowledged_is_recognised(
    database_url: str, redis_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = UsageStream.done
    failures = iter([True])

    async def failing(self: UsageStream, entries: Any) -> None:
        if next(failures, False):
            raise RedisConnectionError("lost between commit and acknowledgement")
        await done(self, entries)

    monkeypatch.setattr(UsageStream, "done", failing)
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        async with consuming(settings_for(database_url, redis_url)) as counters:
            await Boot(redis_client).serve(tenant, 5)
            await eventually(lambda: counters.duplicates == 1)
            await assert_clean(pool, redis_client)
        assert await recorded(pool) == 1
        pending = await redis_client.xpending(stream_key(tenant.shard), STREAM_GROUP)
        assert pending["pending"] == 0


async def test_a_consumer_that_dies_hands_over_what_it_had_read(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        for n in range(10):
            await boot.serve(tenant, n)
        dead = UsageStream(redis_client, 4)
        await dead.own([tenant.shard])
        await dead.read(0.01)
        assert len(await dead.read(0.01)) == 4
        async with consuming(settings_for(database_url, redis_url)) as counters:
            await eventually(lambda: counters.events == 10)
            await assert_clean(pool, redis_client)


async def test_stopping_leaves_what_was_not_posted_for_the_next(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        settings = settings_for(database_url, redis_url, accounting_batch=2)
        served = 0
        for _ in range(4):
            async with consuming(settings) as counters:
                for _ in range(10):
                    await boot.serve(tenant, 1)
                served += 10
                await eventually(lambda: counters.batches)
        async with consuming(settings):
            await eventually(lambda: _is(recorded(pool), served))
            await assert_clean(pool, redis_client)


async def _is(call: Any, expected: int) -> bool:
    return await call == expected


async def test_two_processes_share_and_the_survivor_takes_over(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenants = [await Tenant.make(pool, redis_client, PLENTY) for _ in range(20)]
        boot = Boot(redis_client)
        settings = settings_for(database_url, redis_url)
        async with consuming(settings) as survivor:
            await eventually(lambda: survivor.owned_shards == SHARDS)
            async with (
                Wire(database_url) as wire,
                consuming(settings_for(wire.url, redis_url)) as other,
            ):
                await eventually(lambda: other.owned_shards == SHARDS // 2, 10)
                assert survivor.owned_shards == SHARDS // 2
                for tenant in tenants:
                    await boot.serve(tenant, 3)
                await eventually(lambda: survivor.events + other.events == 20)
                assert survivor.events and other.events
                wire.cut()
                for tenant in tenants:
                    await boot.serve(tenant, 4)
                await eventually(lambda: survivor.owned_shards == SHARDS, 10)
                await eventually(lambda: _is(recorded(pool), 40))
            await assert_clean(pool, redis_client)


@pytest.mark.parametrize("store", ["Postgres", "Redis"])
async def test_an_outage_loses_nothing_and_says_so_once(
    database_url: str,
    redis_url: str,
    redis_client: Redis,
    store: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    async with pool_on(database_url) as pool, Wire(database_url) as sql, Wire(redis_url) as keys:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        wire = sql if store == "Postgres" else keys
        async with consuming(settings_for(sql.url, keys.url)) as counters:
            await boot.serve(tenant, 1)
            await eventually(lambda: counters.events == 1)
            for _ in range(2):
                before = counters.events
                wire.cut()
                for _ in range(5):
                    await boot.serve(tenant, 2)
                await eventually(lambda: counters.owned_shards == 0)
                wire.mend()
                await eventually(lambda then=before: counters.events == then + 5, 10)
            await eventually(lambda: len(said(caplog)) == 4)
            await assert_clean(pool, redis_client)
        assert counters.outages == 2
    lost, back = f"{store} does not answer", f"{store} answers again"
    assert said(caplog) == [lost, back, lost, back]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own lines; the pool's are not shown in a process of ours."""
    ours = [record for record in caplog.records if record.name == LOGGER]
    return [record.getMessage().partition(":")[0] for record in ours]


async def refuse(pool: asyncpg.Pool, request_id: str) -> None:
    """From now on Postgres takes no row of that request."""
    await pool.execute(
        "create function refuse() returns trigger language plpgsql as"
        f" $$ begin if new.request_id = '{request_id}' then raise check_violation; end if;"
        " return new; end $$;"
        "create trigger refuse before insert on usage_records"
        " for each row execute function refuse()"
    )


async def test_a_refused_entry_goes_to_quarantine_and_blocks_nobody(
    database_url: str, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY, shard=3)
        other = await Tenant.make(pool, redis_client, PLENTY, shard=4)
        boot = Boot(redis_client)
        poison = tenant.event(7)
        await refuse(pool, poison.request_id)
        settings = settings_for(database_url, redis_url, accounting_deliveries=3)
        await boot.serve(tenant, 1)
        assert await boot.admit(tenant, 7)
        await boot.settle(tenant, poison)
        await boot.serve(tenant, 2)
        await boot.serve(other, 3)
        async with consuming(settings) as counters:
            await eventually(lambda: counters.events == 3)
            assert (counters.quarantined, counters.refused) == (1, 3)
            await assert_clean(pool, redis_client)
        row = await pool.fetchrow("select request_id, charge_ucr, reason from quarantine")
        assert tuple(row)[:2] == (poison.request_id, 7)
        assert "usage events go to quarantine: 1 so far" in caplog.text


async def test_garbage_on_a_stream_goes_to_quarantine_at_once(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        stream = stream_key(tenant.shard)
        await redis_client.xadd(stream, {"e": b"\xc1"})
        await redis_client.xadd(stream, {"foreign": b"fields"})
        await Boot(redis_client).serve(tenant, 5)
        async with consuming(settings_for(database_url, redis_url)) as counters:
            await eventually(lambda: counters.events == 1 and counters.quarantined == 2)
            await assert_clean(pool, redis_client)


async def test_entries_trimmed_by_a_stranger_are_noted(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        stream = stream_key(tenant.shard)
        boot = Boot(redis_client)
        events = [await boot.serve(tenant, n) for n in range(1, 5)]
        reader = UsageStream(redis_client, 10)
        await reader.own([tenant.shard])
        await reader.read(0.01)
        entries = await reader.read(0.01)
        await redis_client.xdel(stream, str(entries[1].id))
        async with consuming(settings_for(database_url, redis_url)) as counters:
            await eventually(lambda: counters.entries == 4)
        reasons = await pool.fetch("select stream_id, reason from quarantine")
        assert [tuple(row) for row in reasons] == [
            (str(entries[1].id), "trimmed away before it was posted")
        ]
        assert await recorded(pool) == len(events) - 1


async def test_a_redis_that_starts_empty_is_read_from_the_start(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        async with consuming(settings_for(database_url, redis_url)) as counters:
            await Boot(redis_client).serve(tenant, 5)
            await eventually(lambda: counters.events == 1)
            await redis_client.flushall()
            tenant = await Tenant.make(pool, redis_client, PLENTY)
            await Boot(redis_client).serve(tenant, 6)
            await eventually(lambda: counters.events == 2)


async def test_a_mistake_of_ours_is_not_hidden(
    database_url: str, redis_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = asyncio.Event()

    async def broken(self: UsageStream, wait_seconds: float) -> list[Any]:
        called.set()
        raise ZeroDivisionError

    monkeypatch.setattr(UsageStream, "read", broken)
    with pytest.raises(ZeroDivisionError):
        async with consuming(settings_for(database_url, redis_url)):
            await called.wait()
