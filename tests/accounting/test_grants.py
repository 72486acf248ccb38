"""Grants: issued once per reason, balanced in the ledger, carried to Redis exactly once."""

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from redis.asyncio import Redis

from accounting import deltas, grants, ledger
from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from accounting.contract.money import MAX_UCR
from accounting.grants import GrantError, SourceConflictError, UnknownWorkspaceError
from accounting.ledger import BEYOND_WALLET, Journal, Transfer
from tests.accounting.scene import Tenant, pool_on

LATER = datetime(2100, 1, 1, tzinfo=UTC)


async def issue(tenant: Tenant, *arguments: object) -> grants.Grant:
    async with tenant.pool.acquire() as connection, connection.transaction():
        return await grants.issue(connection, tenant.id, *arguments)


async def balances(connection: asyncpg.Pool) -> dict[str, int]:
    rows = await connection.fetch(
        "select kind, sum(credits_ucr - debits_ucr)::bigint from ledger_accounts group by 1"
    )
    return {kind: amount for kind, amount in rows if amount}


@pytest.mark.parametrize(
    ("kind", "payer"),
    [
        ("trial", "promo_cost"),
        ("promo", "promo_cost"),
        ("plan", "plan_credit_cost"),
        ("rollover", "plan_credit_cost"),
        ("topup", "operator_clearing"),
    ],
)
async def test_each_kind_is_paid_by_its_account(
    database_url: str, redis_client: Redis, kind: str, payer: str
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        grant = await tenant.give(kind, 500, LATER)
        assert (grant.kind, grant.amount_ucr, grant.remaining_ucr) == (kind, 500, 500)
        assert await balances(pool) == {f"wallet_{kind}": 500, payer: -500}
        assert await tenant.wallet() == keyspace.Wallet(500, 0, keyspace.ACTIVE, 1)
        assert await pool.fetchval("select type from outbox") == "grant.issued"


async def test_a_repeated_source_is_one_grant(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        first = await issue(tenant, "topup", 500, None, "order 1")
        again = await asyncio.gather(
            *(issue(tenant, "topup", 500, None, "order 1") for _ in range(4))
        )
        assert {grant.id for grant in again} == {first.id}
        assert await pool.fetchval("select count(*) from journals") == 1
        with pytest.raises(SourceConflictError):
            await issue(tenant, "topup", 501, None, "order 1")


async def test_a_rolled_back_grant_leaves_nothing(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        with pytest.raises(ZeroDivisionError):
            async with pool.acquire() as connection, connection.transaction():
                await grants.issue(connection, tenant.id, "topup", 5, None, "order 1")
                raise ZeroDivisionError
        assert await deltas.apply_pending(pool, redis_client) == 0
        assert await tenant.grants() == {}
        assert (await tenant.give("topup", 7)).amount_ucr == 7
        assert (await tenant.wallet()).last_delta == 1


async def test_what_cannot_be_issued_is_refused(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        for kind, amount in [("gift", 5), ("restored", 5), ("topup", 0), ("topup", MAX_UCR + 1)]:
            with pytest.raises(GrantError):
                await issue(tenant, kind, amount, None, "ref")
        await issue(tenant, "topup", MAX_UCR, None, "all")
        with pytest.raises(GrantError, match="more than a wallet can hold"):
            await issue(tenant, "trial", 1, None, "too much")
        tenant.id = new_id("ws")
        with pytest.raises(UnknownWorkspaceError):
            await issue(tenant, "topup", 5, None, "ref")


async def test_funding_repays_what_was_used_beyond_the_wallet(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        async with pool.acquire() as connection, connection.transaction():
            await ledger.lock_wallets(connection, [tenant.id])
            short = Transfer("receivable", "usage_revenue", 30, None, BEYOND_WALLET)
            await ledger.post(connection, [Journal("usage", tenant.id, "u", [short], 1_000)])
        small = await tenant.give("topup", 10)
        assert small.remaining_ucr == 0
        large = await tenant.give("topup", 100)
        assert large.remaining_ucr == 80
        assert await balances(pool) == {
            "operator_clearing": -110,
            "usage_revenue": 30,
            "wallet_topup": 80,
        }


async def test_deltas_reach_redis_in_order_and_once(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        for n in range(1, 6):
            await issue(tenant, "topup", n, None, f"order {n}")
        found = await asyncio.gather(
            *(deltas.apply_pending(pool, redis_client, tenant.id) for _ in range(4))
        )
        assert sum(found) == 5
        assert await tenant.wallet() == keyspace.Wallet(15, 0, keyspace.ACTIVE, 5)
        assert (
            await pool.fetchval("select count(*) from redis_deltas where applied_at is null") == 0
        )


async def test_deltas_that_redis_lost_are_sent_again(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        key = keyspace.workspace_key(tenant.id)
        before = await redis_client.hget(key, "w")
        await tenant.give("promo", 20)
        await redis_client.hset(key, "w", before)  # rolled back by a second
        await tenant.give("promo", 3)
        assert await tenant.wallet() == keyspace.Wallet(123, 0, keyspace.ACTIVE, 3)


async def test_a_wallet_unknown_to_redis_is_opened(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        await redis_client.flushall()
        await issue(tenant, "topup", 50, None, "order")
        assert await deltas.apply_pending(pool, redis_client) == 0  # rebuilding comes first
        await redis_client.set(keyspace.EPOCH, "here")
        assert await deltas.apply_pending(pool, redis_client) == 1
        assert (await tenant.wallet()).balance == 50


async def test_a_lost_wallet_that_was_used_is_not_guessed(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant, other = await Tenant.make(pool, redis_client), await Tenant.make(pool, redis_client)
        await pool.execute(
            "insert into journals (kind, workspace_id, dedupe_key) values ('usage', $1, 'x')",
            tenant.id,
        )
        await redis_client.delete(keyspace.workspace_key(tenant.id))
        await redis_client.set(keyspace.EPOCH, "here")
        await issue(tenant, "topup", 50, None, "order")
        await issue(other, "topup", 60, None, "other order")
        with pytest.raises(deltas.WalletLostError, match=tenant.id):
            await deltas.apply_pending(pool, redis_client)
        assert (await other.wallet()).balance == 60


async def test_grants_are_listed_newest_first(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        one = await tenant.give("trial", 5, LATER)
        two = await tenant.give("topup", 6, LATER + timedelta(days=1))
        assert await grants.list_all(pool, tenant.id) == [two, one]
