"""What is left of a workspace's trial credits, as the ledger has it.

Reads grants; issuing, burning and expiring them is `grants.py`'s part.
"""

from datetime import datetime

import asyncpg
from msgspec import Struct

from accounting.stores import guarded


class Trial(Struct, frozen=True):
    """Spendable trial credits (µcr), and when the first of them expire (None: never)."""

    remaining_ucr: int
    expires_at: datetime | None


@guarded
async def remaining(pool: asyncpg.Pool, workspace_id: str) -> Trial:
    """Raises Unavailable."""
    row = await pool.fetchrow(
        "select coalesce(sum(amount_ucr - consumed_ucr - forfeited_ucr - refunded_ucr), 0)::bigint,"
        " min(expires_at) from grants where workspace_id = $1 and kind = 'trial'"
        " and consumed_ucr + forfeited_ucr + refunded_ucr < amount_ucr"
        " and (expires_at is null or expires_at > now())",
        workspace_id,
    )
    return Trial(*row)
