"""Forfeited credits come back once, within their time, and only what may."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis

from accounting import expiry, restoring, workspaces
from accounting.contract.errors import AccountSuspended, NotFound
from accounting.contract.identifiers import new_id
from accounting.grants import Grant
from tests.accounting.books import LONGEST, assert_clean, entry, post, post_stream, started
from tests.accounting.scene import Boot, Tenant, pool_on

PAST = datetime.now(UTC) - timedelta(minutes=5)


async def restore(tenant: Tenant, ref: str = "op_1") -> int:
    done = await restoring.restore(tenant.pool, tenant.redis, tenant.id, ref)
    assert done.spendable
    return done.restored_ucr


async def forfeited(tenant: Tenant, *grants: tuple[str, int]) -> list[Grant]:
    made = [await tenant.give(kind, amount, PAST) for kind, amount in grants]
    while await expiry.sweep(tenant.pool, tenant.redis, LONGEST):
        pass
    return made


async def test_what_was_forfeited_comes_back_as_new_grants_once(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, ("plan", 40), ("rollover", 30), ("topup", 20))
        assert (await tenant.wallet()).balance == 0
        assert await restore(tenant) == 90
        assert (await tenant.wallet()).balance == 90
        restored = [one for one in (await tenant.grants()).values() if one.kind == "restored"]
        assert sorted((one.amount_ucr, one.expires_at is None) for one in restored) == [
            (20, True), (30, False), (40, False),
        ]  # fmt: skip
        breakage = "select credits_ucr - debits_ucr from ledger_accounts where kind = 'breakage'"
        assert await pool.fetchval(breakage) == 0
        await assert_clean(pool, redis_client)
        assert await restore(tenant) == 90  # the same call again
        assert await restore(tenant, "op_2") == 0  # another one
        assert (await tenant.wallet()).balance == 90
        await assert_clean(pool, redis_client)


async def test_only_the_part_that_was_forfeited_comes_back(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await tenant.give("plan", 40, PAST)
        before = started(PAST - timedelta(seconds=9))
        await Boot(redis_client).serve(tenant, 15, **before)
        await post_stream(tenant)
        await forfeited(tenant)
        assert await restore(tenant) == 25
        assert (await tenant.wallet()).balance == 25
        await assert_clean(pool, redis_client)


@pytest.mark.parametrize("kind", ["trial", "promo"])
async def test_what_was_a_present_does_not_come_back(
    database_url: str, redis_client: Redis, kind: str
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, (kind, 40))
        assert await restore(tenant) == 0


async def test_after_the_time_of_grace_nothing_comes_back(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, ("plan", 40))
        await pool.execute("update grants set swept_at = now() - interval '31 days'")
        assert await restore(tenant) == 0


async def test_many_at_once_restore_once(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url, size=8) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, ("plan", 40), ("topup", 20))
        found = await asyncio.gather(*(restore(tenant, f"op_{n}") for n in range(6)))
        assert sorted(found) == [0, 0, 0, 0, 0, 60]
        assert (await tenant.wallet()).balance == 60


async def test_what_was_used_beyond_the_wallet_is_repaid_first(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, ("topup", 50))
        await post(pool, entry(tenant, tenant.event(20)))
        assert await restore(tenant) == 50
        [restored] = [one for one in (await tenant.grants()).values() if one.kind == "restored"]
        assert restored.remaining_ucr == 30


async def test_a_suspended_workspace_is_refused(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await forfeited(tenant, ("plan", 40))
        await workspaces.suspend(pool, redis_client, tenant.id)
        with pytest.raises(AccountSuspended):
            await restore(tenant)
        tenant.id = new_id("ws")
        with pytest.raises(NotFound):
            await restore(tenant)
