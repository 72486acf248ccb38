"""A memory-mapped record of live exchanges and unacknowledged settles: what a crash leaves.

Owns one file of fixed slots per worker boot. A slot holds an open exchange from admission
on, with counters updated as chunks pass; then its settle, until Redis has acknowledged it.
Every write is a store into mapped memory: no system call, and after `kill -9` the page
cache still has it. `proxy.replay` reads the file of a dead worker.

Slot layout, little-endian, 2048 bytes:

| offset | bytes | what |
|---|---|---|
| 0 | 1 | state: 0 free, 1 open, 2 settled |
| 2 | 2 | era of the Redis to which the settle was sent |
| 4 | 4 | batch number of the settle within its shard; 0 = not sent yet |
| 24 | 2 | length of the opening |
| 26 | 2 | length of the settle |
| 32 | 896 | the opening, MessagePack |
| 928 | 1120 | the settle, MessagePack |

The state byte is written last: each state's bytes are whole before it says so. After the slots
come their records of progress, 16 bytes each; the live ones are elsewhere, see `progress`.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct as Layout
from typing import NamedTuple

import msgspec

from proxy import progress

SLOT_BYTES = 2048
FREE, OPEN, SETTLED = 0, 1, 2
_OPENING_AT, _SETTLE_AT = 32, 928
_BATCH = Layout("<I")
_SENT = Layout("<HI")
_LENGTH = Layout("<H")
_RECORD = progress.RECORD
_WHOLE = SLOT_BYTES + _RECORD.size
_PER_RECORD = SLOT_BYTES // _RECORD.size


class JournalFull(Exception):
    """No slot is free: admission must be refused."""


class Entry(NamedTuple):
    """One used slot as a replay reads it."""

    slot: int
    state: int
    batch: int
    relayed_bytes: int
    events: int
    envelope: int
    opening: bytes
    settle: bytes
    era: int = 0


class Journal:
    """The journal of one boot; the file is locked for as long as its worker lives."""

    def __init__(self, path: Path, slots: int) -> None:
        self.path = path
        unnamed = path.with_suffix(".new")  # no one takes it for an orphan until it is locked
        self.descriptor = allocated(unnamed, slots * _WHOLE)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(path)
        _sync_folder(path.parent)
        self._map = mmap.mmap(self.descriptor, slots * _WHOLE)
        self._records_at = slots * SLOT_BYTES
        apart = progress.create(path, slots * _RECORD.size)
        self._apart = apart
        self._records = self._map if apart is None else apart
        self._first_record = self._records_at if apart is None else 0
        self._progressed = False
        self._highest = 0
        self._free = list(range((slots - 1) * SLOT_BYTES, -1, -SLOT_BYTES))
        self._slots = slots
        self.era = 0  # which Redis settles are sent to, see `standing`; 0: not known

    def __repr__(self) -> str:
        return f"Journal({self.path.name}, used={self.used})"

    @property
    def used(self) -> int:
        return self._slots - len(self._free)

    def reserve(self) -> int:
        """A free slot, for an exchange about to be admitted. Raises JournalFull."""
        if not self._free:
            raise JournalFull
        slot = self._free.pop()
        if slot > self._highest:
            self._highest = slot
        return slot

    def open(self, slot: int, opening: bytes) -> None:
        """Record an admitted exchange in its reserved slot."""
        memory = self._map
        _BATCH.pack_into(memory, slot + 4, 0)
        self.progress(slot, 0, 0, 0)
        _LENGTH.pack_into(memory, slot + 24, len(opening))
        start = slot + _OPENING_AT
        assert len(opening) <= _SETTLE_AT - _OPENING_AT
        memory[start : start + len(opening)] = opening
        memory[slot] = OPEN

    def progress(self, slot: int, relayed_bytes: int, events: int, envelope: int) -> None:
        at = self._first_record + slot // _PER_RECORD
        _RECORD.pack_into(self._records, at, relayed_bytes, events, envelope)
        self._progressed = True

    def keep_progress(self) -> None:
        """Copy the records to the file; for the thread that syncs it. Raises OSError."""
        if self._apart is None or not self._progressed:
            return
        self._progressed = False
        end = self._highest // _PER_RECORD + _RECORD.size
        with memoryview(self._apart) as records, records[:end] as used:
            os.pwrite(self.descriptor, used, self._records_at)

    def settle(self, slot: int, settle: bytes) -> None:
        """The exchange has ended: from here on its settle counts, not its opening."""
        _write_settle(self._map, slot, settle)

    def batched(self, slot: int, number: int) -> None:
        """The settle is about to be sent as part of this batch of its shard."""
        _SENT.pack_into(self._map, slot + 2, self.era, number)

    def free(self, slot: int) -> None:
        """Redis has the settle, or nothing was admitted: the slot may be used again."""
        self._map[slot] = FREE
        self._free.append(slot)

    def close(self, remove: bool) -> None:
        self._map.close()
        if self._apart is not None:
            self._apart.close()
        if remove:
            self.path.unlink(missing_ok=True)
            progress.remove(self.path)
        os.close(self.descriptor)


class OrphanJournal:
    """A dead worker's journal, locked against a second reader."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.boot = path.stem
        self._descriptor = descriptor
        size = os.fstat(descriptor).st_size
        self._map = mmap.mmap(descriptor, size) if size else None
        self._slots_end = size // _WHOLE * SLOT_BYTES
        self._apart = progress.left_by(path, size - self._slots_end)

    def entries(self) -> Iterator[Entry]:
        """Every used slot. Raises msgspec.DecodeError for a file of another version."""
        memory = self._map
        if memory is None:
            return
        if len(memory) % _WHOLE:
            raise msgspec.DecodeError("a journal of another layout")
        records = memory if self._apart is None else self._apart
        first = self._slots_end if self._apart is None else 0
        for slot in range(0, self._slots_end, SLOT_BYTES):
            if memory[slot] in (OPEN, SETTLED):
                record = _RECORD.unpack_from(records, first + slot // _PER_RECORD)
                yield _entry(slot, memory[slot : slot + SLOT_BYTES], record)

    def settle(self, slot: int, settle: bytes, batch: int, era: int = 0) -> None:
        """Note how an entry is about to be settled, before it is: a second replay then
        sends the same batch under the same number."""
        assert self._map is not None
        _SENT.pack_into(self._map, slot + 2, era, batch)
        if self._map[slot] == OPEN:
            _write_settle(self._map, slot, settle)

    def free(self, slot: int) -> None:
        """Redis has the settle."""
        assert self._map is not None
        self._map[slot] = FREE

    def close(self, remove: bool) -> None:
        for memory in (self._map, self._apart):
            if memory is not None:
                memory.close()
        if remove:
            self.path.unlink(missing_ok=True)
            progress.remove(self.path)
        os.close(self._descriptor)


def allocated(path: Path, size: int) -> int:
    """A file of so many bytes, all of them on the disk: its descriptor.

    Raises OSError. A file with holes would take a full disk for a fatal signal, long after.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        why = f"no room for {size >> 20} MiB of journal: {error.strerror}"
        raise OSError(error.errno, why, str(path)) from None
    return descriptor


def _sync_folder(folder: Path) -> None:
    """A file is found again after a power loss only if its name is on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_settle(memory: mmap.mmap, slot: int, settle: bytes) -> None:
    assert len(settle) <= SLOT_BYTES - _SETTLE_AT
    _LENGTH.pack_into(memory, slot + 26, len(settle))
    start = slot + _SETTLE_AT
    memory[start : start + len(settle)] = settle
    memory[slot] = SETTLED


def _entry(at: int, slot: bytes, record: tuple[int, int, int]) -> Entry:
    state = slot[0]
    era, batch = _SENT.unpack_from(slot, 2)
    relayed_bytes, events, envelope = record
    (opening_length,) = _LENGTH.unpack_from(slot, 24)
    (settle_length,) = _LENGTH.unpack_from(slot, 26)
    return Entry(
        at,
        state,
        batch,
        relayed_bytes,
        events,
        envelope,
        slot[_OPENING_AT : _OPENING_AT + opening_length],
        slot[_SETTLE_AT : _SETTLE_AT + settle_length] if state == SETTLED else b"",
        era,
    )


def find_orphans(folder: Path) -> Iterator[OrphanJournal]:
    """Journals in `folder` whose worker no longer lives, each locked for the caller."""
    for path in sorted(folder.glob("*.journal")):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        if not path.exists():  # another reader finished with it in between
            os.close(descriptor)
            continue
        yield OrphanJournal(path, descriptor)
