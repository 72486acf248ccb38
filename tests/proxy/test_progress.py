"""Progress in memory apart from the journal: there after a kill, on the disk after each round."""

import os
from pathlib import Path

import pytest

from proxy import progress
from proxy.journal import Entry, Journal, find_orphans
from proxy.journal_sync import JournalSync


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for memory of these tests alone."""
    found = tmp_path / "memory"
    found.mkdir()
    monkeypatch.setattr(progress, "_MEMORY", found)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "journals"
    found.mkdir()
    return found


def begun(folder: Path, slots: int = 4) -> tuple[Journal, int]:
    """A journal with one exchange open."""
    journal = Journal(folder / "boot_1.journal", slots)
    journal.reserve()
    slot = journal.reserve()
    journal.open(slot, b"opening")
    return journal, slot


def found_by_a_replay(folder: Path, remove: bool = False) -> list[Entry]:
    [orphan] = find_orphans(folder)
    entries = list(orphan.entries())
    orphan.close(remove)
    return entries


def relayed(entries: list[Entry]) -> list[tuple[int, int, int]]:
    return [(entry.relayed_bytes, entry.events, entry.envelope) for entry in entries]


def test_a_killed_worker_leaves_its_last_store(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 2**40, 7, 150)
    journal.close(remove=False)
    assert relayed(found_by_a_replay(folder)) == [(2**40, 7, 150)]
    assert len(list(memory.iterdir())) == 1
    assert relayed(found_by_a_replay(folder, remove=True)) == [(2**40, 7, 150)]
    assert not list(memory.iterdir()) and not list(folder.iterdir())


def test_a_host_without_power_leaves_the_last_round(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    sync = JournalSync([journal.descriptor], 1000, lambda why: None, journal.keep_progress)
    sync.start()
    sync.stop()
    assert sync.rounds == 1
    journal.progress(slot, 200, 2, 50)
    journal.close(remove=False)
    for path in memory.iterdir():
        path.unlink()
    assert relayed(found_by_a_replay(folder)) == [(100, 1, 50)]


def test_a_slot_used_again_begins_anew(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    journal.free(slot)
    assert journal.reserve() == slot
    journal.open(slot, b"another")
    journal.keep_progress()
    journal.close(remove=False)
    assert relayed(found_by_a_replay(folder)) == [(0, 0, 0)]


def test_nothing_new_is_not_copied(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    journal.keep_progress()
    stored = journal.path.stat().st_mtime_ns
    os.utime(journal.path, ns=(0, 0))
    journal.keep_progress()
    assert journal.path.stat().st_mtime_ns == 0 != stored
    journal.close(remove=True)
    assert not list(memory.iterdir())


def test_without_a_place_it_is_kept_beside_the_journal(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(progress, "_MEMORY", folder / "nowhere")
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    journal.keep_progress()
    journal.close(remove=False)
    assert relayed(found_by_a_replay(folder, remove=True)) == [(100, 1, 50)]


def test_memory_of_another_size_is_not_read(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    journal.keep_progress()
    journal.close(remove=False)
    [path] = memory.iterdir()
    os.truncate(path, 3)
    assert relayed(found_by_a_replay(folder)) == [(100, 1, 50)]


def test_a_file_put_in_its_place_is_not_followed(memory: Path, folder: Path) -> None:
    journal, slot = begun(folder)
    journal.progress(slot, 100, 1, 50)
    journal.keep_progress()
    journal.close(remove=False)
    [path] = memory.iterdir()
    elsewhere = folder / "elsewhere"
    elsewhere.write_bytes(path.read_bytes().replace(b"\x64", b"\x65", 1))
    path.unlink()
    path.symlink_to(elsewhere)
    assert relayed(found_by_a_replay(folder)) == [(100, 1, 50)]
    taken = Journal(folder / "boot_2.journal", 4)
    taken.close(remove=True)
    assert path.is_symlink()  # nothing of others is taken away


def test_memory_of_journals_that_are_gone_is_let_go(memory: Path, folder: Path) -> None:
    journal, _ = begun(folder)
    journal.close(remove=False)
    journal.path.unlink()
    another = Journal(folder / "boot_2.journal", 4)
    assert len(list(memory.iterdir())) == 1
    another.close(remove=True)
    assert not list(memory.iterdir())
