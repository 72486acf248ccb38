"""How far each open exchange has come: 16 bytes a slot, in memory that outlives its worker.

Counters of a stream change with every chunk. In a page that is on its way to the disk such a
store costs a fault, and now and then a wait for the file system: 2 µs a chunk and milliseconds
of its 99th percentile. So they are kept in a file of the system's memory (`/dev/shm`), which a
kill leaves as it is, and are copied beside the journal before it goes to the disk, for the case
that the host loses power. Where there is no such place they are kept beside the journal at once.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from struct import Struct as Layout

RECORD = Layout("<QII")  # bytes relayed, events relayed, bytes of a chunk less its content
_MEMORY = Path("/dev/shm")  # noqa: S108  # open to all users: see `_opened`
_PATH_BYTES = 4096


def create(journal: Path, size: int) -> mmap.mmap | None:
    """The memory for so many bytes of records, empty; None where there is no place for it."""
    remove_stray()
    path = _path(journal)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, size + _PATH_BYTES)
        os.pwrite(descriptor, os.fsencode(journal.resolve())[:_PATH_BYTES], size)
        return mmap.mmap(descriptor, size)
    except OSError:
        path.unlink()
        return None
    finally:
        os.close(descriptor)


def left_by(journal: Path, size: int) -> mmap.mmap | None:
    """What a dead worker's memory holds; None where that is gone."""
    descriptor = _opened(_path(journal))
    if descriptor is None:
        return None
    try:
        if os.fstat(descriptor).st_size != size + _PATH_BYTES:
            return None
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def remove(journal: Path) -> None:
    _path(journal).unlink(missing_ok=True)


def remove_stray() -> None:
    """Let go of the memory of journals that are no more."""
    for path, journal in _all():
        if not journal.exists():
            path.unlink(missing_ok=True)


def _all() -> Iterator[tuple[Path, Path]]:
    for path in _MEMORY.glob(f"tollgate-{os.getuid()}-*"):
        descriptor = _opened(path)
        if descriptor is None:
            continue
        try:
            at = max(0, os.fstat(descriptor).st_size - _PATH_BYTES)
            name = os.pread(descriptor, _PATH_BYTES, at).rstrip(b"\0")
        finally:
            os.close(descriptor)
        if name:  # else it is being made
            yield path, Path(os.fsdecode(name))


def _path(journal: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(journal.resolve())).hexdigest()[:24]
    return _MEMORY / f"tollgate-{os.getuid()}-{digest}"


def _opened(path: Path) -> int | None:
    """A file of ours: anybody may put one of that name there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_uid != os.getuid():
        os.close(descriptor)
        return None
    return descriptor
