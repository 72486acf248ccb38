"""What an exchange costs, set right afterwards: the difference is posted, and only that.

Owns the table `usage_revisions`. A worker may tell an exchange anew (a usage event with a
higher `revision`), an operator may charge one less (`reversals.py`). More burns grants like any
charge. Less goes back the way it came, last taken first: what was beyond the wallet, then the
grants that paid; of a grant that has expired meanwhile it is forfeited at once.

Theory of operation. A row in `usage_records` keeps the journal and burns of its first posting;
each revision has a journal and burns of its own, and the row's charge, its rollup and
`revised_ucr` follow. What a revision takes, Redis has taken when it came over the stream; what
it gives back reaches Redis, with the key's spend, as a delta.
"""

from collections import Counter
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from accounting import (
    deltas,
    grants,
    ledger,
    outbox,
    postings,
    quarantine,
    rollups,
    usage_entries,
)
from accounting.ledger import (
    BREAKAGE,
    EXPIRY,
    RECEIVABLE,
    REPAYMENT_UNDONE,
    REVENUE,
    USAGE_REVERSED,
    Journal,
    Transfer,
    wallet_account,
)
from accounting.outbox import Told
from accounting.postings import Burns, Charge
from accounting.usage_entries import Billed

_ROW = (
    "select day, request_id, workspace_id, key_id, charge_ucr, revised_ucr, revision, burns,"
    " (extract(epoch from started_at) * 1000000)::bigint as started_at_us"
    " from usage_records where day = $1 and request_id = $2"
)


class Revision(NamedTuple):
    """A change of a row's charge; of the stream, its number and what it tells, else None."""

    difference_ucr: int
    source_ref: str
    reason: str = ""
    stream_revision: int | None = None
    told_ucr: int | None = None
    late: bool = False  # Redis has not taken what it costs more


class Row(Struct):
    """A usage row as it is now, with what has paid for it, in order."""

    day: Any
    request_id: str
    workspace_id: str
    key_id: str
    charge_ucr: int
    revision: int
    started_at_us: int
    told_ucr: int  # the charge as its worker told it last, whatever operators gave back
    burned: Burns


class _Moves(NamedTuple):
    """What a difference does: transfers, burns (below zero: given back), µcr lost to expiry."""

    kind: str
    transfers: list[Transfer]
    burns: Burns
    forfeited_ucr: int = 0


async def row_of(connection: Any, day: Any, request_id: str) -> Row | None:
    """A usage row; None when there is none. To change it, lock its wallet and read it again."""
    found = await connection.fetchrow(_ROW, day, request_id)
    if found is None:
        return None
    revisions = await connection.fetch(
        "select told_ucr, burns from usage_revisions"
        " where day = $1 and request_id = $2 order by id",
        day,
        request_id,
    )
    burns = [msgspec.json.decode(found["burns"] or "[]", type=Burns)]
    burns += [msgspec.json.decode(one["burns"], type=Burns) for one in revisions]
    told = [found["charge_ucr"] - found["revised_ucr"]]
    told += [one["told_ucr"] for one in revisions if one["told_ucr"] is not None]
    return Row(
        day=found["day"],
        request_id=request_id,
        workspace_id=found["workspace_id"],
        key_id=found["key_id"],
        charge_ucr=found["charge_ucr"],
        revision=found["revision"],
        started_at_us=found["started_at_us"],
        told_ucr=told[-1],
        burned=postings.net(one for part in burns for one in part),
    )


async def revise_from_stream(connection: Any, billed: Billed) -> bool:
    """Post what an exchange told anew costs more or less; False: it is no news.

    The wallet is locked, and the exchange is recorded if the workspace exists.
    """
    event = billed.event
    row = await row_of(connection, billed.day, event.request_id)
    if row is None or event.revision <= row.revision:
        return False
    if event.workspace_id != row.workspace_id:
        reason = "it revises an exchange of another workspace"
        await quarantine.put(connection, [usage_entries.refused(billed, reason)])
        return False
    difference = max(event.charge_ucr - row.told_ucr, -row.charge_ucr)
    ref = f"stream:{event.request_id}:{event.revision}"
    revision = Revision(difference, ref, "", event.revision, event.charge_ucr, billed.late)
    await apply(connection, row, revision)
    await rollups.retell(connection, billed)
    return True


async def apply(connection: Any, row: Row, revision: Revision) -> int:
    """Post a difference, the wallet being locked; the µcr that reach the wallet again.

    A difference above zero has been taken in Redis already, as the charge on the stream was,
    unless it is late.
    Raises asyncpg.UniqueViolationError when the same `source_ref` was posted before.
    """
    difference = revision.difference_ucr
    journal_id, credited = None, 0
    burns: Burns = []
    if difference:
        moves = await (_more if difference > 0 else _less)(connection, row, abs(difference))
        [journal_id] = await ledger.new_journal_ids(connection, 1)
        await _post(connection, row, revision, moves, journal_id)
        burns = moves.burns
    if journal_id is not None and (difference < 0 or revision.late):
        credited = -difference - moves.forfeited_ucr
        await deltas.record(
            connection,
            row.workspace_id,
            credited,
            journal_id,
            key_id=row.key_id,
            spent_ucr=difference,
        )
    await _write(connection, row, revision, burns, journal_id)
    return credited


async def _more(connection: Any, row: Row, amount_ucr: int) -> _Moves:
    live = await grants.live(connection, [row.workspace_id])
    charge = Charge(row.request_id, row.started_at_us, amount_ucr)
    posting = postings.plan([charge], live.get(row.workspace_id, []))
    if posting.burned:
        await grants.burn(connection, posting.burned)
    return _Moves("usage", posting.transfers, posting.burns[row.request_id])


async def _less(connection: Any, row: Row, amount_ucr: int) -> _Moves:
    beyond, back = postings.give_back(amount_ucr, row.charge_ucr, row.burned)
    transfers: list[Transfer] = []
    forfeited = 0
    if beyond:
        owed = await ledger.receivable_ucr(connection, row.workspace_id)
        repaid = await _repayments(connection, row.workspace_id, beyond - owed)
        forfeited += await _refill(connection, repaid, RECEIVABLE, REPAYMENT_UNDONE, transfers)
        transfers.append(Transfer(REVENUE, RECEIVABLE, beyond, None, USAGE_REVERSED))
    forfeited += await _refill(connection, back, REVENUE, USAGE_REVERSED, transfers)
    burns = [(grant_id, -amount) for grant_id, amount in back]
    return _Moves("reversal", transfers, burns, forfeited)


async def _repayments(connection: Any, workspace_id: str, amount_ucr: int) -> Burns:
    """Which grants repaid the last so many µcr that had been used beyond the wallet."""
    if amount_ucr <= 0:
        return []
    rows = await connection.fetch(
        "select t.grant_id, sum(case t.code when 13 then t.amount_ucr else -t.amount_ucr end)"
        "::bigint as amount from transfers t join grants g on g.id = t.grant_id"
        " where g.workspace_id = $1 and t.code in (13, 14)"
        " group by 1 order by max(t.journal_id) desc",
        workspace_id,
    )
    found: Burns = []
    for row in rows:
        taken = min(amount_ucr, row["amount"])
        if taken:
            found.append((row["grant_id"], taken))
            amount_ucr -= taken
    return found


async def _refill(
    connection: Any, back: Burns, source: str, code: int, transfers: list[Transfer]
) -> int:
    """Give µcr back to grants, and add the transfers for it; what was forfeited at once."""
    if not back:
        return 0
    total: Counter[str] = Counter()  # a grant may have paid twice: first, and for a revision
    for grant_id, amount in back:
        total[grant_id] += amount
    rows = await connection.fetch(
        "update grants g set consumed_ucr = consumed_ucr - x.amount, forfeited_ucr = forfeited_ucr"
        " + case when expires_at <= now() then x.amount else 0 end"
        " from unnest($1::text[], $2::bigint[]) as x(id, amount) where g.id = x.id"
        " returning g.id, kind, coalesce(expires_at <= now(), false) as expired",
        list(total),
        list(total.values()),
    )
    grant = {row["id"]: row for row in rows}
    forfeited = 0
    for grant_id, amount in back:
        wallet = wallet_account(grant[grant_id]["kind"])
        transfers.append(Transfer(source, wallet, amount, grant_id, code))
        if grant[grant_id]["expired"]:
            transfers.append(Transfer(wallet, BREAKAGE, amount, grant_id, EXPIRY))
            forfeited += amount
    return forfeited


async def _post(
    connection: Any, row: Row, revision: Revision, moves: _Moves, journal_id: int
) -> None:
    journal = Journal(
        kind=moves.kind,
        workspace_id=row.workspace_id,
        dedupe_key=f"revision:{revision.source_ref}",
        transfers=moves.transfers,
        id=journal_id,
        details={"request_id": row.request_id},
    )
    await ledger.post(connection, [journal])
    if moves.kind == "reversal":
        body = {"request_id": row.request_id, "reversed_ucr": -revision.difference_ucr}
        await outbox.tell(connection, [Told(row.workspace_id, journal_id, "usage.reversed", body)])


async def _write(
    connection: Any, row: Row, revision: Revision, burns: Burns, journal_id: int | None
) -> None:
    await connection.execute(
        "insert into usage_revisions (day, request_id, workspace_id, revision, difference_ucr,"
        " burns, journal_id, source_ref, reason, told_ucr)"
        " values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        row.day,
        row.request_id,
        row.workspace_id,
        revision.stream_revision,
        revision.difference_ucr,
        msgspec.json.encode(burns).decode(),
        journal_id,
        revision.source_ref,
        revision.reason,
        revision.told_ucr,
    )
    await rollups.recharge(connection, row.day, row.request_id, revision.difference_ucr)
