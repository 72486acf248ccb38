"""An operator charges a recorded exchange less, or nothing: its credits go back to their grants.

How a difference is posted is `revisions.py`'s part, the way to Redis `deltas.py`'s.
"""

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis

from accounting import deltas, ledger, revisions
from accounting.contract.errors import Conflict, NotFound
from accounting.contract.identifiers import day_of
from accounting.revisions import Revision, Row
from accounting.stores import guarded


class Reversal(Struct, frozen=True):
    """What became of it, µcr: the charge as it is now, what was reversed, what of that could be
    spent again (the rest had expired); and whether that has reached the wallet in Redis yet."""

    request_id: str
    workspace_id: str
    charge_ucr: int
    reversed_ucr: int
    restored_ucr: int
    spendable: bool


@guarded
async def reverse(
    pool: asyncpg.Pool,
    redis: Redis,
    request_id: str,
    charge_ucr: int,
    *,
    source_ref: str,
    reason: str = "",
) -> Reversal:
    """Charge an exchange so much from now on, once per `source_ref`; a repetition shows it again.

    Raises NotFound (also while it has not been posted), Conflict, Unavailable.
    """
    try:
        day = day_of(request_id)
    except ValueError:
        raise NotFound("There is no such request.") from None
    ref = f"operator:{source_ref}"
    async with pool.acquire() as connection, connection.transaction():
        row = await revisions.row_of(connection, day, request_id)
        if row is None:
            raise NotFound("No such request has been recorded.")
        await ledger.lock_wallets(connection, [row.workspace_id])
        done = await _done(connection, ref)
        if done is None:
            row = await revisions.row_of(connection, day, request_id)
            assert row is not None  # rows are never removed while their wallet exists
            done = await _post(connection, row, charge_ucr, ref, reason)
    spendable = await deltas.reached(pool, redis, row.workspace_id)
    reversed_ucr, restored_ucr, now_ucr = done
    return Reversal(request_id, row.workspace_id, now_ucr, reversed_ucr, restored_ucr, spendable)


async def _post(
    connection: asyncpg.Connection, row: Row, charge_ucr: int, ref: str, reason: str
) -> tuple[int, int, int]:
    if charge_ucr >= row.charge_ucr:
        raise Conflict("The request costs no more than that already.")
    difference = charge_ucr - row.charge_ucr
    restored = await revisions.apply(connection, row, Revision(difference, ref, reason))
    return -difference, restored, charge_ucr


async def _done(connection: asyncpg.Connection, ref: str) -> tuple[int, int, int] | None:
    """What was done under this reference before, and what the exchange costs now."""
    found = await connection.fetchrow(
        "select -v.difference_ucr, coalesce(d.amount_ucr, 0), u.charge_ucr"
        " from usage_revisions v join usage_records u using (day, request_id)"
        " left join redis_deltas d on d.journal_id = v.journal_id where v.source_ref = $1",
        ref,
    )
    return tuple(found) if found else None
