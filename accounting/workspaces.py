"""Workspaces: made, read, suspended, resumed, and published to Redis.

Owns the table `workspaces` and the state in field `w` of a workspace in Redis. Money enters
a wallet through grants and deltas only; keys are in `keys.py`.

Theory of operation. Postgres is the authority, and changes first. `publish` then copies the
state to Redis while it holds the row's lock, so of two racing changes the later commit is
also the later copy. A copy that failed raises `Unavailable`: the caller repeats its call,
which changes nothing in Postgres and publishes again.
"""

import asyncio
from datetime import datetime

import asyncpg
import msgspec
from msgspec import Struct
from redis.asyncio import Redis

from accounting.contract import keyspace, scripts
from accounting.contract.errors import NotFound, Unavailable
from accounting.contract.identifiers import new_id
from accounting.recall import recall
from accounting.stores import guarded

_COLUMNS = "id, name, email, kind, tier, state, created_at"
_FUNDED = "select exists (select from redis_deltas where workspace_id = $1)"
_LOST = "Balances are being restored."
_wallet_decoder = msgspec.msgpack.Decoder(keyspace.Wallet)


class Workspace(Struct, frozen=True):
    """A workspace as Postgres has it; `state` is `keyspace.ACTIVE` or `keyspace.SUSPENDED`."""

    id: str
    name: str
    email: str | None
    kind: str
    tier: str
    state: int
    created_at: datetime

    @property
    def status(self) -> str:
        return "active" if self.state == keyspace.ACTIVE else "suspended"


class Balance(Struct, frozen=True):
    """A wallet at one instant, in µcr: what is settled, and what open requests hold of it."""

    settled_ucr: int
    held_ucr: int

    @property
    def available_ucr(self) -> int:
        return self.settled_ucr - self.held_ucr


@guarded
async def create(
    pool: asyncpg.Pool,
    redis: Redis,
    name: str,
    email: str | None = None,
    *,
    workspace_id: str | None = None,
) -> Workspace:
    """A new, active workspace with an empty wallet.

    With `workspace_id` a repeated call makes the workspace once. Raises Unavailable.
    """
    workspace_id = workspace_id or new_id("ws")
    await pool.execute(
        "insert into workspaces (id, name, email) values ($1, $2, $3) on conflict (id) do nothing",
        workspace_id,
        name,
        email,
    )
    return await publish(pool, redis, workspace_id)


@guarded
async def get(pool: asyncpg.Pool, workspace_id: str) -> Workspace:
    """Raises NotFound, Unavailable."""
    return _workspace(
        await pool.fetchrow(f"select {_COLUMNS} from workspaces where id = $1", workspace_id)  # noqa: S608
    )


@guarded
async def balance(redis: Redis, workspace_id: str) -> Balance:
    """The wallet in Redis, which is ahead of the ledger by what has just been settled.

    Raises Unavailable when Redis is down, or has not been filled since it lost its data.
    """
    packed, filled = await asyncio.gather(
        redis.hget(keyspace.workspace_key(workspace_id), "w"), redis.exists(keyspace.EPOCH)
    )
    if packed is None or not filled:
        raise Unavailable(_LOST)
    assert isinstance(packed, bytes)  # the client does not decode
    wallet = _wallet_decoder.decode(packed)
    return Balance(wallet.balance, wallet.held)


@guarded
async def suspend(pool: asyncpg.Pool, redis: Redis, workspace_id: str) -> Workspace:
    """From the return on, every request of its keys is refused. Raises NotFound, Unavailable."""
    return await _set_state(pool, redis, workspace_id, keyspace.SUSPENDED)


@guarded
async def resume(pool: asyncpg.Pool, redis: Redis, workspace_id: str) -> Workspace:
    """The opposite of `suspend`. Raises NotFound, Unavailable."""
    return await _set_state(pool, redis, workspace_id, keyspace.ACTIVE)


async def _set_state(pool: asyncpg.Pool, redis: Redis, workspace_id: str, state: int) -> Workspace:
    await pool.execute("update workspaces set state = $2 where id = $1", workspace_id, state)
    return await publish(pool, redis, workspace_id)


@guarded
async def publish(pool: asyncpg.Pool, redis: Redis, workspace_id: str) -> Workspace:
    """Copy the state to Redis, any number of times; a workspace new there gets its wallet.

    A wallet that has had money and is not there was lost, and only a rebuild can tell its
    balance: an empty one in its place would be filled with all that was ever granted. Raises
    NotFound, Unavailable.
    """
    async with pool.acquire() as connection, connection.transaction():
        workspace = _workspace(
            await connection.fetchrow(
                f"select {_COLUMNS} from workspaces where id = $1 for no key update",  # noqa: S608
                workspace_id,
            )
        )
        key = keyspace.workspace_key(workspace_id)
        if not await redis.hexists(key, "w") and await connection.fetchval(_FUNDED, workspace_id):
            raise Unavailable(_LOST)
        await scripts.call(redis, "put_workspace", [key], [workspace.state])
        await recall(redis, workspace_id)
    return workspace


def _workspace(row: asyncpg.Record | None) -> Workspace:
    if row is None:
        raise NotFound("There is no such workspace.")
    return Workspace(*row)
