"""Credit given to a workspace: issued once per reason, listed, burned.

Owns the table `grants`. Issuing is one journal: who pays for the credits, and, when the
workspace had used more than it owned, the repayment of that first. Postgres comes first; the
delta written here reaches Redis through `deltas.py`. Expiry is in `expiry.py`, the order in
which grants are burned in `postings.py`.
"""

from collections import defaultdict
from datetime import datetime
from typing import Any, NamedTuple

from msgspec import Struct

from accounting import deltas, ledger, outbox
from accounting.contract.identifiers import new_id
from accounting.contract.money import MAX_UCR
from accounting.ledger import FUND, RECEIVABLE, REPAID, Journal, Transfer, wallet_account
from accounting.outbox import Told
from accounting.postings import PRIORITIES, LiveGrant

FUNDED_BY = {  # whose account pays, unless the caller says otherwise
    "trial": "promo_cost",
    "promo": "promo_cost",
    "plan": "plan_credit_cost",
    "rollover": "plan_credit_cost",
    "topup": "operator_clearing",
}

_COLUMNS = (
    "id, workspace_id, kind, amount_ucr, consumed_ucr, forfeited_ucr, refunded_ucr,"
    " remaining_ucr, effective_at, expires_at, source_ref"
)


class GrantError(ValueError):
    """The grant cannot be issued as asked; the text says why."""


class UnknownWorkspaceError(GrantError):
    """There is no such workspace."""


class SourceConflictError(GrantError):
    """The source reference was used for another grant."""


class Grant(Struct, frozen=True):
    """A grant as the ledger has it, amounts in µcr."""

    id: str
    workspace_id: str
    kind: str
    amount_ucr: int
    consumed_ucr: int
    forfeited_ucr: int
    refunded_ucr: int
    remaining_ucr: int
    effective_at: datetime
    expires_at: datetime | None
    source_ref: str


class Source(NamedTuple):
    """Where a grant comes from: the journal's kind, who pays under which code, what is told."""

    journal_kind: str
    account: str
    code: int
    told: str


async def issue(
    connection: Any,
    workspace_id: str,
    kind: str,
    amount_ucr: int,
    expires_at: datetime | None,
    source_ref: str,
    *,
    funded_by: str | None = None,
) -> Grant:
    """Give credit, inside the caller's SQL transaction; apply the delta after its commit.

    A repeated `source_ref` returns the grant made before and posts nothing. Raises GrantError
    (UnknownWorkspaceError, SourceConflictError), and asyncpg's errors.
    """
    if kind not in FUNDED_BY:
        raise GrantError(f"{kind!r} is no kind of grant that can be issued")
    if not 0 < amount_ucr <= MAX_UCR:
        raise GrantError("the amount must be above zero and within what a balance can hold")
    if not await ledger.lock_wallets(connection, [workspace_id]):
        raise UnknownWorkspaceError(f"there is no workspace {workspace_id}")
    before = await connection.fetchrow(
        f"select {_COLUMNS} from grants where source_ref = $1",  # noqa: S608
        source_ref,
    )
    if before:
        return _same(Grant(*before), workspace_id, kind, amount_ucr, expires_at)
    return await add(
        connection,
        workspace_id,
        kind,
        amount_ucr,
        expires_at,
        source_ref,
        Source(kind, funded_by or FUNDED_BY[kind], FUND, "grant.issued"),
    )


async def add(
    connection: Any,
    workspace_id: str,
    kind: str,
    amount_ucr: int,
    expires_at: datetime | None,
    source_ref: str,
    source: Source,
    parent_id: str | None = None,
) -> Grant:
    """Make a grant whose wallet is locked; what had been used beyond the wallet is repaid first.

    Raises GrantError, and asyncpg.UniqueViolationError for a repeated source or parent.
    """
    await _check_room(connection, workspace_id, amount_ucr)
    owed = max(0, min(amount_ucr, await ledger.receivable_ucr(connection, workspace_id)))
    row = await connection.fetchrow(
        "insert into grants (id, workspace_id, kind, priority, amount_ucr, consumed_ucr,"  # noqa: S608
        " expires_at, source_ref, parent_id) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
        f" returning {_COLUMNS}",
        new_id("grant"),
        workspace_id,
        kind,
        PRIORITIES[kind],
        amount_ucr,
        owed,
        expires_at,
        source_ref,
        parent_id,
    )
    grant = Grant(*row)
    await _post(connection, grant, owed, source)
    return grant


def _same(
    grant: Grant, workspace_id: str, kind: str, amount_ucr: int, expires_at: datetime | None
) -> Grant:
    asked = (workspace_id, kind, amount_ucr, expires_at)
    if (grant.workspace_id, grant.kind, grant.amount_ucr, grant.expires_at) != asked:
        raise SourceConflictError(f"{grant.source_ref!r} was used for another grant")
    return grant


async def _check_room(connection: Any, workspace_id: str, amount_ucr: int) -> None:
    """Redis keeps balances as doubles, which are exact up to MAX_UCR."""
    held = await connection.fetchval(
        "select coalesce(sum(remaining_ucr), 0)::bigint from grants"
        " where workspace_id = $1 and remaining_ucr > 0",
        workspace_id,
    )
    if held + amount_ucr > MAX_UCR:
        raise GrantError("the balance would be more than a wallet can hold")


async def _post(connection: Any, grant: Grant, owed_ucr: int, source: Source) -> None:
    wallet = wallet_account(grant.kind)
    transfers = [Transfer(source.account, wallet, grant.amount_ucr, grant.id, source.code)]
    if owed_ucr:
        transfers.append(Transfer(wallet, RECEIVABLE, owed_ucr, grant.id, REPAID))
    [journal_id] = await ledger.new_journal_ids(connection, 1)
    journal = Journal(
        kind=source.journal_kind,
        workspace_id=grant.workspace_id,
        dedupe_key=f"grant:{grant.source_ref}",
        transfers=transfers,
        id=journal_id,
        details={"grant_id": grant.id},
    )
    await ledger.post(connection, [journal])
    await deltas.record(connection, grant.workspace_id, grant.amount_ucr, journal_id)
    told = Told(grant.workspace_id, journal_id, source.told, {"grant_id": grant.id})
    await outbox.tell(connection, [told])


async def list_all(connection: Any, workspace_id: str) -> list[Grant]:
    """A workspace's grants, the newest first."""
    rows = await connection.fetch(
        f"select {_COLUMNS} from grants where workspace_id = $1"  # noqa: S608
        " order by effective_at desc, id desc",
        workspace_id,
    )
    return [Grant(*row) for row in rows]


async def live(connection: Any, workspace_ids: list[str]) -> dict[str, list[LiveGrant]]:
    """The grants with something left, by workspace. The wallets must be locked."""
    rows = await connection.fetch(
        "select workspace_id, id, kind,"
        " (extract(epoch from expires_at) * 1000000)::bigint as expires_at_us,"
        " remaining_ucr from grants where workspace_id = any($1) and remaining_ucr > 0",
        workspace_ids,
    )
    found: dict[str, list[LiveGrant]] = defaultdict(list)
    for row in rows:
        found[row["workspace_id"]].append(
            LiveGrant(row["id"], row["kind"], row["expires_at_us"], row["remaining_ucr"])
        )
    return found


async def burn(connection: Any, burned: dict[str, int]) -> None:
    """Count µcr by grant id as consumed. The wallets must be locked.

    Raises asyncpg.CheckViolationError when more would be taken than a grant has left.
    """
    await connection.execute(
        "update grants g set consumed_ucr = g.consumed_ucr + x.amount"
        " from unnest($1::text[], $2::bigint[]) as x(id, amount) where g.id = x.id",
        list(burned),
        list(burned.values()),
    )
