"""The journal's way to the disk: rounds in order, trouble told once, an end that is awaited."""

import os
import threading
from pathlib import Path

import pytest

from proxy.journal_sync import JournalSync
from tests.waiting import eventually_blocking


def test_every_file_is_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, bool]] = []
    main = threading.get_ident()
    monkeypatch.setattr(
        os, "fdatasync", lambda one: synced.append((one, threading.get_ident() == main))
    )
    sync = JournalSync([7, 5], 0.001, print)
    sync.start()
    eventually_blocking(lambda: sync.rounds >= 3)
    sync.stop()
    rounds = sync.rounds
    assert synced == [(7, False), (5, False)] * rounds
    assert repr(sync) == f"JournalSync(rounds={rounds})"


def test_a_real_file_is_written_once_more_at_the_end(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        sync = JournalSync([file.fileno()], 3600, print)
        sync.start()
        sync.stop()
        assert sync.rounds == 1


def test_one_that_never_began_stops_at_once() -> None:
    JournalSync([], 1, print).stop()


def test_trouble_is_told_once_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles: list[str] = []
    calls = iter(["EIO", "EIO", "", "EIO", "EROFS", "EROFS"])
    done = threading.Event()

    def disk(_: int) -> None:
        name = next(calls, None)
        if name is None:
            done.set()
        elif name:
            raise OSError(getattr(__import__("errno"), name), name)

    monkeypatch.setattr(os, "fdatasync", disk)
    sync = JournalSync([1], 0.001, troubles.append)
    sync.start()
    assert done.wait(5)
    sync.stop()
    assert troubles == ["EIO", "EIO", "EROFS"]
