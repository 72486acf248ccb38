"""What Redis should say of a workspace, given the ledger, at one provable instant.

    balance = wallets − receivable             the ledger, up to its position in the stream
              − deltas not yet applied
              − charges on the stream after that position
              − charges in quarantine

An exact equality, also while requests are served and posted; the audit checks it, a rebuild
restores it.

Theory of operation. The ledger's figures and its position (the watermark) are read in one
repeatable-read transaction, then each workspace with its stream's last id by one script, then
the entries in between. The one thing that could go wrong is that some of those were posted and
trimmed before they were read. An entry is trimmed only after a watermark at or above it has
been committed; so if, after reading a page, the watermark is still where that page begins,
nothing of it was missing. Otherwise all is read again.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from msgspec import Struct
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from accounting import usage_entries, usage_records
from accounting.contract import keyspace, scripts
from accounting.contract.keyspace import KeyCounters, LeaseRecord, Wallet
from accounting.usage_entries import START, Billed, Entry, StreamId
from accounting.usage_stream import read_range

_ATTEMPTS = 200
_wallets = msgspec.msgpack.Decoder(Wallet)
_counters = msgspec.msgpack.Decoder(KeyCounters)
_leases = msgspec.msgpack.Decoder(LeaseRecord)


class RestlessError(Exception):
    """The stores moved on during every attempt to read them together."""


class _MovedError(Exception):
    """What was read does not belong together: read again."""


class Snapshot(Struct):
    """A workspace in Redis and the last id of its stream, at one instant."""

    position: StreamId
    wallet: Wallet | None
    counters: dict[str, KeyCounters]  # by key id
    leases: dict[tuple[str, str], LeaseRecord]  # by worker boot and key id


class Reckoning(Struct):
    """One workspace in both stores; amounts in µcr."""

    workspace_id: str
    snapshot: Snapshot
    ledger_ucr: int
    last_delta: int
    unapplied_ucr: int
    backlog_ucr: int
    quarantined_ucr: int
    spent: dict[str, int]  # by key id, once every delta known to the ledger has been applied
    unapplied_spent: dict[str, int]  # of that, what those deltas have yet to add

    @property
    def expected_ucr(self) -> int:
        """The balance that Redis should have."""
        return self.ledger_ucr - self.unapplied_ucr - self.backlog_ucr - self.quarantined_ucr

    @property
    def settled_ucr(self) -> int:
        """The balance once every delta known to the ledger has been applied."""
        return self.expected_ucr + self.unapplied_ucr


async def snapshots(redis: Redis, workspace_ids: Sequence[str]) -> list[Snapshot]:
    """Each at an instant of its own."""
    try:
        return await _snapshots(redis, workspace_ids)
    except NoScriptError:
        await scripts.load_all(redis)
        return await _snapshots(redis, workspace_ids)


async def _snapshots(redis: Redis, workspace_ids: Sequence[str]) -> list[Snapshot]:
    digest = scripts.SCRIPTS["snapshot"].digest
    async with redis.pipeline(transaction=False) as pipe:
        for workspace_id in workspace_ids:
            stream = keyspace.stream_key(keyspace.shard_of(workspace_id))
            pipe.evalsha(digest, 2, keyspace.workspace_key(workspace_id), stream)
        return [_snapshot(reply) for reply in await pipe.execute()]


def _snapshot(reply: list[bytes]) -> Snapshot:
    found = Snapshot(usage_entries.stream_id(reply[0]), None, {}, {})
    for name, value in zip(reply[1::2], reply[2::2], strict=True):
        kind, _colon, rest = name.decode().partition(":")
        if kind == "w":
            found.wallet = _wallets.decode(value)
        elif kind == "c":
            found.counters[rest] = _counters.decode(value)
        elif kind == "l":
            boot, _colon, key_id = rest.rpartition(":")
            found.leases[boot, key_id] = _leases.decode(value)
    return found


async def reckon(
    pool: Any, redis: Redis, shard: int, workspace_ids: Sequence[str]
) -> list[Reckoning]:
    """Both stores on some workspaces of one shard. Raises RestlessError."""
    for _ in range(_ATTEMPTS):
        try:
            async with (
                pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                return await _reckon(pool, connection, redis, shard, list(workspace_ids))
        except _MovedError:
            continue
    raise RestlessError(f"shard {shard} moved on {_ATTEMPTS} times while it was read")


async def _reckon(
    pool: Any, connection: Any, redis: Redis, shard: int, workspace_ids: list[str]
) -> list[Reckoning]:
    watermark = await usage_records.watermark(connection, shard)
    ledger = await _ledger(connection, workspace_ids)
    last_deltas = await _last_deltas(connection, workspace_ids)
    found = dict(zip(workspace_ids, await snapshots(redis, workspace_ids), strict=True))
    unapplied, unapplied_spent = await _unapplied(connection, found, last_deltas)
    backlog = await _backlog(pool, connection, redis, shard, watermark, found)
    quarantined = await _quarantined(connection, workspace_ids)
    spent = await _spent(connection, workspace_ids)
    return [
        Reckoning(
            workspace_id=workspace_id,
            snapshot=snapshot,
            ledger_ucr=ledger.get(workspace_id, 0),
            last_delta=last_deltas.get(workspace_id, 0),
            unapplied_ucr=unapplied[workspace_id].total(),
            backlog_ucr=backlog[workspace_id].total(),
            quarantined_ucr=quarantined[workspace_id].total(),
            spent=_sum(spent[workspace_id], backlog[workspace_id], quarantined[workspace_id]),
            unapplied_spent=dict(unapplied_spent[workspace_id]),
        )
        for workspace_id, snapshot in found.items()
    ]


async def _ledger(connection: Any, workspace_ids: list[str]) -> dict[str, int]:
    """What the workspaces own, less what they have used beyond it."""
    rows = await connection.fetch(
        "select workspace_id, sum(credits_ucr - debits_ucr)::bigint from ledger_accounts"
        " where workspace_id = any($1) group by 1",
        workspace_ids,
    )
    return dict(rows)


async def _last_deltas(connection: Any, workspace_ids: list[str]) -> dict[str, int]:
    rows = await connection.fetch(
        "select workspace_id, last_delta from wallets where workspace_id = any($1)", workspace_ids
    )
    return dict(rows)


async def _unapplied(
    connection: Any, found: dict[str, Snapshot], last_deltas: dict[str, int]
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """What deltas that Redis had not applied when it was read add, by key: µcr, and spend."""
    applied = {}
    for workspace_id, snapshot in found.items():
        applied[workspace_id] = snapshot.wallet.last_delta if snapshot.wallet else 0
        if applied[workspace_id] > last_deltas.get(workspace_id, 0):
            raise _MovedError  # applied one that is newer than what we see of the ledger
    rows = await connection.fetch(
        "select d.workspace_id, d.key_id, sum(d.amount_ucr)::bigint as charge,"
        " sum(d.spent_ucr)::bigint as spent from redis_deltas d"
        " join unnest($1::text[], $2::bigint[]) as x(workspace_id, applied)"
        " on d.workspace_id = x.workspace_id and d.delta_id > x.applied group by 1, 2",
        list(applied),
        list(applied.values()),
    )
    return _by_key(rows), _by_key(rows, "spent")


async def _backlog(
    pool: Any,
    connection: Any,
    redis: Redis,
    shard: int,
    watermark: StreamId,
    found: dict[str, Snapshot],
) -> dict[str, Counter[str]]:
    """Charges after the watermark and up to each snapshot, by workspace and key."""
    charges: dict[str, Counter[str]] = defaultdict(Counter)
    after = watermark
    until = max((snapshot.position for snapshot in found.values()), default=START)
    today = datetime.now(UTC).date()
    while after < until:
        page = await read_range(redis, shard, after, until)
        if await usage_records.watermark(pool, shard) > after:
            raise _MovedError
        for position, workspace_id, key_id, charge in await _charges(connection, page, today):
            if workspace_id in found and position <= found[workspace_id].position:
                charges[workspace_id][key_id] += charge
        after = page[-1].id if page else until
    return charges


async def _charges(
    connection: Any, entries: list[Entry], today: date
) -> list[tuple[StreamId, str, str, int]]:
    """What entries took from balances: position, workspace, key, µcr.

    Less what is in the ledger anyway: after Redis has lost its last second, workers settle
    again what accounting has posted.
    """
    found: list[tuple[StreamId, str, str, int]] = []
    billed: list[tuple[StreamId, Billed]] = []
    for entry in entries:
        good, bad = usage_entries.read(entry, today)
        billed += [(entry.id, one) for one in good]
        for defect in bad:
            if defect.workspace_id is not None and defect.charge_ucr is not None:
                key_id = defect.key_id or ""
                found.append((entry.id, defect.workspace_id, key_id, defect.charge_ucr))
    known = await usage_records.known(connection, [one for _position, one in billed])
    for position, one in billed:
        event = one.event
        if not one.late and event.revision > known.get(event.request_id, -1):
            found.append((position, event.workspace_id, event.key_id, event.taken_ucr))
    return found


async def _quarantined(connection: Any, workspace_ids: list[str]) -> dict[str, Counter[str]]:
    rows = await connection.fetch(
        "select workspace_id, key_id, sum(charge_ucr)::bigint as charge from quarantine"
        " where workspace_id = any($1) and resolved_at is null and charge_ucr is not null"
        " group by 1, 2",
        workspace_ids,
    )
    return _by_key(rows)


async def _spent(connection: Any, workspace_ids: list[str]) -> dict[str, Counter[str]]:
    rows = await connection.fetch(
        "select workspace_id, key_id, sum(charge_ucr)::bigint as charge from usage_hourly"
        " where workspace_id = any($1) group by 1, 2",
        workspace_ids,
    )
    return _by_key(rows)


def _by_key(rows: list[Any], column: str = "charge") -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        found[row["workspace_id"]][row["key_id"] or ""] += row[column]
    return found


def _sum(*counters: Counter[str]) -> dict[str, int]:
    """Key by key, also where a sum is below zero, which adding counters would drop."""
    total: Counter[str] = Counter()
    for one in counters:
        total.update(one)
    return dict(total)
