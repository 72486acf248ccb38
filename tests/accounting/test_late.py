"""Late usage: settled where no hold was left, told as often as you like, charged once."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import audit, deltas, usage_posting
from accounting.contract.keyspace import EPOCH, stream_key
from accounting.contract.usage_event import UsageEvent, encode_event, join_events
from accounting.usage_entries import START, StreamId
from accounting.usage_posting import Posted
from accounting.usage_stream import read_range
from tests.accounting.scene import Boot, Tenant, make_event, pool_on


@pytest.fixture
async def tenant(database_url: str, redis_client: Redis) -> AsyncIterator[Tenant]:
    """With 1000 µcr, in a Redis that counts as filled."""
    await redis_client.set(EPOCH, "filled")
    async with pool_on(database_url, size=6) as pool:
        yield await Tenant.make(pool, redis_client, 1000)


async def tell_late(tenant: Tenant, *events: UsageEvent) -> None:
    body = join_events([encode_event(event) for event in events])
    await tenant.redis.xadd(stream_key(tenant.shard), {"b": "x", "n": 1, "l": 1, "e": body})


async def post(tenant: Tenant) -> Posted:
    """All that is on the stream, which is empty then."""
    entries = await read_range(tenant.redis, tenant.shard, START, StreamId(2**60, 0))
    async with tenant.pool.acquire() as connection:
        posted = await usage_posting.post(connection, entries, datetime.now(UTC).date())
    await tenant.redis.xtrim(stream_key(tenant.shard), maxlen=0, approximate=False)
    return posted


async def assert_clean(pool: asyncpg.Pool, redis: Redis) -> None:
    findings = await audit.audit(pool, redis, 900)
    assert [finding for finding in findings if finding.drifted] == []


async def test_it_is_taken_from_the_balance_once_posted(tenant: Tenant) -> None:
    await tell_late(tenant, tenant.event(30), tenant.event(40))
    await assert_clean(tenant.pool, tenant.redis)
    assert (await tenant.wallet()).balance == 1000
    assert (await post(tenant)).new == 2
    await assert_clean(tenant.pool, tenant.redis)
    assert await deltas.apply_pending(tenant.pool, tenant.redis) == 1
    assert ((await tenant.wallet()).balance, await tenant.spent()) == (930, 70)
    await assert_clean(tenant.pool, tenant.redis)


async def test_told_again_it_changes_nothing(tenant: Tenant) -> None:
    events = tenant.event(30), tenant.event(0)
    for _ in range(2):
        await tell_late(tenant, *events)
    await tell_late(tenant, *events, *events)
    assert (await post(tenant)).new == 2
    await tell_late(tenant, *events)
    assert (await post(tenant)).new == 0
    await deltas.apply_pending(tenant.pool, tenant.redis)
    assert ((await tenant.wallet()).balance, await tenant.spent()) == (970, 30)
    await assert_clean(tenant.pool, tenant.redis)


async def test_what_was_settled_before_is_not_taken_again(tenant: Tenant) -> None:
    first = await Boot(tenant.redis).serve(tenant, 30)
    await post(tenant)
    await tell_late(tenant, first)
    second = await Boot(tenant.redis).serve(tenant, 40)
    await tell_late(tenant, second, tenant.event(5))
    await assert_clean(tenant.pool, tenant.redis)
    assert (await post(tenant)).new == 2
    await assert_clean(tenant.pool, tenant.redis)
    await deltas.apply_pending(tenant.pool, tenant.redis)
    assert ((await tenant.wallet()).balance, await tenant.spent()) == (925, 75)
    await assert_clean(tenant.pool, tenant.redis)


async def test_more_than_there_is_becomes_a_receivable(tenant: Tenant) -> None:
    await tell_late(tenant, tenant.event(1300))
    await post(tenant)
    await deltas.apply_pending(tenant.pool, tenant.redis)
    assert (await tenant.wallet()).balance == -300
    assert not await Boot(tenant.redis).admit(tenant, 1)
    await assert_clean(tenant.pool, tenant.redis)
    await tenant.give("topup", 500)
    assert (await tenant.wallet()).balance == 200
    assert await Boot(tenant.redis).admit(tenant, 200)
    await assert_clean(tenant.pool, tenant.redis)


async def test_late_usage_of_a_key_that_never_spent_counts_as_its_spend(tenant: Tenant) -> None:
    event = make_event(tenant.id, "key_elsewhere", 25)
    await tell_late(tenant, event)
    await post(tenant)
    await deltas.apply_pending(tenant.pool, tenant.redis)
    assert (await tenant.wallet()).balance == 975
    await assert_clean(tenant.pool, tenant.redis)


async def test_late_usage_that_cannot_be_posted_has_taken_nothing(tenant: Tenant) -> None:
    bad = msgspec.structs.replace(tenant.event(30), request_id="req_1")
    await tell_late(tenant, bad, tenant.event(10))
    await assert_clean(tenant.pool, tenant.redis)
    assert (await post(tenant)).quarantined == 1
    await deltas.apply_pending(tenant.pool, tenant.redis)
    assert (await tenant.wallet()).balance == 990
    assert await tenant.pool.fetchval("select charge_ucr from quarantine") is None
    await assert_clean(tenant.pool, tenant.redis)


async def test_an_exchange_told_anew_and_late_is_charged_the_difference(tenant: Tenant) -> None:
    first = await Boot(tenant.redis).serve(tenant, 30)
    anew = msgspec.structs.replace(first, charge_ucr=50, hold_ucr=50, revision=1, replaces_ucr=30)
    await post(tenant)
    for _ in range(2):
        await tell_late(tenant, anew)
        await assert_clean(tenant.pool, tenant.redis)
        await post(tenant)
        await assert_clean(tenant.pool, tenant.redis)
        await deltas.apply_pending(tenant.pool, tenant.redis)
        assert ((await tenant.wallet()).balance, await tenant.spent()) == (950, 50)
        await assert_clean(tenant.pool, tenant.redis)
