"""The muster: whom a rebuild waits for, for how long, and that stream ids never fall behind."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from redis.asyncio import Redis

from accounting import muster, reaper, rebuild
from accounting.contract import keyspace, scripts
from accounting.contract.keyspace import CLOCK, EPOCH, FENCED, HEARD, MUSTER
from accounting.usage_entries import StreamId
from tests.accounting.scene import Boot, Tenant, pool_on
from tests.waiting import eventually


@pytest.fixture
async def pool(database_url: str, redis_client: Redis) -> AsyncIterator[asyncpg.Pool]:
    await redis_client.set(EPOCH, "filled")
    await redis_client.hset(CLOCK, "ms", 100_000)
    async with pool_on(database_url, size=6) as pool:
        yield pool


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muster, "_PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(muster, "_POSTED_SECONDS", 0.3)


async def beat(redis: Redis, boot: str) -> None:
    await scripts.call(redis, "beat", [HEARD, FENCED, CLOCK], [boot])


async def answer(redis: Redis, boot: str, told_late: int = 0) -> str:
    """As a worker does, when it is called."""
    epoch = await eventually(lambda: redis.get(MUSTER))
    await redis.hset(keyspace.mustered_key(epoch.decode()), boot, told_late)
    return str(epoch.decode())


async def test_a_rebuild_ends_when_all_have_answered(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    for boot in ("boot_1", "boot_2"):
        await beat(redis_client, boot)
    called = asyncio.create_task(muster.call(pool, redis_client, "e"))
    await answer(redis_client, "boot_1")
    assert not called.done()
    await answer(redis_client, "boot_2")
    assert await called == set()


async def test_one_that_does_not_answer_is_told(pool: asyncpg.Pool, redis_client: Redis) -> None:
    await beat(redis_client, "boot_1")
    assert await muster.call(pool, redis_client, "e") == {"boot_1"}


async def test_nobody_waits_for_the_silent_and_the_fenced(
    pool: asyncpg.Pool, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muster, "_PATIENCE_SECONDS", 3600)
    await beat(redis_client, "boot_silent")
    await redis_client.hincrby(CLOCK, "ms", 60_000)
    await beat(redis_client, "boot_fenced")
    await reaper.retire(redis_client, "boot_fenced")
    assert await muster.call(pool, redis_client, "e") == set()


async def test_what_was_told_late_is_posted_first(pool: asyncpg.Pool, redis_client: Redis) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    await beat(redis_client, "boot_1")
    last = await redis_client.xadd(keyspace.stream_key(tenant.shard), {"e": b"\x90", "l": 1})
    called = asyncio.create_task(muster.call(pool, redis_client, "e"))
    await answer(redis_client, "boot_1", told_late=1)
    await eventually(lambda: redis_client.hlen(keyspace.mustered_key("e")))
    ms, seq = map(int, last.split(b"-"))
    await pool.execute(
        "insert into stream_offsets (shard, last_ms, last_seq) values ($1, $2, $3)",
        tenant.shard,
        ms,
        seq,
    )
    assert await called == set()


async def test_a_redis_of_another_run_is_rebuilt(pool: asyncpg.Pool, redis_client: Redis) -> None:
    assert not await rebuild.needed(redis_client)
    await redis_client.set(EPOCH, keyspace.epoch_of("x", "another run"))
    assert await rebuild.needed(redis_client)
    await rebuild.rebuild(pool, redis_client)
    assert not await rebuild.needed(redis_client)
    assert not await redis_client.exists(MUSTER)


@pytest.mark.parametrize("exists", [False, True])
async def test_no_new_entry_comes_before_what_is_posted(
    pool: asyncpg.Pool, redis_client: Redis, exists: bool
) -> None:
    """Redis came back on a host whose clock is behind."""
    ahead = StreamId(2**42, 7)
    await pool.execute(
        "insert into stream_offsets (shard, last_ms, last_seq) values (3, $1, $2)", *ahead
    )
    if exists:
        await redis_client.xadd(keyspace.stream_key(3), {"e": b"\x90"})
    for _ in range(2):
        await muster.raise_ids(pool, redis_client)
    last = await redis_client.xadd(keyspace.stream_key(3), {"e": b"\x90"})
    assert last == b"%d-%d" % ahead.next


async def test_leases_declared_before_the_wallets_are_summed(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    """What a worker declares while Redis is filled is part of what is held."""
    tenant = await Tenant.make(pool, redis_client, 1000)
    boot = Boot(redis_client)
    assert await boot.admit(tenant, 300)
    await beat(redis_client, boot.name)
    await redis_client.delete(keyspace.workspace_key(tenant.id))
    task = asyncio.create_task(rebuild.rebuild(pool, redis_client, always=True))
    await eventually(lambda: redis_client.exists(MUSTER))
    assert not await boot.admit(tenant, 10**9)  # refused, but declares what it holds
    await answer(redis_client, boot.name)
    await task
    wallet = await tenant.wallet()
    assert (wallet.balance, wallet.held) == (1000, 300)
