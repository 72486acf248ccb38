"""Credits given by hand: granted in the ledger first, then brought to the wallet in Redis.

What a grant is and how it is posted is `grants.py`'s part, the way to Redis `deltas.py`'s.
"""

from datetime import datetime

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis

from accounting import deltas, grants, workspaces
from accounting.contract.errors import Conflict, NotFound
from accounting.contract.money import UCR_PER_USD
from accounting.grants import Grant, GrantError, UnknownWorkspaceError
from accounting.stores import guarded

LARGEST_UCR = 1_000_000 * UCR_PER_USD  # of one grant


class Given(Struct, frozen=True):
    """A grant, and whether it has reached the wallet in Redis yet."""

    grant: Grant
    spendable: bool


@guarded
async def give(
    pool: asyncpg.Pool,
    redis: Redis,
    workspace_id: str,
    *,
    kind: str,
    amount_ucr: int,
    expires_at: datetime | None,
    source_ref: str,
) -> Given:
    """Grant credits, once per `source_ref`; a repetition returns the same grant as it is now.

    Redis is asked first whether it is there; if it fails after the grant, the credits arrive
    later by themselves. Raises NotFound, Conflict, Unavailable.
    """
    await workspaces.publish(pool, redis, workspace_id)
    try:
        async with pool.acquire() as connection, connection.transaction():
            grant = await grants.issue(
                connection, workspace_id, kind, amount_ucr, expires_at, source_ref
            )
    except UnknownWorkspaceError:
        raise NotFound("There is no such workspace.") from None
    except GrantError as error:
        raise Conflict(f"The grant cannot be made: {error}.") from None
    return Given(grant, await deltas.reached(pool, redis, workspace_id))
