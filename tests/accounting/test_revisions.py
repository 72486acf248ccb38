"""A charge set right afterwards: the difference alone, to and from where it belongs."""

from datetime import UTC, datetime, timedelta

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import ledger, reversals
from accounting.contract.errors import Conflict, NotFound
from accounting.contract.identifiers import new_id
from accounting.contract.usage_event import TokenUsage, UsageEvent
from accounting.usage_posting import Posted
from tests.accounting.books import assert_clean, entry, post, post_stream, started
from tests.accounting.scene import Boot, Tenant, pool_on

SOON = datetime.now(UTC) + timedelta(hours=1)


def again(event: UsageEvent, charge_ucr: int, **changes: object) -> UsageEvent:
    """The exchange told anew."""
    return msgspec.structs.replace(
        event,
        charge_ucr=charge_ucr,
        hold_ucr=max(event.hold_ucr, charge_ucr),
        revision=event.revision + 1,
        replaces_ucr=event.charge_ucr,
        **changes,
    )


async def remaining(tenant: Tenant) -> list[int]:
    """What is left of the grants, the oldest first."""
    return [grant.remaining_ucr for grant in reversed(list((await tenant.grants()).values()))]


async def expire(tenant: Tenant, grant_id: str) -> None:
    await tenant.pool.execute(
        "update grants set expires_at = now() - interval '1 minute' where id = $1", grant_id
    )


@pytest.mark.parametrize("charges", [(10, 25), (25, 10), (10, 10), (10, 0), (0, 10), (5, 30, 12)])
@pytest.mark.parametrize("together", [True, False])
async def test_an_exchange_told_anew_posts_the_difference(
    database_url: str, redis_client: Redis, charges: tuple[int, ...], together: bool
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        boot = Boot(redis_client)
        event = await boot.serve(tenant, charges[0])
        for charge in charges[1:]:
            if not together:
                await post_stream(tenant)
            event = await boot.tell_again(tenant, again(event, charge))
            await assert_clean(pool, redis_client)
        await post_stream(tenant)
        await assert_clean(pool, redis_client)
        row = await pool.fetchrow("select charge_ucr, revision from usage_records")
        assert tuple(row) == (charges[-1], len(charges) - 1)
        assert await remaining(tenant) == [1000 - charges[-1]]
        assert (await tenant.wallet()).balance == 1000 - charges[-1]
        assert await pool.fetchval("select charge_ucr from usage_hourly") == charges[-1]


async def test_revisions_in_any_order_and_number_end_alike(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        first = tenant.event(10)
        second = again(first, 40)
        third = again(second, 25)
        assert await post(pool, entry(tenant, third)) == Posted(new=1, revised=1)
        assert await post(pool, entry(tenant, first, second)) == Posted(duplicates=2)
        assert await post(pool, entry(tenant, second, third)) == Posted(duplicates=2)
        assert await pool.fetchval("select charge_ucr from usage_records") == 25
        assert await remaining(tenant) == [975]


async def test_how_it_ended_and_its_tokens_are_taken_over(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        boot = Boot(redis_client)
        event = await boot.serve(tenant, 0, status=502, outcome="provider_failed")
        await post_stream(tenant)
        tokens = TokenUsage(7, 5)
        told = again(event, 30, settlement="exact", outcome="completed", status=200, tokens=tokens)
        await boot.tell_again(tenant, told)
        await post_stream(tenant)
        row = await pool.fetchrow(
            "select settlement, outcome, status, input_tokens from usage_records"
        )
        assert tuple(row) == ("exact", "completed", 200, 7)
        row = await pool.fetchrow("select requests, errors, output_tokens from usage_hourly")
        assert tuple(row) == (1, 0, 5)
        await assert_clean(pool, redis_client)


async def test_a_revision_of_another_workspace_is_quarantined(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant, other = [await Tenant.make(pool, redis_client, 1000) for _ in range(2)]
        event = tenant.event(10)
        await post(pool, entry(tenant, event))
        stranger = again(event, 20, workspace_id=other.id)
        assert await post(pool, entry(other, stranger)) == Posted(duplicates=1)
        row = await pool.fetchrow("select workspace_id, charge_ucr, reason from quarantine")
        assert tuple(row) == (other.id, 10, "it revises an exchange of another workspace")
        assert await remaining(tenant) == [990]


async def reverse(
    tenant: Tenant, event: UsageEvent, charge_ucr: int = 0, ref: str = "op_1"
) -> reversals.Reversal:
    return await reversals.reverse(
        tenant.pool, tenant.redis, event.request_id, charge_ucr, source_ref=ref, reason="sorry"
    )


async def test_a_reversal_restores_the_grants_that_paid_last_first(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        for kind in ("trial", "promo", "topup"):
            await tenant.give(kind, 10)
        event = await Boot(redis_client).serve(tenant, 26)
        await post_stream(tenant)
        assert await remaining(tenant) == [0, 0, 4]
        for charge, left in [(22, [0, 0, 8]), (15, [0, 5, 10]), (4, [6, 10, 10]), (0, [10] * 3)]:
            done = await reverse(tenant, event, charge, f"op_{charge}")
            assert (done.charge_ucr, done.spendable) == (charge, True)
            assert await remaining(tenant) == left
            assert (await tenant.wallet()).balance == sum(left)
            await assert_clean(pool, redis_client)
        types = {row[0] for row in await pool.fetch("select type from outbox")}
        assert "usage.reversed" in types


async def test_a_reversal_is_done_once_and_shown_again(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        event = await Boot(redis_client).serve(tenant, 30)
        await post_stream(tenant)
        first = await reverse(tenant, event, 10)
        assert await reverse(tenant, event, 10) == first
        assert (first.reversed_ucr, first.restored_ucr) == (20, 20)
        with pytest.raises(Conflict):
            await reverse(tenant, event, 10, "op_2")
        with pytest.raises(NotFound):
            await reverse(tenant, tenant.event(1))
        with pytest.raises(NotFound):
            await reversals.reverse(pool, redis_client, "req_none", 0, source_ref="op_3")
        await assert_clean(pool, redis_client)


async def test_what_had_expired_meanwhile_is_forfeited_again(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        trial = await tenant.give("trial", 10, SOON)
        await tenant.give("topup", 10)
        event = await Boot(redis_client).serve(tenant, 15)
        await post_stream(tenant)
        await expire(tenant, trial.id)
        done = await reverse(tenant, event)
        assert (done.reversed_ucr, done.restored_ucr) == (15, 5)
        grant = (await tenant.grants())[trial.id]
        assert (grant.consumed_ucr, grant.forfeited_ucr) == (0, 10)
        assert (await tenant.wallet()).balance == 10
        await assert_clean(pool, redis_client)


async def test_what_was_beyond_the_wallet_goes_first_repaid_or_not(
    database_url: str, redis_client: Redis
) -> None:
    """Used 25 of 10: 15 owed, of which 8 are repaid; then all of it is reversed."""
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 10)
        event = tenant.event(25)
        await post(pool, entry(tenant, event))
        await tenant.give("promo", 8)
        assert await ledger.receivable_ucr(pool, tenant.id) == 7
        await reverse(tenant, event, 20, "op_1")
        assert await ledger.receivable_ucr(pool, tenant.id) == 2
        await reverse(tenant, event, 4, "op_2")
        assert await ledger.receivable_ucr(pool, tenant.id) == 0
        assert await remaining(tenant) == [6, 8]
        await reverse(tenant, event, 0, "op_3")
        assert await remaining(tenant) == [10, 8]


async def test_a_key_may_spend_again_what_was_reversed(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        event = await Boot(redis_client).serve(tenant, 30)
        await post_stream(tenant)
        await reverse(tenant, event, 12)
        assert await tenant.spent() == 12
        await assert_clean(pool, redis_client)


async def test_the_stream_revises_what_an_operator_has_reversed(
    database_url: str, redis_client: Redis
) -> None:
    """What workers tell and what operators give back are two things."""
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        boot = Boot(redis_client)
        event = await boot.serve(tenant, 30)
        await post_stream(tenant)
        await reverse(tenant, event, 10)
        event = await boot.tell_again(tenant, again(event, 35))
        await assert_clean(pool, redis_client)
        await post_stream(tenant)
        assert await charge_of(pool, event) == 15
        event = await boot.tell_again(tenant, again(event, 0))
        await post_stream(tenant)
        assert await charge_of(pool, event) == 0
        assert (await tenant.wallet()).balance == 100
        await assert_clean(pool, redis_client)
        await boot.tell_again(tenant, again(event, 40))
        await post_stream(tenant)
        assert await charge_of(pool, event) == 40
        await assert_clean(pool, redis_client)


async def charge_of(pool: asyncpg.Pool, event: UsageEvent) -> int:
    sql = "select charge_ucr from usage_records where request_id = $1"
    return int(await pool.fetchval(sql, event.request_id))


async def test_an_old_request_is_found_by_its_id(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        event = tenant.event(30, **started(datetime.now(UTC) - timedelta(days=20)))
        await post(pool, entry(tenant, event))
        assert (await reverse(tenant, event, 5, new_id("op"))).reversed_ucr == 25
        assert await remaining(tenant) == [95]
