"""`python -m accounting audit`: every invariant, inside the ledger and between the stores.

    A1–A13  the ledger agrees with itself                          (audit_ledger.py)
    R0      the gate is open: Redis has been filled
    R1      every balance in Redis is what the ledger says          (reckoning.py)
    R2      what is held is the sum of leases, and of what keys have open
    R3      every entry of the streams is posted, or still to be read
    R5      clients were told what is charged, if their log is given (audit_clients.py)
    R6      what keys have spent is the sum of their usage

All of it is exact on a live, loaded system, and writes nothing but how far it has proved the
ledger. A8, A9 and R4 are of payments and the company that takes them; while there is no table
of payments, the output says so.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from accounting import (
    audit_clients,
    audit_ledger,
    audit_recent,
    reckoning,
    usage_entries,
    usage_records,
)
from accounting.audit_ledger import Finding
from accounting.contract import keyspace
from accounting.contract.keyspace import KeyCounters
from accounting.contract.settings import SHARDS
from accounting.reckoning import Reckoning
from accounting.reservations import RESERVE
from accounting.usage_entries import START, Entry, StreamId
from accounting.usage_stream import read_range

_CHUNK = 200  # workspaces read together
_PAGE = 1000

Drift = str | None  # who drifted and by how much; None: all is well


async def audit(
    pool: Any,
    redis: Redis,
    longest_exchange_seconds: float,
    client_log: Path | None = None,
    *,
    recent: bool = False,
) -> list[Finding]:
    """Every finding; R5 with a client's log. `recent`: of the ledger, and of workspaces that
    had anything posted, only since the ledger was last proved (`audit_recent.py`).

    Raises audit_clients.ClientLogError, reckoning.RestlessError, and the drivers' errors.
    """
    until = await audit_recent.horizon(pool)
    since = await audit_recent.mark(pool) if recent else None
    if since is None:
        findings = await audit_ledger.check(pool, longest_exchange_seconds)
    else:
        findings = await audit_recent.check(pool, since, longest_exchange_seconds)
    if not any(finding.drifted for finding in findings):
        async with pool.acquire() as connection:
            await audit_recent.advance(connection, until)
    filled = await redis.exists(keyspace.EPOCH)
    gate = [None if filled else "Redis waits to be rebuilt"]
    findings.append(_finding("R0", "Redis has been filled from the ledger", gate))
    reckonings = [one async for one in _reckonings(pool, redis, since)]
    findings += [
        _finding("R1", "balances in Redis are the ledger's", map(balance_drift, reckonings)),
        _finding("R2", "what is held is leased, and open under a key", map(held_drift, reckonings)),
        _finding("R3", "no entry of a stream is forgotten", await _stream_drifts(pool, redis)),
        _finding("R6", "what keys have spent is their usage", spent_drifts(reckonings)),
    ]
    if client_log is not None:
        findings.append(await audit_clients.check(pool, redis, client_log))
    return findings


async def not_applicable(pool: Any) -> str:
    """A line on what was not checked, for want of what it is about; empty: nothing."""
    paid = await pool.fetchval("select to_regclass('payments') is not null")
    return "" if paid else "--    A8, A9, R4: no payments here, so nothing to compare them with"


def _finding(name: str, title: str, drifts: Iterable[Drift]) -> Finding:
    checked = list(drifts)
    bad = [drift for drift in checked if drift is not None]
    return Finding(name, title, len(checked), len(bad), bad[0] if bad else None)


async def _reckonings(pool: Any, redis: Redis, since: datetime | None) -> Any:
    by_shard: dict[int, list[str]] = defaultdict(list)
    rows = await pool.fetch(
        "select id from workspaces where $1::timestamptz is null or id in"
        " (select workspace_id from journals where posted_at >= $1) order by id",
        since,
    )
    for row in rows:
        by_shard[keyspace.shard_of(row["id"])].append(row["id"])
    for shard, workspace_ids in sorted(by_shard.items()):
        for start in range(0, len(workspace_ids), _CHUNK):
            chunk = workspace_ids[start : start + _CHUNK]
            for one in await reckoning.reckon(pool, redis, shard, chunk):
                yield one


def balance_drift(found: Reckoning) -> Drift:
    """R1"""
    wallet = found.snapshot.wallet
    if wallet is None:
        return f"{found.workspace_id}: Redis has no wallet"
    if wallet.balance == found.expected_ucr:
        return None
    return (
        f"{found.workspace_id}: Redis {wallet.balance}, expected {found.expected_ucr}"
        f" (ledger {found.ledger_ucr}, deltas to come {found.unapplied_ucr},"
        f" on the stream {found.backlog_ucr}, in quarantine {found.quarantined_ucr})"
    )


def held_drift(found: Reckoning) -> Drift:
    """R2"""
    snapshot = found.snapshot
    held = snapshot.wallet.held if snapshot.wallet else 0
    leased: Counter[str] = Counter()
    for (boot, key_id), lease in snapshot.leases.items():
        leased[RESERVE if boot == RESERVE else key_id] += lease.credits_ucr
    if held != leased.total():
        return f"{found.workspace_id}: held {held}, leased {leased.total()}"
    del leased[RESERVE]
    for key_id in {*leased, *snapshot.counters}:
        counted = snapshot.counters.get(key_id, KeyCounters()).held_ucr
        if counted != leased[key_id]:
            return f"{found.workspace_id} {key_id}: counted {counted}, leased {leased[key_id]}"
    return None


def spent_drifts(reckonings: Iterable[Reckoning]) -> Iterable[Drift]:
    """R6: one for each key that has spent anything, or is said to have."""
    for found in reckonings:
        counters = found.snapshot.counters
        for key_id in sorted({*found.spent, *counters} - {""}):
            said = counters.get(key_id, KeyCounters()).spent_ucr
            spent = found.spent.get(key_id, 0) - found.unapplied_spent.get(key_id, 0)
            same = said == spent
            yield None if same else f"{found.workspace_id} {key_id}: said {said}, spent {spent}"


async def _stream_drifts(pool: Any, redis: Redis) -> list[Drift]:
    """R3: one for each entry that is still in a stream or pending."""
    drifts: list[Drift] = []
    for shard in range(SHARDS):
        watermark = await usage_records.watermark(pool, shard)
        async for page in _pages(redis, shard, watermark):
            drifts += await _unaccounted(pool, shard, page)
        drifts += await _forgotten(pool, redis, shard)
    return drifts


async def _pages(redis: Redis, shard: int, until: StreamId) -> Any:
    after = START
    while page := await read_range(redis, shard, after, until):
        yield page
        after = page[-1].id


async def _unaccounted(pool: Any, shard: int, page: list[Entry]) -> list[Drift]:
    """Entries that count as posted: each event must be a usage row or in quarantine."""
    today = datetime.now(UTC).date()
    events = {entry.id: usage_entries.read(entry, today) for entry in page}
    known = await usage_records.known(pool, [one for good, _ in events.values() for one in good])
    rows = await pool.fetch(
        "select distinct stream_id from quarantine where shard = $1 and stream_id = any($2)",
        shard,
        [str(entry.id) for entry in page],
    )
    quarantined = {row[0] for row in rows}
    drifts: list[Drift] = []
    for position, (good, bad) in events.items():
        recorded = not bad and all(one.event.request_id in known for one in good)
        fine = recorded or str(position) in quarantined
        whose = sorted({one.event.workspace_id for one in good})
        drifts.append(None if fine else f"shard {shard} entry {position} of {whose}")
    return drifts


async def _forgotten(pool: Any, redis: Redis, shard: int) -> list[Drift]:
    """Entries that were delivered: each must be there still, or posted."""
    stream = keyspace.stream_key(shard)
    drifts: list[Drift] = []
    after = "-"
    while True:
        try:
            pending: Any = await redis.xpending_range(
                stream, keyspace.STREAM_GROUP, after, "+", _PAGE
            )
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return drifts
        if not pending:
            return drifts
        for one in pending:
            position = usage_entries.stream_id(one["message_id"])
            there = await redis.xrange(stream, str(position), str(position))
            fine = there or position <= await usage_records.watermark(pool, shard)
            drifts.append(None if fine else f"shard {shard} entry {position}: gone, not posted")
        after = str(position.next)


def as_text(findings: list[Finding]) -> str:
    """A line for each invariant, and what drifted first."""
    lines = []
    for finding in findings:
        verdict = "ok   " if not finding.drifted else "DRIFT"
        figure = f"{finding.checked} checked"
        if finding.drifted:
            figure += f", {finding.drifted} drifted, first: {finding.first}"
        lines.append(f"{verdict} {finding.name:4} {finding.title}: {figure}")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    drifted = sum(finding.drifted for finding in findings)
    listed = [finding._asdict() for finding in findings]
    return msgspec.json.encode({"drifted": drifted, "findings": listed}).decode()
