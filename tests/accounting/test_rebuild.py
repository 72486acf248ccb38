"""Redis restored from Postgres and the stream: to the micro-credit, also while it is in use."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import audit, keys, rebuild, reckoning, usage_posting, workspaces
from accounting.contract.keyspace import (
    EPOCH,
    KeyCounters,
    KeyRecord,
    digest_key,
    digest_of,
    stream_key,
    workspace_key,
)
from accounting.rebuild import RebuildError
from accounting.usage_entries import START, StreamId
from accounting.usage_stream import read_range
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on


async def assert_clean(pool: asyncpg.Pool, redis: Redis) -> None:
    findings = await audit.audit(pool, redis, 900)
    assert [finding for finding in findings if finding.drifted] == []


async def post_everything(tenant: Tenant) -> None:
    entries = await read_range(tenant.redis, tenant.shard, START, StreamId(2**60, 0))
    async with tenant.pool.acquire() as connection:
        await usage_posting.post(connection, entries, datetime.now(UTC).date())
    await tenant.redis.xtrim(stream_key(tenant.shard), maxlen=0, approximate=False)


@asynccontextmanager
async def used(database_url: str, redis: Redis) -> AsyncIterator[Tenant]:
    """A tenant whose usage is posted, in a Redis that counts as filled."""
    async with pool_on(database_url, size=6) as pool:
        await redis.set(EPOCH, "filled")
        tenant = await Tenant.make(pool, redis, 1000)
        for charge in (100, 0, 23):
            await Boot(redis).serve(tenant, charge)
        await post_everything(tenant)
        yield tenant


async def spent(tenant: Tenant) -> int:
    packed = await tenant.redis.hget(workspace_key(tenant.id), f"c:{tenant.key_id}")
    assert isinstance(packed, bytes)
    return msgspec.msgpack.decode(packed, type=KeyCounters).spent_ucr


async def test_an_empty_redis_is_filled(database_url: str, redis_client: Redis) -> None:
    async with used(database_url, redis_client) as tenant:
        before = await tenant.wallet()
        await redis_client.flushall()
        assert await rebuild.needed(redis_client)
        assert await rebuild.rebuild(tenant.pool, redis_client) == 1
        assert not await rebuild.needed(redis_client)
        assert await tenant.wallet() == before
        assert await spent(tenant) == 123
        await assert_clean(tenant.pool, redis_client)
        assert await Boot(redis_client).admit(tenant, 877)


async def test_a_filled_redis_is_left_alone_unless_asked(
    database_url: str, redis_client: Redis
) -> None:
    async with used(database_url, redis_client) as tenant:
        epoch = await redis_client.get(EPOCH)
        assert await rebuild.rebuild(tenant.pool, redis_client) == 0
        assert await redis_client.get(EPOCH) == epoch
        assert await rebuild.rebuild(tenant.pool, redis_client, always=True) == 1
        assert await redis_client.get(EPOCH) != epoch
        await assert_clean(tenant.pool, redis_client)


async def test_what_is_still_on_the_stream_is_counted(
    database_url: str, redis_client: Redis
) -> None:
    async with used(database_url, redis_client) as tenant:
        await Boot(redis_client).serve(tenant, 50)
        await redis_client.delete(workspace_key(tenant.id), EPOCH)
        await rebuild.rebuild(tenant.pool, redis_client)
        assert (await tenant.wallet()).balance == 1000 - 123 - 50
        assert await spent(tenant) == 173
        await post_everything(tenant)
        await assert_clean(tenant.pool, redis_client)


async def test_deltas_on_their_way_are_part_of_it(database_url: str, redis_client: Redis) -> None:
    async with used(database_url, redis_client) as tenant:
        await redis_client.flushall()
        await tenant.give("promo", 40)  # cannot reach Redis now
        await rebuild.rebuild(tenant.pool, redis_client)
        assert (await tenant.wallet()).balance == 1000 - 123 + 40
        waiting = "select count(*) from redis_deltas where applied_at is null"
        assert await tenant.pool.fetchval(waiting) == 0
        await tenant.give("promo", 2)
        assert (await tenant.wallet()).balance == 1000 - 123 + 42
        await assert_clean(tenant.pool, redis_client)


async def test_keys_and_states_are_restored(database_url: str, redis_client: Redis) -> None:
    async with used(database_url, redis_client) as tenant:
        secrets = [keys.new_secret() for _ in range(2)]
        limits = keys.Limits(concurrency=3)
        live, dead = [
            await keys.create(tenant.pool, redis_client, tenant.id, "k", secret, limits=limits)
            for secret in secrets
        ]
        await keys.revoke(tenant.pool, redis_client, tenant.id, dead.id)
        await workspaces.suspend(tenant.pool, redis_client, tenant.id)
        before = await redis_client.hgetall(workspace_key(tenant.id))
        await redis_client.flushall()
        await rebuild.rebuild(tenant.pool, redis_client)
        after = await redis_client.hgetall(workspace_key(tenant.id))
        for field in (b"w", f"k:{live.id}".encode(), f"k:{dead.id}".encode()):
            assert after[field] == before[field]
        records = [
            await redis_client.get(digest_key(digest_of(secret.reveal()))) for secret in secrets
        ]
        assert records[1] is None
        assert msgspec.msgpack.decode(records[0], type=KeyRecord).key_id == live.id


async def test_open_holds_survive_a_rebuild_that_was_asked_for(
    database_url: str, redis_client: Redis
) -> None:
    async with used(database_url, redis_client) as tenant:
        boot = Boot(redis_client)
        event = tenant.event(60, hold_ucr=200)
        assert await boot.admit(tenant, 200)
        await rebuild.rebuild(tenant.pool, redis_client, always=True)
        assert (await tenant.wallet()).held == 200
        await assert_clean(tenant.pool, redis_client)
        await boot.settle(tenant, event)
        wallet = await tenant.wallet()
        assert (wallet.balance, wallet.held) == (1000 - 123 - 60, 0)
        await assert_clean(tenant.pool, redis_client)


async def test_it_is_exact_while_exchanges_settle(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url, size=8) as pool:
        await redis_client.set(EPOCH, "filled")
        tenants = [await Tenant.make(pool, redis_client, PLENTY, shard=5) for _ in range(3)]
        busy = True

        async def serve(tenant: Tenant) -> None:
            boot = Boot(redis_client)
            while busy:
                await boot.serve(tenant, 3)

        load = [asyncio.create_task(serve(tenant)) for tenant in tenants]
        for _ in range(3):
            assert await rebuild.rebuild(pool, redis_client, always=True) == 3
            await assert_clean(pool, redis_client)
        busy = False
        await asyncio.gather(*load)
        await assert_clean(pool, redis_client)


async def test_settles_into_an_emptied_redis_are_not_lost(
    database_url: str, redis_client: Redis
) -> None:
    """Exchanges that were open when Redis lost everything settle before and after the rebuild."""
    async with used(database_url, redis_client) as tenant:
        boot = Boot(redis_client)
        events = [tenant.event(30), tenant.event(40)]
        assert await boot.admit(tenant, 30) and await boot.admit(tenant, 40)
        await redis_client.flushall()
        await boot.settle(tenant, events[0])
        await rebuild.rebuild(tenant.pool, redis_client)
        await boot.settle(tenant, events[1])
        assert (await tenant.wallet()).balance == 1000 - 123 - 70
        await assert_clean(tenant.pool, redis_client)
        await post_everything(tenant)
        await assert_clean(tenant.pool, redis_client)


async def test_several_processes_rebuild_once(database_url: str, redis_client: Redis) -> None:
    async with used(database_url, redis_client) as tenant:
        await redis_client.flushall()
        async with pool_on(database_url) as other:
            found = await asyncio.gather(
                rebuild.rebuild(tenant.pool, redis_client), rebuild.rebuild(other, redis_client)
            )
        assert sorted(found) == [0, 1]


async def test_the_gate_stays_closed_when_it_fails(
    database_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with used(database_url, redis_client) as tenant:
        reckon = reckoning.reckon

        async def disturbed(*arguments: object) -> list[reckoning.Reckoning]:
            found = await reckon(*arguments)
            await tenant.give("promo", 1)
            return found

        monkeypatch.setattr(reckoning, "reckon", disturbed)
        with pytest.raises(RebuildError):
            await rebuild.rebuild(tenant.pool, redis_client, always=True)
        assert await rebuild.needed(redis_client)
        monkeypatch.undo()
        assert await rebuild.rebuild(tenant.pool, redis_client) == 1
