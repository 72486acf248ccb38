"""Journals and transfers: what moves money, and the lock under which it moves.

Owns the tables `wallets`, `ledger_accounts`, `journals` and `transfers`. A transfer debits one
account and credits another; an account is named by its kind, and is the workspace's own unless
the kind is one of the house's. Which transfers a fact needs is decided by `postings.py`,
`grants.py` and `expiry.py`.

Theory of operation. Whoever moves money of a workspace holds its row in `wallets` until its
SQL transaction ends, so grants, totals and delta numbers of a workspace change one after
another. House accounts are shared by all: `post` writes totals last, so that they are locked
for the shortest time, and a transaction that posts twice must do so in the same order as any
other (a deadlock is an error that a repeated transaction cures).
"""

from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

FUND, USAGE, USAGE_REVERSED, BEYOND_WALLET, REPAID, REPAYMENT_UNDONE = 1, 10, 11, 12, 13, 14
EXPIRY, RESTORE, REFUND, CLAWBACK = 20, 21, 30, 31

REVENUE, BREAKAGE, RECEIVABLE = "usage_revenue", "breakage", "receivable"
HOUSE = frozenset(
    {
        "stripe_clearing",
        "operator_clearing",
        REVENUE,
        "subscription_revenue",
        "promo_cost",
        "plan_credit_cost",
        BREAKAGE,
        "tax_payable",
        "dispute_loss",
    }
)


class Transfer(NamedTuple):
    """µcr from one account to another; `grant_id` says which grant a wallet's side concerns."""

    debit: str
    credit: str
    amount_ucr: int
    grant_id: str | None
    code: int


class Journal(Struct):
    """The transfers of one fact. A second journal with the same `dedupe_key` is refused."""

    kind: str
    workspace_id: str
    dedupe_key: str
    transfers: list[Transfer]
    id: int
    details: dict[str, Any] = {}


def wallet_account(grant_kind: str) -> str:
    """The account that holds what is left of a workspace's grants of one kind."""
    return f"wallet_{grant_kind}"


async def lock_wallets(connection: Any, workspace_ids: list[str]) -> set[str]:
    """Lock the wallets until the transaction ends; those whose workspace exists."""
    wanted = sorted(set(workspace_ids))
    lock = "select workspace_id from wallets where workspace_id = any($1) order by 1 for update"
    locked = {row[0] for row in await connection.fetch(lock, wanted)}
    if len(locked) == len(wanted):
        return locked
    await connection.execute(
        "insert into wallets (workspace_id) select id from workspaces where id = any($1)"
        " order by id on conflict do nothing",
        [workspace_id for workspace_id in wanted if workspace_id not in locked],
    )
    return {row[0] for row in await connection.fetch(lock, wanted)}


async def new_journal_ids(connection: Any, count: int) -> list[int]:
    """Numbers for journals about to be posted; an unused one leaves a gap, which is harmless."""
    rows = await connection.fetch(
        "select nextval('journals_id_seq') from generate_series(1, $1::int)", count
    )
    return [row[0] for row in rows]


async def post(connection: Any, journals: list[Journal]) -> None:
    """Write journals, their transfers and the accounts' totals. The wallets must be locked.

    Raises asyncpg.UniqueViolationError when one was posted before, CheckViolationError when a
    wallet would go below zero.
    """
    accounts = await _accounts(connection, journals)
    await connection.execute(
        "insert into journals (id, kind, workspace_id, dedupe_key, details)"
        " select * from unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::jsonb[])",
        [journal.id for journal in journals],
        [journal.kind for journal in journals],
        [journal.workspace_id for journal in journals],
        [journal.dedupe_key for journal in journals],
        [msgspec.json.encode(journal.details).decode() for journal in journals],
    )
    rows: list[tuple[Any, ...]] = []
    totals: dict[int, list[int]] = {}
    for journal in journals:
        for seq, transfer in enumerate(journal.transfers):
            debit = accounts[_owner(journal, transfer.debit), transfer.debit]
            credit = accounts[_owner(journal, transfer.credit), transfer.credit]
            amount = transfer.amount_ucr
            rows.append((journal.id, seq, debit, credit, amount, transfer.grant_id, transfer.code))
            totals.setdefault(debit, [0, 0])[0] += amount
            totals.setdefault(credit, [0, 0])[1] += amount
    await connection.execute(
        "insert into transfers (journal_id, seq, debit_id, credit_id, amount_ucr, grant_id, code)"
        " select * from unnest($1::bigint[], $2::smallint[], $3::bigint[], $4::bigint[],"
        " $5::bigint[], $6::text[], $7::smallint[])",
        *zip(*rows, strict=True),
    )
    await connection.execute(
        "update ledger_accounts a set debits_ucr = a.debits_ucr + x.debits,"
        " credits_ucr = a.credits_ucr + x.credits"
        " from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as x(id, debits, credits)"
        " where a.id = x.id",
        list(totals),
        [debits for debits, _credits in totals.values()],
        [credits for _debits, credits in totals.values()],
    )


def _owner(journal: Journal, kind: str) -> str | None:
    return None if kind in HOUSE else journal.workspace_id


async def _accounts(connection: Any, journals: list[Journal]) -> dict[tuple[str | None, str], int]:
    """Account ids by owner and kind, those that are missing made."""
    needed = {
        (_owner(journal, kind), kind)
        for journal in journals
        for transfer in journal.transfers
        for kind in (transfer.debit, transfer.credit)
    }
    rows = await connection.fetch(
        "select id, workspace_id, kind from ledger_accounts"
        " where workspace_id = any($1) or workspace_id is null",
        list({journal.workspace_id for journal in journals}),
    )
    found = {(row["workspace_id"], row["kind"]): row["id"] for row in rows}
    missing = [name for name in needed if name not in found]
    if missing:
        rows = await connection.fetch(
            "insert into ledger_accounts (workspace_id, kind)"
            " select * from unnest($1::text[], $2::text[]) returning id, workspace_id, kind",
            [owner for owner, _kind in missing],
            [kind for _owner, kind in missing],
        )
        found |= {(row["workspace_id"], row["kind"]): row["id"] for row in rows}
    return found


async def receivable_ucr(connection: Any, workspace_id: str) -> int:
    """What a workspace has used beyond its wallet and not yet repaid."""
    owed = await connection.fetchval(
        "select debits_ucr - credits_ucr from ledger_accounts"
        " where workspace_id = $1 and kind = $2",
        workspace_id,
        RECEIVABLE,
    )
    return int(owed or 0)
