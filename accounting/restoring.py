"""Forfeited credits given back within a time of grace: each grant once, as a new one.

What was bought or came with a plan can be restored; trial and promotional credits cannot. The
new grant names the old one as its parent, which makes a second restoration impossible.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis

from accounting import deltas, grants, ledger
from accounting.contract import keyspace
from accounting.contract.errors import AccountSuspended, Conflict, NotFound
from accounting.grants import GrantError, Source
from accounting.ledger import BREAKAGE, RESTORE
from accounting.stores import guarded

GRACE = timedelta(days=30)  # from when it was forfeited
LASTS = timedelta(days=30)  # what came with a plan; what was bought does not expire again
_RESTORABLE = ["plan", "rollover", "topup"]
_SOURCE = Source("restore", BREAKAGE, RESTORE, "grant.restored")


class Restored(Struct, frozen=True):
    """What came back, µcr, and whether it has reached the wallet in Redis yet."""

    restored_ucr: int
    spendable: bool


@guarded
async def restore(pool: asyncpg.Pool, redis: Redis, workspace_id: str, source_ref: str) -> Restored:
    """Restore all that can be; a repetition under the same reference says again what it was.

    Raises NotFound, AccountSuspended, Conflict (the balance would be too large), Unavailable.
    """
    async with pool.acquire() as connection, connection.transaction():
        if not await ledger.lock_wallets(connection, [workspace_id]):
            raise NotFound("There is no such workspace.")
        state = await connection.fetchval(
            "select state from workspaces where id = $1", workspace_id
        )
        restored = await _restored(connection, workspace_id, source_ref)
        if not restored:
            if state != keyspace.ACTIVE:
                raise AccountSuspended
            restored = await _restore(connection, workspace_id, source_ref)
    return Restored(restored, await deltas.reached(pool, redis, workspace_id))


async def _restored(connection: Any, workspace_id: str, source_ref: str) -> int:
    """What this reference restored before."""
    return int(
        await connection.fetchval(
            "select coalesce(sum(amount_ucr), 0)::bigint from grants where workspace_id = $1"
            " and parent_id is not null and starts_with(source_ref, $2)",
            workspace_id,
            f"restore:{source_ref}:",
        )
    )


async def _restore(connection: Any, workspace_id: str, source_ref: str) -> int:
    parents = await connection.fetch(
        "select g.id, g.kind, g.forfeited_ucr from grants g"
        " where g.workspace_id = $1 and g.kind = any($2) and g.forfeited_ucr > 0"
        " and g.swept_at > $3 and not exists (select from grants c where c.parent_id = g.id)"
        " order by g.id",
        workspace_id,
        _RESTORABLE,
        datetime.now(UTC) - GRACE,
    )
    for parent in parents:
        try:
            await grants.add(
                connection,
                workspace_id,
                "restored",
                parent["forfeited_ucr"],
                None if parent["kind"] == "topup" else datetime.now(UTC) + LASTS,
                f"restore:{source_ref}:{parent['id']}",
                _SOURCE,
                parent["id"],
            )
        except GrantError as error:
            raise Conflict(f"The credits cannot be restored: {error}.") from None
    return sum(parent["forfeited_ucr"] for parent in parents)
