"""The ledger's invariants over what was posted since it was last proved, and that mark.

Owns the tables `audit_mark` and `audit_totals`. Each statement reads journals, usage rows and
revisions by the time of their transaction, so an audit costs what has happened since, not what
there is. A clean one moves the mark. What was proved before is not looked at again: whoever
doubts the past asks for a full audit.

Theory of operation. Rows carry the time at which their transaction began. The mark is an
instant before which every transaction that began has ended: earlier than the oldest one that
is open, and by a margin. So nothing can still come to be recorded before the mark.
"""

from contextlib import suppress
from datetime import datetime
from typing import Any

import asyncpg

from accounting import rollups
from accounting.audit_ledger import (
    INVARIANTS,
    SIDES,
    SWEEP_SECONDS,
    Finding,
    Invariant,
    run,
)

_LOCK = 0x70_6C_67_07
_HORIZON = (
    "select least(now(), min(xact_start)) - interval '1 second' from pg_stat_activity"
    " where datname = current_database() and pid <> pg_backend_pid()"
)
_JOURNALS = "(select * from journals where posted_at >= $1)"
_TRANSFERS = f"(select t.* from transfers t join {_JOURNALS} j on j.id = t.journal_id)"  # noqa: S608
_ROWS = "(select * from usage_records where recorded_at >= $1)"
_REVISIONS = "(select * from usage_revisions where recorded_at >= $1)"
_BY_NAME = {one.name: one for one in INVARIANTS}
_TOUCHED_KEYS = (
    "(select distinct workspace_id, date_trunc('hour', started_at, 'UTC') as hour,"  # noqa: S608
    f" model, key_id from {_ROWS} r)"
)
_HOURS_ROWS = (
    "(select * from usage_records where day between"  # noqa: S608
    f" (select min(hour)::date - 1 from {_TOUCHED_KEYS} k)"
    f" and (select max(hour)::date + 1 from {_TOUCHED_KEYS} k))"
)


def _since(name: str, **replaced: str) -> Invariant:
    """An invariant of the ledger over less: some of its tables in place of others."""
    whole = _BY_NAME[name]
    rows = whole.rows
    for table, part in replaced.items():
        assert f" {table}" in rows, (name, table)
        rows = rows.replace(f" {table} ", f" {part} p ").replace(f" {table})", f" {part} p)")
    return Invariant(name, f"{whole.title}, since", rows)


RECENT = [
    Invariant(
        "A1",
        "every account's totals are those proved before and its transfers since",
        "select coalesce(a.workspace_id, 'house') || ' ' || a.kind as label,"  # noqa: S608
        " (a.debits_ucr, a.credits_ucr) is distinct from"
        " ((coalesce(m.debits_ucr, 0) + coalesce(t.debits, 0))::bigint,"
        " (coalesce(m.credits_ucr, 0) + coalesce(t.credits, 0))::bigint) as bad"
        " from ledger_accounts a left join audit_totals m on m.account_id = a.id"
        " left join (select id, sum(debits) as debits, sum(credits) as credits"
        f" from ({SIDES.replace('from transfers', f'from {_TRANSFERS} s')}) s group by id) t"
        " on t.id = a.id",
    ),
    _BY_NAME["A2"],
    _BY_NAME["A3"],
    _BY_NAME["A4"],
    Invariant(
        "A5",
        "transfers explain what became of each grant that moved since",
        f"{_BY_NAME['A5'].rows} having g.id in"  # noqa: S608
        f" (select grant_id from {_TRANSFERS} s where grant_id is not null)",
    ),
    _since("A6", usage_records=_ROWS, usage_revisions=_REVISIONS, transfers=_TRANSFERS),
    Invariant(
        "A7",
        "nothing is left of a grant that expired long ago",
        "select workspace_id || ' ' || id as label, remaining_ucr > 0 as bad from grants"
        " where swept_at is null and expires_at < now() - make_interval(secs => $1)",
    ),
    Invariant(
        "A10",
        "rollups are the sums of usage rows, of the hours that had any since",
        "select workspace_id || ' ' || hour || ' ' || model as label,"  # noqa: S608
        " ("
        + ", ".join(f"u.{name}" for name in rollups.SUMS)
        + ") is distinct from ("
        + ", ".join(f"h.{name}" for name in rollups.SUMS)
        + f") as bad from {_TOUCHED_KEYS} k"
        f" left join ({rollups.GROUPED.format(rows=_HOURS_ROWS + ' p')}) u"
        f" using ({', '.join(rollups.KEYS)})"
        f" left join usage_hourly h using ({', '.join(rollups.KEYS)})",
    ),
    Invariant(
        "A11",
        f"{_BY_NAME['A11'].title}, since",
        _BY_NAME["A11"].rows.replace(" journals j ", f" {_JOURNALS} j "),
    ),
    _since("A12", usage_records=_ROWS, usage_revisions=_REVISIONS, transfers=_TRANSFERS),
    Invariant(
        "A13",
        "what was revised of each request is the sum of its revisions, since",
        "select u.workspace_id || ' ' || request_id as label,"  # noqa: S608
        " u.revised_ucr <> r.difference as bad from usage_records u join"
        " (select day, request_id, sum(difference_ucr) as difference from usage_revisions"
        f" where (day, request_id) in (select day, request_id from {_REVISIONS} p)"
        " group by 1, 2) r using (day, request_id)",
    ),
]


async def mark(connection: Any) -> datetime | None:
    """Up to when the ledger has been proved; None: never."""
    found = await connection.fetchval("select proved_until from audit_mark")
    return found if isinstance(found, datetime) else None


async def horizon(connection: Any) -> datetime:
    """Whatever began before this instant has ended. Ask before the audit, mark after it."""
    found = await connection.fetchval(_HORIZON)
    assert isinstance(found, datetime)
    return found


async def check(connection: Any, since: datetime, longest_seconds: float) -> list[Finding]:
    """Every invariant over what was posted since."""
    patience = longest_seconds + SWEEP_SECONDS
    return [await run(connection, one, patience if one.name == "A7" else since) for one in RECENT]


async def advance(connection: Any, until: datetime) -> None:
    """Note that the ledger is proved up to a horizon, with every account's totals then.

    Of two audits at once, one notes it; the other's snapshot may be older, and is refused.
    """
    with suppress(asyncpg.SerializationError):
        async with connection.transaction(isolation="repeatable_read"):
            if await connection.fetchval("select pg_try_advisory_xact_lock($1)", _LOCK):
                await _advance(connection, until)


async def _advance(connection: Any, until: datetime) -> None:
    since = await mark(connection)
    if since is None or since < until:
        await connection.execute(
            "insert into audit_totals as m (account_id, debits_ucr, credits_ucr)"  # noqa: S608
            f" select id, sum(debits)::bigint, sum(credits)::bigint from ({SIDES}) s group by id"
            " on conflict (account_id) do update set"
            " debits_ucr = m.debits_ucr + excluded.debits_ucr,"
            " credits_ucr = m.credits_ucr + excluded.credits_ucr".replace(
                "from transfers",
                "from (select t.* from transfers t join journals j on j.id = t.journal_id"
                " where j.posted_at < $1 and ($2::timestamptz is null or j.posted_at >= $2)) p",
            ),
            until,
            since,
            timeout=None,
        )
        await connection.execute(
            "insert into audit_mark (proved_until) values ($1) on conflict (only_one)"
            " do update set proved_until = excluded.proved_until, audited_at = now()",
            until,
        )
