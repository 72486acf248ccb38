"""The journal: what a crash leaves at any moment, and that one reader at a time reads it."""

import errno
import fcntl
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy import progress
from proxy.journal import (
    OPEN,
    SETTLED,
    SLOT_BYTES,
    Entry,
    Journal,
    JournalFull,
    OrphanJournal,
    find_orphans,
)

OPENING, SETTLE = b"opening of %d", b"settle of %d, a little longer"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No memory apart for progress: it is kept in the journal at once."""
    monkeypatch.setattr(progress, "_MEMORY", tmp_path / "nowhere")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "boot_1.journal"


def read(data: bytes, folder: Path) -> list[Entry]:
    """What a replay would find in a file of these bytes."""
    copy = folder / "copy.bytes"
    copy.write_bytes(data)
    orphan = OrphanJournal(copy, os.open(copy, os.O_RDWR))
    entries = list(orphan.entries())
    orphan.close(remove=True)
    return entries


@pytest.mark.usefixtures("beside")
def test_an_exchange_from_opening_to_free(path: Path, tmp_path: Path) -> None:
    journal = Journal(path, 4)

    def found() -> list[Entry]:
        return read(path.read_bytes(), tmp_path)

    slot = journal.reserve()
    assert (found(), journal.used) == ([], 1)
    journal.open(slot, b"opening")
    assert found() == [Entry(slot, OPEN, 0, 0, 0, 0, b"opening", b"")]
    journal.progress(slot, 2**40, 7, 150)
    assert found() == [Entry(slot, OPEN, 0, 2**40, 7, 150, b"opening", b"")]
    journal.settle(slot, b"settle")
    assert found() == [Entry(slot, SETTLED, 0, 2**40, 7, 150, b"opening", b"settle")]
    journal.batched(slot, 9)
    assert found() == [Entry(slot, SETTLED, 9, 2**40, 7, 150, b"opening", b"settle")]
    journal.free(slot)
    assert (found(), journal.used) == ([], 0)
    assert repr(journal) == "Journal(boot_1.journal, used=0)"
    journal.close(remove=True)
    assert not path.exists()


def test_a_slot_used_again_carries_nothing_over(path: Path, tmp_path: Path) -> None:
    journal = Journal(path, 1)
    slot = journal.reserve()
    journal.open(slot, b"a long opening")
    journal.progress(slot, 10, 2, 5)
    journal.settle(slot, b"a long settle")
    journal.batched(slot, 3)
    journal.free(slot)
    assert journal.reserve() == slot
    journal.open(slot, b"short")
    assert read(path.read_bytes(), tmp_path) == [Entry(slot, OPEN, 0, 0, 0, 0, b"short", b"")]
    journal.close(remove=True)


def test_a_full_journal_refuses(path: Path) -> None:
    journal = Journal(path, 2)
    slots = {journal.reserve(), journal.reserve()}
    assert slots == {0, SLOT_BYTES}
    with pytest.raises(JournalFull):
        journal.reserve()
    journal.free(slots.pop())
    journal.reserve()
    journal.close(remove=True)


def test_the_longest_entries_fit_and_longer_ones_touch_nothing(path: Path, tmp_path: Path) -> None:
    journal = Journal(path, 2)
    first, second = journal.reserve(), journal.reserve()
    for slot in (first, second):
        journal.open(slot, b"o" * 896)
        journal.settle(slot, b"s" * 1120)
    before = path.read_bytes()
    assert [(len(e.opening), len(e.settle)) for e in read(before, tmp_path)] == [(896, 1120)] * 2
    with pytest.raises(AssertionError):
        journal.settle(first, b"s" * 1121)
    assert read(path.read_bytes(), tmp_path) == read(before, tmp_path)
    journal.free(first)
    journal.reserve()
    with pytest.raises(AssertionError):
        journal.open(first, b"o" * 897)
    assert [entry.slot for entry in read(path.read_bytes(), tmp_path)] == [second]
    journal.close(remove=True)


class Watched(bytearray):
    """Memory that keeps a copy of itself before each store: what a crash there would leave."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.copies: list[bytes] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self.copies.append(bytes(self))
        super().__setitem__(key, value)

    def close(self) -> None:
        return


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("seed", range(5))
def test_a_crash_at_any_store_leaves_whole_entries(path: Path, tmp_path: Path, seed: int) -> None:
    """Random operations on few slots; each copy holds, per slot, the state before or after."""
    print("seed", seed)
    chance = random.Random(seed)
    journal = Journal(path, 3)
    journal._map.close()
    memory = Watched(3 * (SLOT_BYTES + progress.RECORD.size))
    journal._map = journal._records = memory  # type: ignore[assignment]
    live: dict[int, Entry] = {}  # the simplest model of the file
    number = 0
    for _ in range(150):
        before = dict(live)
        memory.copies.clear()
        slot = chance.choice([*live, None, None])  # type: ignore[list-item]
        if slot is None:
            if len(live) == 3:
                continue
            number += 1
            slot = journal.reserve()
            journal.open(slot, OPENING % number)
            live[slot] = Entry(slot, OPEN, 0, 0, 0, 0, OPENING % number, b"")
        elif live[slot].state == OPEN and chance.random() < 0.5:
            journal.progress(slot, number * 10, number, 3)
            live[slot] = live[slot]._replace(relayed_bytes=number * 10, events=number, envelope=3)
        elif live[slot].state == OPEN:
            journal.settle(slot, SETTLE % number)
            live[slot] = live[slot]._replace(state=SETTLED, settle=SETTLE % number)
        elif not live[slot].batch:
            journal.batched(slot, number)
            live[slot] = live[slot]._replace(batch=number)
        else:
            journal.free(slot)
            del live[slot]
        for copy in memory.copies:
            assert {entry.slot: entry for entry in read(copy, tmp_path)} in (before, live)
        assert {entry.slot: entry for entry in read(bytes(memory), tmp_path)} == live
    journal.close(remove=True)


def test_a_live_journal_is_no_orphan(path: Path) -> None:
    journal = Journal(path, 4)
    assert list(find_orphans(path.parent)) == []
    journal.close(remove=False)
    [orphan] = find_orphans(path.parent)
    assert (orphan.boot, orphan.path) == ("boot_1", path)
    orphan.close(remove=True)
    assert list(path.parent.iterdir()) == []


def test_no_journal_is_to_be_found_before_it_is_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that starts must not lose its new journal to one that looks for orphans."""
    seen: list[list[OrphanJournal]] = []
    lock = fcntl.flock

    def look_first(descriptor: int, operation: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lock)
            seen.append(list(find_orphans(path.parent)))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", look_first)
    journal = Journal(path, 4)
    assert seen == [[]]
    assert path.exists()
    journal.close(remove=True)


def test_an_orphan_has_one_reader_at_a_time(path: Path) -> None:
    Journal(path, 4).close(remove=False)
    [first] = find_orphans(path.parent)
    assert list(find_orphans(path.parent)) == []
    first.close(remove=False)
    [second] = find_orphans(path.parent)
    second.close(remove=True)


def test_another_process_sees_the_lock_and_its_end(path: Path) -> None:
    """Two processes: while the owner lives no one reads; killed, its entries are all there."""
    program = (
        "import sys; from pathlib import Path; from proxy.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), 8)\n"
        "slot = journal.reserve(); journal.open(slot, b'opening')\n"
        "journal.progress(slot, 5, 2, 1)\n"
        "print('open', flush=True); sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        assert list(find_orphans(path.parent)) == []
        owner.kill()
    finally:
        owner.communicate(timeout=10)
    [orphan] = find_orphans(path.parent)
    assert list(orphan.entries()) == [Entry(0, OPEN, 0, 5, 2, 1, b"opening", b"")]
    orphan.close(remove=True)


def test_a_file_that_was_never_filled_holds_nothing(path: Path) -> None:
    path.touch()
    [orphan] = find_orphans(path.parent)
    assert list(orphan.entries()) == []
    orphan.close(remove=True)
    assert not path.exists()


def test_a_reader_finished_meanwhile_leaves_nothing_to_find(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(path, 4).close(remove=False)
    opened = os.open

    def open_then_lose(*arguments: Any, **more: Any) -> int:
        descriptor = opened(*arguments, **more)
        path.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_then_lose)
    assert list(find_orphans(path.parent)) == []


def test_a_replay_notes_settles_and_batches(path: Path) -> None:
    journal = Journal(path, 4)
    slots = [journal.reserve() for _ in range(3)]
    for slot in slots:
        journal.open(slot, b"opening")
    journal.settle(slots[1], b"own settle")
    journal.close(remove=False)
    [orphan] = find_orphans(path.parent)
    orphan.settle(slots[0], b"estimate", 5)
    orphan.settle(slots[1], b"ignored: it has one", 6)
    orphan.settle(slots[2], b"estimate", 7)
    orphan.free(slots[2])
    orphan.close(remove=False)
    [again] = find_orphans(path.parent)
    assert list(again.entries()) == [
        Entry(slots[0], SETTLED, 5, 0, 0, 0, b"opening", b"estimate"),
        Entry(slots[1], SETTLED, 6, 0, 0, 0, b"opening", b"own settle"),
    ]
    again.close(remove=True)


def test_a_settle_knows_to_which_redis_it_was_sent(path: Path, tmp_path: Path) -> None:
    journal = Journal(path, 4)
    first, second = journal.reserve(), journal.reserve()
    for slot in (first, second):
        journal.settle(slot, b"settle")
    journal.batched(first, 1)
    journal.era = 65535
    journal.batched(second, 2)
    found = {entry.slot: (entry.batch, entry.era) for entry in read(path.read_bytes(), tmp_path)}
    assert found == {first: (1, 0), second: (2, 65535)}
    journal.close(remove=True)


def test_all_of_it_is_on_the_disk_from_the_start(path: Path) -> None:
    journal = Journal(path, 512)
    assert path.stat().st_blocks * 512 >= 512 * SLOT_BYTES
    journal.close(remove=True)


def test_a_full_disk_is_told_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for 1 MiB of journal: No space left on device"):
        Journal(path, 512)
    assert list(path.parent.iterdir()) == []


def test_a_disk_that_is_really_full_is_an_error_at_the_start(path: Path) -> None:
    """And no signal later on: the limit on a file's size stands for the end of the disk."""
    script = (
        "import resource, sys; from pathlib import Path; from proxy.journal import Journal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: Journal(Path(sys.argv[1]), 32768)\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no room for 64 MiB of journal" in done.stdout
    assert list(path.parent.iterdir()) == []
