"""Credits taken back: never what is held, never twice, finished by whoever comes next."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from accounting import withdrawals
from accounting.contract.errors import Conflict, NotFound, Unavailable
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import workspace_key
from accounting.grants import Grant
from accounting.withdrawals import Kind, Withdrawal
from tests.accounting.books import assert_clean, post_stream
from tests.accounting.scene import Boot, Tenant, pool_on


async def withdraw(
    tenant: Tenant, grant: Grant, kind: Kind, amount: int | None = None, name: str = "op_1"
) -> Withdrawal:
    return await withdrawals.withdraw(tenant.pool, tenant.redis, name, grant.id, kind, amount)


async def figures(tenant: Tenant) -> tuple[int, int]:
    wallet = await tenant.wallet()
    return wallet.balance, wallet.held


async def payer(tenant: Tenant, kind: str) -> int:
    sql = "select credits_ucr - debits_ucr from ledger_accounts where kind = $1"
    return int(await tenant.pool.fetchval(sql, kind))


async def test_a_refund_takes_what_is_asked_once(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        first = await withdraw(tenant, grant, "refund", 30)
        assert (first.taken_ucr, first.remaining_ucr, first.settled) == (30, 70, True)
        assert await withdraw(tenant, grant, "refund", 30) == first
        assert await figures(tenant) == (70, 0)
        assert (await tenant.grants())[grant.id].refunded_ucr == 30
        assert await payer(tenant, "operator_clearing") == -70
        told = {row[0] for row in await pool.fetch("select type from outbox")}
        assert "grant.refunded" in told
        await assert_clean(pool, redis_client)


async def test_a_refund_of_more_than_is_free_takes_nothing(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        assert await Boot(redis_client).admit(tenant, 60)
        for amount, name in [(41, "op_1"), (101, "op_2")]:
            for _ in range(2):
                with pytest.raises(Conflict, match=r"0\.000001 US dollars left"):
                    await withdraw(tenant, grant, "refund", amount, name)
        assert await figures(tenant) == (100, 60)
        await withdraw(tenant, grant, "refund", 40, "op_3")
        assert await figures(tenant) == (60, 60)
        await assert_clean(pool, redis_client)


async def test_what_is_on_the_stream_is_not_refunded(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        boot = Boot(redis_client)
        await boot.serve(tenant, 70)
        with pytest.raises(Conflict):
            await withdraw(tenant, grant, "refund", 31)
        await withdraw(tenant, grant, "refund", 30, "op_2")
        await assert_clean(pool, redis_client)
        await post_stream(tenant)
        assert (await tenant.grants())[grant.id].remaining_ucr == 0
        assert await figures(tenant) == (0, 0)
        await assert_clean(pool, redis_client)


@pytest.mark.parametrize("kind", ["trial", "promo", "plan"])
async def test_only_what_was_bought_is_refunded(
    database_url: str, redis_client: Redis, kind: str
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give(kind, 100)
        with pytest.raises(Conflict, match="bought"):
            await withdraw(tenant, grant, "refund", 10)
        with pytest.raises(NotFound):
            await withdrawals.withdraw(pool, redis_client, "op", new_id("grant"), "refund", 1)


async def test_a_claw_back_takes_what_is_left_and_nobody_holds(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        soon = datetime.now(UTC) + timedelta(hours=1)
        grant = await tenant.give("promo", 100, soon)
        boot = Boot(redis_client)
        event = tenant.event(15, hold_ucr=60)
        assert await boot.admit(tenant, 60)
        assert (await withdraw(tenant, grant, "clawback")).taken_ucr == 40
        await boot.settle(tenant, event)
        assert (await withdraw(tenant, grant, "clawback", None, "op_2")).taken_ucr == 45
        assert (await withdraw(tenant, grant, "clawback", None, "op_3")).taken_ucr == 0
        assert await figures(tenant) == (0, 0)
        await assert_clean(pool, redis_client)
        await post_stream(tenant)
        found = (await tenant.grants())[grant.id]
        assert (found.consumed_ucr, found.refunded_ucr) == (15, 85)
        assert await payer(tenant, "promo_cost") == -15
        await assert_clean(pool, redis_client)


@pytest.mark.parametrize("where", ["before reserving", "after reserving", "before the delta"])
async def test_what_was_broken_off_is_finished_by_the_loop(
    database_url: str, redis_client: Redis, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def broken(*_: Any) -> Any:
        raise ConnectionResetError

    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        with monkeypatch.context() as patched, pytest.raises(Unavailable):
            name = {"before reserving": "_attempt", "after reserving": "_post"}.get(where)
            if name:
                patched.setattr(withdrawals, name, broken)
            else:
                patched.setattr(withdrawals.deltas, "reached", _fails_at_the_second())
            await withdraw(tenant, grant, "refund", 30)
        await assert_clean(pool, redis_client)
        if where != "before reserving":
            assert not await Boot(redis_client).admit(tenant, 71)
        monkeypatch.setattr(withdrawals, "_ABANDONED_SECONDS", 0.0)
        await withdrawals.finish_abandoned(pool, redis_client)
        done = await withdraw(tenant, grant, "refund", 30)
        assert (done.taken_ucr, await figures(tenant)) == (30, (70, 0))
        await assert_clean(pool, redis_client)


def _fails_at_the_second() -> Any:
    calls = iter([False, True])

    async def reached(*_: Any) -> bool:
        if next(calls):
            raise ConnectionResetError
        return True

    return reached


async def test_a_redis_without_the_wallet_is_waited_for(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        whole = await redis_client.hgetall(workspace_key(tenant.id))
        await redis_client.delete(workspace_key(tenant.id))
        with pytest.raises(Unavailable):
            await withdraw(tenant, grant, "refund", 30)
        await redis_client.hset(workspace_key(tenant.id), mapping=whole)
        assert (await withdraw(tenant, grant, "refund", 30)).taken_ucr == 30


async def test_many_at_once_take_no_more_than_there_is(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url, size=8) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give("topup", 100)
        results = await asyncio.gather(
            *(withdraw(tenant, grant, "refund", 30, f"op_{n}") for n in range(8)),
            return_exceptions=True,
        )
        assert sum(isinstance(one, Withdrawal) for one in results) == 3
        assert all(isinstance(one, Withdrawal | Conflict | Unavailable) for one in results)
        assert await figures(tenant) == (10, 0)
        await assert_clean(pool, redis_client)
