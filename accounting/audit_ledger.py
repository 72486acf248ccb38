"""The invariants of the ledger, each as one SQL statement over what it has to hold for.

Every statement lists what it checks as (label, drift, whether it is bad); so each finding has
a figure, how many were checked, and the first that is wrong by name. One statement sees one
snapshot, so the findings hold on a live system.
"""

from typing import Any, NamedTuple

from accounting import rollups

SWEEP_SECONDS = 300.0  # beyond the longest exchange: what an expired grant may take to be swept


class Finding(NamedTuple):
    """One invariant: how much was checked, how much of it drifted, and the first that did."""

    name: str
    title: str
    checked: int
    drifted: int
    first: str | None


class Invariant(NamedTuple):
    """`rows` selects `label text, bad boolean`, one row for each thing checked."""

    name: str
    title: str
    rows: str


SIDES = (
    "select debit_id as id, amount_ucr as debits, 0 as credits from transfers"
    " union all select credit_id, 0, amount_ucr from transfers"
)

INVARIANTS = [
    Invariant(
        "A1",
        "every account's totals are the sums of its transfers",
        "select coalesce(a.workspace_id, 'house') || ' ' || a.kind as label,"  # noqa: S608
        " (a.debits_ucr, a.credits_ucr) is distinct from"
        " (coalesce(t.debits, 0)::bigint, coalesce(t.credits, 0)::bigint) as bad"
        " from ledger_accounts a left join (select id, sum(debits) as debits,"
        f" sum(credits) as credits from ({SIDES}) s group by id) t using (id)",
    ),
    Invariant(
        "A2",
        "debits equal credits over all accounts",
        "select 'debits ' || sum(debits_ucr) || ', credits ' || sum(credits_ucr) as label,"
        " sum(debits_ucr) <> sum(credits_ucr) as bad from ledger_accounts",
    ),
    Invariant(
        "A3",
        "no wallet is below zero",
        "select workspace_id || ' ' || kind as label, credits_ucr < debits_ucr as bad"
        " from ledger_accounts where no_overdraft",
    ),
    Invariant(
        "A4",
        "grants explain wallets",
        "select workspace_id || ' ' || kind as label,"
        " coalesce(g.remaining, 0) <> coalesce(w.balance, 0) as bad"
        " from (select workspace_id, 'wallet_' || kind as kind, sum(amount_ucr - consumed_ucr"
        " - forfeited_ucr - refunded_ucr) as remaining from grants group by 1, 2) g"
        " full join (select workspace_id, kind, credits_ucr - debits_ucr as balance"
        " from ledger_accounts where no_overdraft) w using (workspace_id, kind)",
    ),
    Invariant(
        "A5",
        "transfers explain what became of each grant",
        "select g.workspace_id || ' ' || g.id as label,"
        " g.amount_ucr <> coalesce(sum(t.amount_ucr) filter (where code in (1, 21)), 0)"
        " or g.consumed_ucr <> coalesce(sum(t.amount_ucr) filter (where code in (10, 13)), 0)"
        " - coalesce(sum(t.amount_ucr) filter (where code in (11, 14)), 0)"
        " or g.forfeited_ucr <> coalesce(sum(t.amount_ucr) filter (where code = 20), 0)"
        " or g.refunded_ucr <> coalesce(sum(t.amount_ucr) filter (where code in (30, 31)), 0)"
        " as bad from grants g left join transfers t on t.grant_id = g.id group by g.id",
    ),
    Invariant(
        "A6",
        "usage rows and their revisions explain the transfers of their journal",
        "select coalesce(u.workspace_id, j.workspace_id) || ' journal ' || journal_id as label,"
        " coalesce(u.charge, 0) <> coalesce(t.posted, 0) as bad"
        " from (select journal_id, min(workspace_id) as workspace_id, sum(charge) as charge from"
        " (select journal_id, workspace_id, charge_ucr - revised_ucr as charge from usage_records"
        " union all select journal_id, workspace_id, difference_ucr from usage_revisions) c"
        " where charge <> 0 group by 1) u full join (select journal_id,"
        " sum(case code when 11 then -amount_ucr else amount_ucr end) as posted"
        " from transfers where code in (10, 11, 12) group by 1) t using (journal_id)"
        " left join journals j on j.id = journal_id",
    ),
    Invariant(
        "A7",
        "nothing is left of a grant that expired long ago",
        "select workspace_id || ' ' || id as label, remaining_ucr > 0 as bad from grants"
        " where expires_at < now() - make_interval(secs => $1)",
    ),
    Invariant(
        "A10",
        "rollups are the sums of usage rows",
        "select workspace_id || ' ' || hour || ' ' || model as label,"  # noqa: S608
        " ("
        + ", ".join(f"u.{name}" for name in rollups.SUMS)
        + ") is distinct from ("
        + ", ".join(f"h.{name}" for name in rollups.SUMS)
        + f") as bad from ({rollups.GROUPED.format(rows='usage_records')}) u"
        f" full join usage_hourly h using ({', '.join(rollups.KEYS)})",
    ),
    Invariant(
        "A11",
        "what moves credits is told, and has its delta for Redis",
        "select j.workspace_id || ' ' || j.dedupe_key as label,"
        " not exists (select from outbox o where o.journal_id = j.id)"
        " or not exists (select from redis_deltas d where d.journal_id = j.id) as bad"
        " from journals j where j.kind <> 'usage'",
    ),
    Invariant(
        "A12",
        "the grants each request burned are what its journals took from them",
        "select grant_id as label, coalesce(u.burned, 0) <> coalesce(t.taken, 0) as bad"
        " from (select b ->> 0 as grant_id, sum((b ->> 1)::bigint) as burned from"
        " (select burns from usage_records union all select burns from usage_revisions) r,"
        " jsonb_array_elements(burns) as b group by 1) u full join (select grant_id,"
        " sum(case code when 11 then -amount_ucr else amount_ucr end) as taken from transfers"
        " where code in (10, 11) and grant_id is not null group by 1) t using (grant_id)",
    ),
    Invariant(
        "A13",
        "what was revised of each request is the sum of its revisions",
        "select coalesce(u.workspace_id, r.workspace_id) || ' ' || request_id as label,"
        " coalesce(u.revised_ucr, 0) <> coalesce(r.difference, 0) as bad"
        " from (select day, request_id, workspace_id, revised_ucr from usage_records"
        " where revised_ucr <> 0) u full join (select day, request_id,"
        " min(workspace_id) as workspace_id, sum(difference_ucr) as difference"
        " from usage_revisions group by 1, 2) r using (day, request_id)",
    ),
]

_SUMMARY = (
    "select count(*), count(*) filter (where bad), min(label) filter (where bad)"
    " from ({rows}) checked"
)


async def check(connection: Any, longest_exchange_seconds: float) -> list[Finding]:
    """Every invariant of the ledger, over all of it."""
    patience = longest_exchange_seconds + SWEEP_SECONDS
    return [await run(connection, one, patience) for one in INVARIANTS]


async def run(connection: Any, invariant: Invariant, asked: Any) -> Finding:
    """One invariant; `asked` is what its rows call `$1`, if they do."""
    arguments = [asked] if "$1" in invariant.rows else []
    statement = _SUMMARY.format(rows=invariant.rows)
    row = await connection.fetchrow(statement, *arguments, timeout=None)
    return Finding(invariant.name, invariant.title, *row)
