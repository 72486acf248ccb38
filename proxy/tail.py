"""The last settles that Redis acknowledged: to be told again to a Redis that has lost them.

Owns one memory-mapped file per worker boot, beside its journal. A Redis that comes back without
its last seconds has a lower batch number for this boot than the worker was told; everything
here above that number is then handed to accounting, which knows what it has posted already.

Layout: two halves, filled in turn, so that at least one whole half is there at any time, some
seconds' worth at full speed. A half begins with the bytes used and its turn; then come records:
length, checksum, batch number, shard, then the batch's usage events as they were sent. `used` is
written last; a record that a power loss cut in two fails its checksum.
"""

import mmap
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from struct import Struct as Layout
from typing import NamedTuple

from proxy.journal import allocated

HALF_BYTES = 8 * 1024 * 1024
_KEPT_SECONDS = 10.0
_HEADER = Layout("<II")
_RECORD = Layout("<IIII")


class Record(NamedTuple):
    """One batch; `events` is its MessagePack list of usage events."""

    shard: int
    number: int
    events: bytes


class Tail:
    """The tail of one boot."""

    def __init__(self, path: Path, half_bytes: int = HALF_BYTES) -> None:
        """Raises OSError, also where the disk is full."""
        self.path = path
        self._half_bytes = half_bytes
        self.descriptor = allocated(path, 2 * half_bytes)
        self._map = mmap.mmap(self.descriptor, 2 * half_bytes)
        self._turn = 0
        self._begin(0)

    def __repr__(self) -> str:
        return f"Tail({self.path.name}, used={self._at - self._half})"

    def _begin(self, half: int) -> None:
        self._turn += 1
        self._half = half
        self._at = half + _HEADER.size
        self._end = half + self._half_bytes
        _HEADER.pack_into(self._map, half, _HEADER.size, self._turn)

    def add(self, shard: int, number: int, events: bytes) -> None:
        """Redis has acknowledged this batch."""
        size = _RECORD.size + len(events)
        if self._at + size > self._end:
            self._begin(self._half_bytes - self._half)
            if self._at + size > self._end:
                return  # larger than any batch can be
        at, memory = self._at, self._map
        _RECORD.pack_into(memory, at, len(events), zlib.crc32(events), number, shard)
        memory[at + _RECORD.size : at + size] = events
        self._at = at + size
        _HEADER.pack_into(memory, self._half, self._at - self._half, self._turn)

    def records(self) -> list[Record]:
        """What is there, the oldest first."""
        return list(_records(memoryview(self._map)))

    def close(self, remove: bool) -> None:
        self._map.close()
        os.close(self.descriptor)
        if remove:
            self.path.unlink(missing_ok=True)
        else:
            os.utime(self.path)


def strays(folder: Path) -> list[Path]:
    """Tails whose worker is gone, and its journal with it."""
    return [path for path in folder.glob("*.tail") if not path.with_suffix(".journal").exists()]


def is_old(path: Path) -> bool:
    """Redis has had the time to write to its disk what this tail holds."""
    return time.time() - path.stat().st_mtime > _KEPT_SECONDS


def left_behind(path: Path) -> list[Record]:
    """The records in a dead worker's file; none where it has left no such file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return list(_records(memoryview(content)))


def _records(memory: memoryview) -> Iterator[Record]:
    middle = len(memory) // 2
    halves = [memory[:middle], memory[middle:]]
    headers = [
        _HEADER.unpack_from(half) if len(half) >= _HEADER.size else (0, 0) for half in halves
    ]
    for (used, _turn), half in sorted(zip(headers, halves, strict=True), key=lambda one: one[0][1]):
        yield from _of_half(half[: min(used, len(half))])


def _of_half(half: memoryview) -> Iterator[Record]:
    at = _HEADER.size
    while at + _RECORD.size <= len(half):
        length, checksum, number, shard = _RECORD.unpack_from(half, at)
        at += _RECORD.size
        events = bytes(half[at : at + length])
        if not number or len(events) < length or zlib.crc32(events) != checksum:
            return
        yield Record(shard, number, events)
        at += length
