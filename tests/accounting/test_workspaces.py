"""Workspaces on real stores: what admission sees of them, and what an outage leaves behind."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import deltas, funding, keys, workspaces
from accounting.contract import keyspace
from accounting.contract.errors import NotFound, Unavailable
from accounting.contract.identifiers import new_id
from accounting.workspaces import Balance
from tests.accounting.admission import ADMITTED, SUSPENDED, funded, give, verdict
from tests.accounting.scene import pool_on


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with pool_on(database_url, 8) as pool:
        yield pool


@pytest.fixture
async def redis(redis_client: Redis) -> Redis:
    await redis_client.set(keyspace.EPOCH, "1")
    return redis_client


async def test_a_new_workspace_is_known_to_both_stores(pool: asyncpg.Pool, redis: Redis) -> None:
    made = await workspaces.create(pool, redis, "Acme", "a@acme.example")
    assert await workspaces.get(pool, made.id) == made
    assert (made.name, made.email, made.status) == ("Acme", "a@acme.example", "active")
    assert (made.kind, made.tier) == ("organization", "standard")
    assert await workspaces.balance(redis, made.id) == Balance(0, 0)


async def test_creating_twice_under_one_id_makes_one(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id = new_id("ws")
    first, second = await asyncio.gather(
        workspaces.create(pool, redis, "Acme", workspace_id=workspace_id),
        workspaces.create(pool, redis, "Acme", workspace_id=workspace_id),
    )
    assert first == second
    assert await pool.fetchval("select count(*) from workspaces") == 1


async def test_a_suspension_bites_on_the_next_request(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, key_id = await funded(pool, redis)
    assert await verdict(redis, workspace_id, key_id) == ADMITTED
    assert (await workspaces.suspend(pool, redis, workspace_id)).status == "suspended"
    assert await verdict(redis, workspace_id, key_id) == SUSPENDED
    assert (await workspaces.resume(pool, redis, workspace_id)).status == "active"
    assert await verdict(redis, workspace_id, key_id) == ADMITTED


async def test_a_suspension_keeps_balance_and_holds(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, key_id = await funded(pool, redis)
    assert await verdict(redis, workspace_id, key_id) == ADMITTED
    await workspaces.suspend(pool, redis, workspace_id)
    assert await workspaces.balance(redis, workspace_id) == Balance(1_000_000, 1)
    assert Balance(1_000_000, 1).available_ucr == 999_999


async def test_racing_changes_leave_both_stores_agreeing(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, _ = await funded(pool, redis)
    for _ in range(20):
        await asyncio.gather(
            workspaces.suspend(pool, redis, workspace_id),
            workspaces.resume(pool, redis, workspace_id),
            workspaces.suspend(pool, redis, workspace_id),
        )
        state = (await workspaces.get(pool, workspace_id)).state
        assert await wallet_state(redis, workspace_id) == state


async def wallet_state(redis: Redis, workspace_id: str) -> int:
    packed: Any = await redis.hget(keyspace.workspace_key(workspace_id), "w")
    return msgspec.msgpack.decode(packed, type=keyspace.Wallet).state


async def test_an_unknown_workspace_is_not_found(pool: asyncpg.Pool, redis: Redis) -> None:
    unknown = new_id("ws")
    for attempt in (
        workspaces.get(pool, unknown),
        workspaces.suspend(pool, redis, unknown),
        workspaces.publish(pool, redis, unknown),
        keys.create(pool, redis, unknown, "a key", keys.new_secret()),
        give(pool, redis, unknown, 1),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert not await redis.exists(keyspace.workspace_key(unknown))


async def test_no_balance_is_shown_before_redis_is_filled(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, _ = await funded(pool, redis)
    await redis.delete(keyspace.EPOCH)
    with pytest.raises(Unavailable):
        await workspaces.balance(redis, workspace_id)


async def test_a_lost_wallet_is_never_replaced_by_an_empty_one(
    pool: asyncpg.Pool, redis: Redis
) -> None:
    """Else the deltas would fill it with all that was ever granted, used or not."""
    workspace_id, _ = await funded(pool, redis)
    await redis.delete(keyspace.workspace_key(workspace_id))
    for attempt in (
        workspaces.suspend(pool, redis, workspace_id),
        workspaces.publish(pool, redis, workspace_id),
        give(pool, redis, workspace_id, 1),
    ):
        with pytest.raises(Unavailable) as refused:
            await attempt
        assert refused.value.retry_after_seconds == 1
    assert await redis.hget(keyspace.workspace_key(workspace_id), "w") is None
    assert (await workspaces.get(pool, workspace_id)).status == "suspended"
    assert await pool.fetchval("select count(*) from grants") == 1


async def test_a_grant_once_per_source(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    given = await asyncio.gather(
        *(
            funding.give(
                pool,
                redis,
                workspace.id,
                kind="promo",
                amount_ucr=7,
                expires_at=None,
                source_ref="once",
            )
            for _ in range(4)
        )
    )
    assert len({one.grant.id for one in given}) == 1
    assert await workspaces.balance(redis, workspace.id) == Balance(7, 0)


async def test_a_grant_that_cannot_reach_redis_arrives_later(
    pool: asyncpg.Pool, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")

    async def fails(*_: object) -> int:
        raise ConnectionResetError

    with monkeypatch.context() as broken:
        broken.setattr(deltas, "apply_pending", fails)
        given = await funding.give(
            pool,
            redis,
            workspace.id,
            kind="promo",
            amount_ucr=7,
            expires_at=None,
            source_ref="once",
        )
    assert not given.spendable
    assert await deltas.apply_pending(pool, redis) == 1
    assert await workspaces.balance(redis, workspace.id) == Balance(7, 0)
