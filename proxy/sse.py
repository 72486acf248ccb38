"""[7] Event boundaries in a stream of server-sent events, across arbitrary cuts; sans-IO.

Per the WHATWG specification a line ends with LF, CR LF or CR, and an empty line ends an
event. `EventSplitter` hands out whole events only and keeps an unfinished one.
"""

import re

_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\Z))")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventTooLong(Exception):
    """An event grew beyond its bound before it ended."""


class EventSplitter:
    """Cuts a byte stream after its last whole event. At most `limit` bytes are kept."""

    __slots__ = ("_kept", "_limit")

    def __init__(self, limit: int) -> None:
        self._kept = b""
        self._limit = limit

    def whole_events(self, data: bytes) -> bytes:
        """The bytes up to the end of the last whole event; empty while none is whole."""
        if self._kept:
            data = self._kept + data
            self._kept = b""
        if data.endswith(b"\n\n"):
            return data
        end = _last_boundary(data)
        self._kept = data[end:]
        if len(self._kept) > self._limit:
            raise EventTooLong
        return data[:end]

    def rest(self) -> bytes:
        """The unfinished event at the end of the stream, if any."""
        kept, self._kept = self._kept, b""
        return kept


def _last_boundary(data: bytes) -> int:
    end = data.rfind(b"\n\n") + 2
    if end < 2:
        end = 0
    for found in _BOUNDARY.finditer(data, end):
        end = found.end()
    return end


def split_events(block: bytes) -> list[bytes]:
    """Whole events as byte strings, each with the blank line that ends it."""
    events = []
    start = 0
    for found in _BOUNDARY.finditer(block):
        events.append(block[start : found.end()])
        start = found.end()
    if start < len(block):
        events.append(block[start:])
    return events


def event_data(event: bytes) -> bytes | None:
    """The `data` of an event, its lines joined by LF; None when it has none."""
    lines = []
    for line in _LINE_END.split(event):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None
