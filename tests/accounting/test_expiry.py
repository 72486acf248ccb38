"""Expiry: to breakage, on time, never what somebody may still need, never below zero."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from accounting import audit, deltas, expiry, usage_posting
from accounting.contract.identifiers import ulid
from accounting.contract.keyspace import EPOCH, stream_key, workspace_key
from accounting.reservations import RESERVE
from accounting.usage_entries import START, StreamId
from accounting.usage_stream import read_range
from tests.accounting.scene import Boot, Tenant, pool_on

LONGEST = 900.0
PAST = datetime.now(UTC) - timedelta(minutes=5)


async def post_everything(tenant: Tenant) -> None:
    entries = await read_range(tenant.redis, tenant.shard, START, StreamId(2**60, 0))
    async with tenant.pool.acquire() as connection:
        await usage_posting.post(connection, entries, datetime.now(UTC).date())
    await tenant.redis.xtrim(stream_key(tenant.shard), maxlen=0, approximate=False)


def started(at: datetime) -> dict[str, Any]:
    return {
        "request_id": "req_" + ulid(int(at.timestamp() * 1000)),
        "started_at_us": int(at.timestamp() * 1_000_000),
    }


async def sweep(tenant: Tenant) -> int:
    return await expiry.sweep(tenant.pool, tenant.redis, LONGEST)


async def assert_clean(tenant: Tenant) -> None:
    await tenant.redis.set(EPOCH, "filled")
    findings = await audit.audit(tenant.pool, tenant.redis, LONGEST)
    assert [finding for finding in findings if finding.drifted] == []


async def test_what_is_left_goes_to_breakage_once(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        expired = await tenant.give("trial", 100, PAST)
        await tenant.give("topup", 40)
        assert [await sweep(tenant) for _ in range(3)] == [100, 0, 0]
        assert (await tenant.grants())[expired.id].forfeited_ucr == 100
        breakage = "select credits_ucr from ledger_accounts where kind = 'breakage'"
        assert await pool.fetchval(breakage) == 100
        wallet = await tenant.wallet()
        assert (wallet.balance, wallet.held, wallet.last_delta) == (40, 0, 3)
        assert await pool.fetchval("select count(*) from grants where swept_at is not null") == 1
        assert "grant.expired" in {row[0] for row in await pool.fetch("select type from outbox")}
        await assert_clean(tenant)


@pytest.mark.parametrize(
    ("seconds", "forfeited"), [(-60, 5), (-1.5, 5), (-0.2, 0), (60, 0), (None, 0)]
)
async def test_it_is_time_a_second_after_the_instant(
    database_url: str, redis_client: Redis, seconds: float | None, forfeited: int
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        at = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        await tenant.give("plan", 5, at)
        assert await sweep(tenant) == forfeited


async def test_open_holds_keep_what_they_may_need(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        expired = await tenant.give("promo", 100, PAST)
        boot = Boot(redis_client)
        assert await boot.admit(tenant, 60)
        assert [await sweep(tenant) for _ in range(2)] == [40, 0]
        assert not await boot.admit(tenant, 1)
        event = tenant.event(25, hold_ucr=60, **started(PAST - timedelta(seconds=9)))
        await boot.settle(tenant, event)
        assert [await sweep(tenant) for _ in range(2)] == [35, 0]  # on the stream, not posted
        await assert_clean(tenant)
        await post_everything(tenant)
        assert await sweep(tenant) == 0
        grant = (await tenant.grants())[expired.id]
        assert (grant.consumed_ucr, grant.forfeited_ucr) == (25, 75)
        assert (await tenant.wallet()).balance == 0
        await assert_clean(tenant)


async def test_charges_from_before_burn_the_expired_grant(
    database_url: str, redis_client: Redis
) -> None:
    """Although it is swept before they are posted."""
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        expired = await tenant.give("trial", 100, PAST)
        kept = await tenant.give("topup", 50)
        boot = Boot(redis_client)
        await boot.serve(tenant, 30, **started(PAST - timedelta(seconds=1)))
        await boot.serve(tenant, 20, **started(PAST))
        assert await sweep(tenant) == 70
        await post_everything(tenant)
        assert await sweep(tenant) == 0
        found = await tenant.grants()
        assert (found[expired.id].consumed_ucr, found[kept.id].consumed_ucr) == (30, 20)
        assert (await tenant.wallet()).balance == 30
        await assert_clean(tenant)


async def test_holds_that_cannot_be_from_before_do_not_delay(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await tenant.give("trial", 10, datetime.now(UTC) - timedelta(seconds=LONGEST + 5))
        await tenant.give("topup", 1000)
        assert await Boot(redis_client).admit(tenant, 700)
        assert await sweep(tenant) == 10
        assert (await tenant.wallet()).held == 700
        await assert_clean(tenant)


async def test_nothing_can_be_admitted_on_what_is_being_forfeited(
    database_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reservation and the delta, which is where a crash may fall."""

    async def crash(*_: Any) -> None:
        raise ConnectionResetError

    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await tenant.give("trial", 100, PAST)
        with monkeypatch.context() as patched, pytest.raises(ConnectionResetError):
            patched.setattr(expiry, "_post", crash)
            await sweep(tenant)
        assert (await tenant.wallet()).held == 100
        await assert_clean(tenant)
        assert not await Boot(redis_client).admit(tenant, 1)
        assert await sweep(tenant) == 100
        wallet = await tenant.wallet()
        assert (wallet.balance, wallet.held) == (0, 0)
        await assert_clean(tenant)


async def test_a_crash_before_the_delta_is_applied_is_made_good(
    database_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await tenant.give("trial", 100, PAST)
        calls = iter([0, 1])

        async def crash_later(*arguments: Any) -> int:
            if next(calls):
                raise ConnectionResetError
            return 0

        with monkeypatch.context() as patched, pytest.raises(ConnectionResetError):
            patched.setattr(deltas, "apply_pending", crash_later)
            await sweep(tenant)
        assert not await Boot(redis_client).admit(tenant, 1)
        await assert_clean(tenant)
        assert await deltas.apply_pending(pool, redis_client) == 1
        wallet = await tenant.wallet()
        assert (wallet.balance, wallet.held) == (0, 0)
        assert await sweep(tenant) == 0
        await assert_clean(tenant)


async def test_a_reservation_without_a_grant_behind_it_is_let_go(
    database_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("trial", 100, PAST)
        await tenant.give("topup", 70)
        boot = Boot(redis_client)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(expiry, "_post", lambda *_: 1 / 0)
            await sweep(tenant)
        await boot.serve(tenant, 70, **started(PAST - timedelta(seconds=1)))
        await post_everything(tenant)
        assert await sweep(tenant) == 30
        await sweep(tenant)
        assert not await redis_client.hexists(workspace_key(tenant.id), f"l:{RESERVE}:{grant.id}")
        assert (await tenant.wallet()).balance == 70
        await assert_clean(tenant)


async def test_a_redis_without_the_wallet_is_waited_for(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await tenant.give("trial", 100, PAST)
        await redis_client.flushall()
        assert await sweep(tenant) == 0


@pytest.mark.parametrize("seed", [7, random.randrange(10**6)])
async def test_sweeping_under_load_never_goes_below_zero(
    database_url: str, redis_client: Redis, seed: int
) -> None:
    """Grants that expire while they are spent: refused or served, but never overdrawn."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with pool_on(database_url, size=6) as pool:
        tenant = await Tenant.make(pool, redis_client)
        for _ in range(8):
            soon = datetime.now(UTC) - timedelta(seconds=chance.uniform(0, 2))
            await tenant.give(chance.choice(["trial", "promo", "plan"]), 2_000, soon)
        await tenant.give("topup", 3_000)
        boots = [Boot(redis_client) for _ in range(3)]
        below: list[Any] = []

        async def spend(boot: Boot, chance: random.Random) -> None:
            for _ in range(60):
                hold = chance.randrange(1, 200)
                if await boot.admit(tenant, hold):
                    charge = chance.randrange(hold + 1)
                    await boot.settle(tenant, tenant.event(charge, hold_ucr=hold))
                wallet = await tenant.wallet()
                if not 0 <= wallet.held <= wallet.balance:
                    below.append(wallet)

        async def sweep_often() -> None:
            for _ in range(15):
                await sweep(tenant)

        await asyncio.gather(*(spend(boot, chance) for boot in boots), sweep_often())
        assert below == []
        await post_everything(tenant)
        assert await _short(pool) == 0
        await assert_clean(tenant)


async def _short(pool: asyncpg.Pool) -> int:
    return int(
        await pool.fetchval("select count(*) from ledger_accounts where kind = 'receivable'")
    )
