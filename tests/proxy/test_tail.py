"""The tail of acknowledged settles: what is kept, for how long, and what a crash leaves of it."""

import os
import random
from pathlib import Path

import pytest

from proxy.tail import Record, Tail, left_behind

HALF = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "boot_1.tail"


def test_what_was_added_is_there_in_order(path: Path) -> None:
    tail = Tail(path, HALF)
    assert tail.records() == left_behind(path) == []
    records = [Record(3, 1, b"one"), Record(63, 7, b""), Record(0, 2**32 - 1, bytes(500))]
    for record in records:
        tail.add(*record)
    assert tail.records() == left_behind(path) == records
    tail.close(remove=False)
    assert left_behind(path) == records


def test_at_least_the_last_half_is_kept(path: Path) -> None:
    tail = Tail(path, HALF)
    rng = random.Random(1)
    for number in range(1, 500):
        tail.add(1, number, rng.randbytes(rng.randrange(300)))
        kept = tail.records()
        assert [one.number for one in kept] == list(range(kept[0].number, number + 1))
        size = sum(16 + len(one.events) for one in kept)
        assert kept[0].number == 1 or size >= HALF - 8 - 316
    tail.close(remove=True)
    assert not path.exists()


def test_a_batch_larger_than_a_half_is_no_error(path: Path) -> None:
    tail = Tail(path, HALF)
    tail.add(1, 1, bytes(HALF))
    assert tail.records() == []
    tail.add(1, 2, b"next")
    assert tail.records() == [Record(1, 2, b"next")]
    tail.close(remove=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_power_loss_leaves_whole_records_or_none(path: Path, seed: int) -> None:
    """Any part of the file may have missed the disk."""
    tail = Tail(path, HALF)
    rng = random.Random(seed)
    records = {}
    for number in range(1, 30):
        records[number] = Record(2, number, rng.randbytes(200))
        tail.add(*records[number])
    tail.close(remove=False)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 512)
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)
    for record in left_behind(path):
        assert record == records.get(record.number)


def test_no_file_is_no_record(path: Path) -> None:
    assert left_behind(path) == []
    path.write_bytes(b"")
    assert left_behind(path) == []


def test_it_is_on_the_disk_from_the_start(path: Path) -> None:
    tail = Tail(path, 64 * HALF)
    assert path.stat().st_blocks * 512 >= 128 * HALF
    assert os.fstat(tail.descriptor).st_size == 128 * HALF
    tail.close(remove=True)
