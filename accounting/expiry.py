"""Grants past their expiry: what is left of them goes to breakage, as soon as nothing needs it.

A grant pays for exchanges admitted before it expired, so what those may still need stays: the
charges on the stream that are not posted, and, until no exchange from before can be open any
more, all that is held. The rest is forfeited at once, the remainder on a later sweep.

Theory of operation. Credits are taken from Redis before the ledger gives them up: a script
moves what is free of them into a reservation (`reservations.py`), so nothing admitted
afterwards can count on them. Then the ledger posts exactly what was reserved,
and the step that applies the delta ends the reservation. Whatever fails in between, the next
sweep sets the reservation to what it should be, until one finds nothing left and marks the
grant as swept. So no wallet goes below zero, and no reservation outlives its grant.
"""

import time
from datetime import UTC, datetime
from typing import Any

from redis.asyncio import Redis

from accounting import deltas, ledger, outbox, reckoning, usage_entries, usage_records
from accounting.contract import keyspace
from accounting.ledger import BREAKAGE, EXPIRY, Journal, Transfer, wallet_account
from accounting.outbox import Told
from accounting.reservations import RESERVE, reserve
from accounting.usage_stream import read_range

_SWEPT_AT_ONCE = 1000
_BACKLOG_PAGES = 20  # more than that is waited for, rather than read with the wallet locked


async def sweep(pool: Any, redis: Redis, longest_exchange_seconds: float) -> int:
    """Forfeit what can be forfeited of every grant that expired a second ago or more; µcr."""
    rows = await pool.fetch(
        "select id, workspace_id from grants where swept_at is null"
        " and expires_at <= now() - interval '1 second' order by expires_at limit $1",
        _SWEPT_AT_ONCE,
    )
    forfeited = 0
    lost: deltas.WalletLostError | None = None
    for row in rows:
        try:
            forfeited += await _sweep_one(
                pool, redis, row["workspace_id"], row["id"], longest_exchange_seconds
            )
        except deltas.WalletLostError as error:
            lost = error  # the others need not wait for this one
    if lost:
        raise lost
    return forfeited


async def _sweep_one(
    pool: Any, redis: Redis, workspace_id: str, grant_id: str, longest_seconds: float
) -> int:
    await deltas.apply_pending(pool, redis, workspace_id)
    async with pool.acquire() as connection, connection.transaction():
        amount = await _forfeit(connection, redis, workspace_id, grant_id, longest_seconds)
    if amount:
        await deltas.apply_pending(pool, redis, workspace_id)
    return amount


async def _forfeit(
    connection: Any, redis: Redis, workspace_id: str, grant_id: str, longest_seconds: float
) -> int:
    """Post one step of a grant's expiry, in the caller's SQL transaction; its µcr."""
    await ledger.lock_wallets(connection, [workspace_id])
    grant = await connection.fetchrow(
        "select kind, remaining_ucr, forfeited_ucr, expires_at from grants where id = $1", grant_id
    )
    if await deltas.waiting(connection, workspace_id):
        return 0
    needed: int | None = 0
    if grant["remaining_ucr"]:
        needed = await _still_needed(
            connection, redis, workspace_id, grant_id, grant["expires_at"], longest_seconds
        )
    if needed is None:
        return 0
    spare = max(0, grant["remaining_ucr"] - needed)
    amount = await reserve(redis, workspace_id, grant_id, spare)
    if amount > 0:
        await _post(connection, workspace_id, grant_id, grant, amount)
    elif amount == 0 and not grant["remaining_ucr"]:
        await connection.execute("update grants set swept_at = now() where id = $1", grant_id)
    return max(0, amount)


async def _still_needed(
    connection: Any,
    redis: Redis,
    workspace_id: str,
    grant_id: str,
    expires_at: datetime,
    longest_seconds: float,
) -> int | None:
    """At most so much (µcr) may exchanges from before the expiry still cost; None: unknown.

    Held first, stream second: what is settled in between is counted twice rather than never.
    """
    [snapshot] = await reckoning.snapshots(redis, [workspace_id])
    if snapshot.wallet is None:
        return None
    held = 0
    if time.time() < expires_at.timestamp() + longest_seconds:
        reserved = snapshot.leases.get((RESERVE, grant_id))
        held = snapshot.wallet.held - (reserved.credits_ucr if reserved else 0)
    backlog = await _unposted(connection, redis, workspace_id, expires_at)
    return None if backlog is None else held + backlog


async def _unposted(
    connection: Any, redis: Redis, workspace_id: str, before: datetime
) -> int | None:
    """Charges on the stream of exchanges that started before then; None: too many to read.

    The wallet is locked, so none of this workspace's entries is posted or trimmed meanwhile.
    """
    shard = keyspace.shard_of(workspace_id)
    after = await usage_records.watermark(connection, shard)
    [snapshot] = await reckoning.snapshots(redis, [workspace_id])
    today = datetime.now(UTC).date()
    charges = 0
    for _ in range(_BACKLOG_PAGES):
        page = await read_range(redis, shard, after, snapshot.position)
        for entry in page:
            charges += sum(
                one.event.taken_ucr
                for one in usage_entries.read(entry, today)[0]
                if one.event.workspace_id == workspace_id and one.started_at < before
            )
        if not page:
            return charges
        after = page[-1].id
    return None


async def _post(
    connection: Any, workspace_id: str, grant_id: str, grant: Any, amount_ucr: int
) -> None:
    [journal_id] = await ledger.new_journal_ids(connection, 1)
    wallet = wallet_account(grant["kind"])
    journal = Journal(
        kind="expiry",
        workspace_id=workspace_id,
        dedupe_key=f"expiry:{grant_id}:{grant['forfeited_ucr']}",
        transfers=[Transfer(wallet, BREAKAGE, amount_ucr, grant_id, EXPIRY)],
        id=journal_id,
        details={"grant_id": grant_id},
    )
    await connection.execute(
        "update grants set forfeited_ucr = forfeited_ucr + $2 where id = $1", grant_id, amount_ucr
    )
    await ledger.post(connection, [journal])
    await deltas.record(connection, workspace_id, -amount_ucr, journal_id, grant_id)
    told = Told(workspace_id, journal_id, "grant.expired", {"grant_id": grant_id})
    await outbox.tell(connection, [told])
