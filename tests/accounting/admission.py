"""Admission as workspaces and keys see it: one request through the real script."""

import asyncpg
from redis.asyncio import Redis

from accounting import funding, keys, workspaces
from accounting.contract import keyspace, scripts
from accounting.contract.figures import pack_figures, unpack_figures
from accounting.contract.identifiers import new_id

ADMITTED, REVOKED, SUSPENDED = 0, 1, 2


async def verdict(redis: Redis, workspace_id: str, key_id: str, version: int = 1) -> int | str:
    """What admission says to one request that holds one µcr, from a worker of its own."""
    boot = new_id("boot")
    shard = keyspace.shard_of(workspace_id)
    ask = pack_figures(version, *[0] * 10, 1, 1, 1)
    reply = await scripts.call(
        redis,
        "lease",
        [keyspace.workspace_key(workspace_id), keyspace.leases_key(shard, boot)],
        [boot, key_id, workspace_id, ask],
    )
    return {1: "unknown", 2: "stale"}[reply] if isinstance(reply, int) else unpack_figures(reply)[5]


async def lease_ahead(
    redis: Redis, workspace_id: str, key_id: str, mine: list[int], requests: int
) -> int:
    """What a worker that holds `mine` is given ahead, of requests that hold one µcr each."""
    message = pack_figures(1, *mine, requests, 1, 1)
    keys = [
        keyspace.workspace_key(workspace_id),
        keyspace.leases_key(keyspace.shard_of(workspace_id), "boot_ahead"),
    ]
    words = ["boot_ahead", key_id, workspace_id, message]
    reply = await scripts.call(redis, "lease", keys, words)
    return 0 if isinstance(reply, int) else unpack_figures(reply)[-5]


async def funded(pool: asyncpg.Pool, redis: Redis) -> tuple[str, str]:
    """A workspace with credits, and a key of it."""
    workspace = await workspaces.create(pool, redis, "Acme")
    await give(pool, redis, workspace.id, 1_000_000)
    key = await keys.create(pool, redis, workspace.id, "a key", keys.new_secret())
    return workspace.id, key.id


async def give(pool: asyncpg.Pool, redis: Redis, workspace_id: str, amount_ucr: int) -> None:
    await funding.give(
        pool,
        redis,
        workspace_id,
        kind="promo",
        amount_ucr=amount_ucr,
        expires_at=None,
        source_ref=new_id("test"),
    )
