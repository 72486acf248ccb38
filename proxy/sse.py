"""[7] Event boundaries in a stream of server-sent events, across arbitrary cuts; sans-IO.

Per the WHATWG specification a line ends with LF, CR LF or CR, and an empty line ends an
event. `EventSplitter` hands out whole events only and keeps an unfinished one.
"""

import re
from collections.abc import Iterator

_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\Z))")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventTooLong(Exception):
    """An event grew beyond its bound before it ended."""


class EventSplitter:
    """Cuts a byte stream after its last whole event. An unfinished one may grow to `limit`.

    Each byte is searched about once, however small the reads: of what is kept, only the last
    three bytes can be part of a boundary that a later read completes.
    """

    __slots__ = ("_kept", "_limit")

    def __init__(self, limit: int) -> None:
        self._kept = bytearray()
        self._limit = limit

    def whole_events(self, data: bytes) -> bytes:
        """The bytes up to the end of the last whole event; empty while none is whole.

        Raises EventTooLong once nothing but an unfinished event beyond the limit is left.
        """
        kept = self._kept
        if kept:
            known = max(0, len(kept) - 3)
            kept += data
            end = _last_boundary(kept, known)
            with memoryview(kept) as view:
                whole = bytes(view[:end])  # one copy, where a slice of `kept` would be another
            del kept[:end]
        elif data.endswith(b"\n\n"):
            return data
        else:
            end = _last_boundary(data, 0)
            whole = data[:end]
            kept += data[end:]
        if not end and len(kept) > self._limit:
            raise EventTooLong
        return whole

    def rest(self) -> bytes:
        """The unfinished event at the end of the stream, if any."""
        rest = bytes(self._kept)
        self._kept.clear()
        return rest


def _last_boundary(data: bytes | bytearray, start: int) -> int:
    """Where the last event that is whole ends; 0 when none ends after `start`.

    A CR at the very end waits for what follows: it may be half of a CR LF.
    """
    found_at = data.rfind(b"\n\n", start)
    end = found_at + 2 if found_at >= 0 else 0
    for found in _BOUNDARY.finditer(data, max(start, end)):
        end = found.end()
    return end


def split_events(block: bytes) -> list[bytes]:
    """Whole events as byte strings, each with the blank line that ends it."""
    return list(each_event(block))


def each_event(block: bytes) -> Iterator[bytes]:
    """The same, one after the other: often the first is enough."""
    start = 0
    for found in _BOUNDARY.finditer(block):
        yield block[start : found.end()]
        start = found.end()
    if start < len(block):
        yield block[start:]


def event_data(event: bytes) -> bytes | None:
    """The `data` of an event, its lines joined by LF; None when it has none."""
    lines = []
    for line in _LINE_END.split(event):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None
