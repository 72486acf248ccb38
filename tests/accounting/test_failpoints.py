"""Killed between every two statements, and done again: nothing lost, nothing twice.

After each kill both stores must already agree to the micro-credit, before anything is repaired.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import (
    deltas,
    expiry,
    funding,
    restoring,
    reversals,
    usage_posting,
    withdrawals,
)
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import EPOCH, stream_key
from tests.accounting.books import (
    LONGEST,
    assert_agree,
    assert_clean,
    on_stream,
    post_stream,
    started,
)
from tests.accounting.failpoints import (
    SEEN,
    Failpoints,
    FaultyConnection,
    every_point,
    faulty,
)
from tests.accounting.scene import Boot, Tenant, pool_on

PAST = datetime.now(UTC) - timedelta(minutes=5)

Act = Callable[[Any, Any], Awaitable[Any]]
Prepared = tuple[Act, Tenant, tuple[int, int]]  # what is done, to whom, and (balance, breakage)


async def test_a_batch_killed_at_every_point_is_posted_once(
    database_url: str, redis_client: Redis
) -> None:
    """New and void, told anew for more and for less, known before, and unfit: all in one."""
    async with pool_on(database_url) as pool:

        async def attempt(points: Failpoints) -> None:
            tenant = await _busy_tenant(pool, redis_client)
            entries, today = await on_stream(tenant), datetime.now(UTC).date()
            with suppress(*SEEN):
                async with pool.acquire() as connection:
                    await usage_posting.post(FaultyConnection(points, connection), entries, today)
            await assert_agree(tenant)
            for _ in range(2):
                await post_stream(tenant)
            await assert_agree(tenant)
            assert await _figures(pool, tenant) == (4, 6 + 0 + 25 + 3)
            await redis_client.delete(stream_key(tenant.shard))

        assert await every_point(attempt) > 30
        await assert_clean(pool, redis_client)


async def _busy_tenant(pool: asyncpg.Pool, redis: Redis) -> Tenant:
    tenant = await Tenant.make(pool, redis, 1000)
    boot = Boot(redis)
    await boot.serve(tenant, 6)
    await post_stream(tenant)
    await boot.serve(tenant, 0, status=502)
    for first, then in [(10, 25), (9, 3)]:
        event = await boot.serve(tenant, first)
        told = msgspec.structs.replace(
            event, charge_ucr=then, hold_ucr=99, revision=1, replaces_ucr=first
        )
        await boot.tell_again(tenant, told)
    await redis.xadd(stream_key(tenant.shard), {"e": b"garbage"})
    return tenant


async def _figures(pool: asyncpg.Pool, tenant: Tenant) -> tuple[int, int]:
    sql = "select count(*), sum(charge_ucr)::bigint from usage_records where workspace_id = $1"
    rows, charged = await pool.fetchrow(sql, tenant.id)
    wallet = await tenant.wallet()
    assert (wallet.balance, wallet.held) == (1000 - charged, 0)
    return rows, charged


async def _giving(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant, ref = await Tenant.make(pool, redis), new_id("op")

    async def act(pool: Any, redis: Any) -> None:
        await funding.give(
            pool, redis, tenant.id, kind="topup", amount_ucr=70, expires_at=None, source_ref=ref
        )

    return act, tenant, (70, 0)


async def _sweeping(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant = await Tenant.make(pool, redis)
    await tenant.give("trial", 100, PAST)
    await tenant.give("topup", 50)
    await Boot(redis).serve(tenant, 30, **started(PAST - timedelta(seconds=1)))

    async def act(pool: Any, redis: Any) -> None:
        await expiry.sweep(pool, redis, LONGEST)

    return act, tenant, (50, 70)


async def _refunding(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant, name = await Tenant.make(pool, redis), new_id("op")
    grant = await tenant.give("topup", 100)

    async def act(pool: Any, redis: Any) -> None:
        await withdrawals.withdraw(pool, redis, name, grant.id, "refund", 40)

    return act, tenant, (60, 0)


async def _clawing_back(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant, name = await Tenant.make(pool, redis), new_id("op")
    grant = await tenant.give("promo", 100)
    assert await Boot(redis).admit(tenant, 30)

    async def act(pool: Any, redis: Any) -> None:
        await withdrawals.withdraw(pool, redis, name, grant.id, "clawback")

    return act, tenant, (30, 0)


async def _reversing(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant, ref = await Tenant.make(pool, redis), new_id("op")
    trial = await tenant.give("trial", 10)
    await tenant.give("topup", 100)
    event = await Boot(redis).serve(tenant, 60)
    await post_stream(tenant)
    await pool.execute(
        "update grants set expires_at = $2, swept_at = now() where id = $1", trial.id, PAST
    )

    async def act(pool: Any, redis: Any) -> None:
        await reversals.reverse(pool, redis, event.request_id, 5, source_ref=ref)

    return act, tenant, (100, 5)


async def _restoring(pool: asyncpg.Pool, redis: Redis) -> Prepared:
    tenant, ref = await Tenant.make(pool, redis), new_id("op")
    await tenant.give("plan", 100, PAST)
    await tenant.give("trial", 30, PAST)
    while await expiry.sweep(pool, redis, LONGEST):
        pass
    await expiry.sweep(pool, redis, LONGEST)

    async def act(pool: Any, redis: Any) -> None:
        await restoring.restore(pool, redis, tenant.id, ref)

    return act, tenant, (100, 30)


@pytest.mark.parametrize(
    "prepare", [_giving, _sweeping, _refunding, _clawing_back, _reversing, _restoring]
)
async def test_moving_money_killed_at_every_point_is_done_once(
    database_url: str, redis_client: Redis, prepare: Callable[..., Awaitable[Prepared]]
) -> None:
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")

        async def attempt(points: Failpoints) -> None:
            act, tenant, expected = await prepare(pool, redis_client)
            with suppress(*SEEN):
                await act(*faulty(points, pool, redis_client))
            await assert_agree(tenant)
            for _ in range(2):
                await act(pool, redis_client)
            await deltas.apply_pending(pool, redis_client)
            await post_stream(tenant)
            await assert_agree(tenant)
            assert ((await tenant.wallet()).balance, await _breakage(pool, tenant)) == expected
            await redis_client.delete(stream_key(tenant.shard))

        assert await every_point(attempt) > 15
        await assert_clean(pool, redis_client)


async def _breakage(pool: asyncpg.Pool, tenant: Tenant) -> int:
    sql = (
        "select coalesce(sum(case code when 20 then t.amount_ucr else -t.amount_ucr end), 0)"
        " from transfers t join grants g on g.id = t.grant_id"
        " where g.workspace_id = $1 and code in (20, 21)"
    )
    return int(await pool.fetchval(sql, tenant.id))
