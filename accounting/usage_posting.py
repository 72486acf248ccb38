"""One batch of stream entries into the record of money, in one SQL transaction, exactly once.

Reads top to bottom as it happens: events are decoded, wallets locked, burns planned, rows
inserted, and for them grants, transfers, rollups, offsets and word to the outbox are written.
All of it commits or none; whether to acknowledge, retry or give up is `consumer.py`'s part.

Theory of operation. Every event is first taken to be new, which nearly all are. The insert
then counts how many really were; if some had been recorded before, the transaction is rolled
back and repeated without them. So nothing is ever planned for a row that is not written.
What came late has been taken from no balance: a delta takes it, for what is new alone; so it may
be told any number of times. An exchange told anew is posted as what it was told before, if that
is not recorded, and then revised in the order of its revisions (`revisions.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any, NamedTuple

from accounting import (
    deltas,
    grants,
    ledger,
    outbox,
    partitions,
    postings,
    quarantine,
    revisions,
    usage_entries,
)
from accounting import usage_records as records
from accounting.ledger import Journal
from accounting.outbox import Told
from accounting.postings import Charge, Posting
from accounting.usage_entries import Billed, Defect, Entry, StreamId
from accounting.usage_records import Record


class Posted(NamedTuple):
    """What became of a batch's events."""

    new: int = 0
    revised: int = 0
    duplicates: int = 0
    quarantined: int = 0


class _Batch(NamedTuple):
    """Entries read: first tellings, later ones, what is unfit, how far; and events in all."""

    fresh: list[Billed]
    again: list[Billed]
    defects: list[Defect]
    positions: dict[int, StreamId]
    told: int


class _SomeAreRecordedError(Exception):
    """Rolls the transaction back: not every event was new."""


class _Planned(NamedTuple):
    """One workspace's journal, and what it burns."""

    journal: Journal
    posting: Posting


async def post(
    connection: Any, entries: Sequence[Entry], today: date, reason: str | None = None
) -> Posted:
    """Post entries in their order and move the offsets past them.

    With a `reason` nothing of them is posted: all goes to quarantine. Raises asyncpg's errors,
    and then nothing has happened.
    """
    billed, defects = _read(entries, today, reason)
    positions: dict[int, StreamId] = {}
    for entry in entries:
        positions[entry.shard] = max(entry.id, positions.get(entry.shard, usage_entries.START))
    again = sorted(
        (one for one in billed if one.event.revision), key=lambda one: one.event.revision
    )
    first = sorted(billed, key=lambda one: one.event.revision) if again else billed
    fresh = list({one.event.request_id: one for one in reversed(first)}.values())
    await partitions.ensure(connection, {one.day for one in fresh})
    batch = _Batch(fresh, again, defects, positions, len(billed))
    try:
        async with connection.transaction():
            return await _post(connection, batch)
    except _SomeAreRecordedError:
        async with connection.transaction():
            return await _post(connection, batch, without_known=True)


def _read(
    entries: Iterable[Entry], today: date, reason: str | None
) -> tuple[list[Billed], list[Defect]]:
    billed: list[Billed] = []
    defects: list[Defect] = []
    for entry in entries:
        if reason is not None:
            defects += usage_entries.condemned(entry, reason)
        else:
            good, bad = usage_entries.read(entry, today)
            billed += good
            defects += bad
    return billed, defects


async def _post(connection: Any, batch: _Batch, without_known: bool = False) -> Posted:
    fresh, again = batch.fresh, batch.again
    touched = [one.event.workspace_id for one in (*fresh, *again)]
    homes = await ledger.lock_wallets(connection, touched)
    if without_known:  # asked under the lock, under which all events of a workspace are recorded
        known = await records.known(connection, fresh)
        fresh = [one for one in fresh if one.event.request_id not in known]
    lost = [usage_entries.homeless(one) for one in fresh if one.event.workspace_id not in homes]
    housed = [one for one in fresh if one.event.workspace_id in homes] if lost else fresh
    first = sum(not one.event.revision for one in fresh)
    if again:
        housed = [usage_entries.as_told_before(one) for one in housed]
    planned = await _plan(connection, housed)
    if housed and await records.insert(connection, _records(housed, planned)) != len(housed):
        raise _SomeAreRecordedError
    quarantined = 0
    if batch.defects or lost:
        quarantined = await quarantine.put(connection, batch.defects + lost)
    await records.advance(connection, batch.positions)
    if planned:
        await _write(connection, planned)
        await _take_late(connection, housed, planned)
    revised = 0
    for one in again:
        revised += await revisions.revise_from_stream(connection, one)
    duplicates = max(0, batch.told - first - revised)
    return Posted(len(housed), revised, duplicates, quarantined)


async def _plan(connection: Any, fresh: list[Billed]) -> dict[str, _Planned]:
    """Journals by workspace, for those with something to pay."""
    charges: dict[str, list[Charge]] = defaultdict(list)
    for one in fresh:
        event = one.event
        if event.charge_ucr:
            charge = Charge(event.request_id, event.started_at_us, event.charge_ucr)
            charges[event.workspace_id].append(charge)
    if not charges:
        return {}
    live = await grants.live(connection, list(charges))
    journal_ids = await ledger.new_journal_ids(connection, len(charges))
    planned = {}
    for journal_id, (workspace_id, owed) in zip(journal_ids, charges.items(), strict=True):
        posting = postings.plan(owed, live.get(workspace_id, []))
        journal = Journal(
            kind="usage",
            workspace_id=workspace_id,
            dedupe_key=f"usage:{min(charge.request_id for charge in owed)}",
            transfers=posting.transfers,
            id=journal_id,
        )
        planned[workspace_id] = _Planned(journal, posting)
    return planned


def _records(fresh: list[Billed], planned: dict[str, _Planned]) -> Iterable[Record]:
    for one in fresh:
        event = one.event
        if event.charge_ucr:
            journal, posting = planned[event.workspace_id]
            yield Record(one, posting.burns[event.request_id], journal.id)
        else:
            yield Record(one, None, None)


async def _write(connection: Any, planned: dict[str, _Planned]) -> None:
    """What the usage does to grants and accounts, and what is to be told of it."""
    burned: dict[str, int] = {}
    told: list[Told] = []
    for workspace_id, (journal, posting) in planned.items():
        burned |= posting.burned
        for grant_id in posting.exhausted:
            told.append(Told(workspace_id, journal.id, "grant.exhausted", {"grant_id": grant_id}))
        if posting.short_ucr:
            short = {"short_ucr": posting.short_ucr}
            told.append(Told(workspace_id, journal.id, "wallet.overdrawn", short))
    if burned:
        await grants.burn(connection, burned)
    await ledger.post(connection, [journal for journal, _posting in planned.values()])
    if told:
        await outbox.tell(connection, told)


async def _take_late(connection: Any, posted: list[Billed], planned: dict[str, _Planned]) -> None:
    """Have Redis take what it has not, key by key: the balance may go below zero by that."""
    owed: Counter[tuple[str, str]] = Counter()
    for one in posted:
        if one.late:
            owed[one.event.workspace_id, one.event.key_id] += one.event.charge_ucr
    for (workspace_id, key_id), charge in owed.items():
        if charge:
            journal_id = planned[workspace_id].journal.id
            await deltas.record(
                connection, workspace_id, -charge, journal_id, key_id=key_id, spent_ucr=charge
            )
