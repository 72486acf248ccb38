"""[1] The head that a connection repeats, recognised by its bytes instead of read again.

A client sends the same head for request after request, but for the length of its body. Once
such a head has been read strictly, the same bytes with other digits for the length can only
mean the same: 0.5 µs where reading takes 3. Owns the bytes of one head, for as long as its
connection keeps it.
"""

import re

from proxy.http_head import Head

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n", re.IGNORECASE)
_LENGTH_DIGITS = 15


class RepeatedHead:
    """`head`, and its bytes before and after the digits of its one Content-Length."""

    __slots__ = ("_after", "_after_bytes", "_before", "_digits_at", "head", "length")

    def __init__(self, head: Head, data: bytes) -> None:
        self.head = head
        self.length = 0
        found = _LENGTH.search(data)
        assert found is not None
        self._before, self._after = data[: found.start(1)], data[found.end(1) :]
        self._digits_at, self._after_bytes = len(self._before), len(self._after)

    def __repr__(self) -> str:
        return f"RepeatedHead({self.head!r})"

    def match(self, data: bytes) -> int:
        """Where the body starts, if `data` begins with this head, its `length` then known; or 0."""
        at = self._digits_at
        end = data.find(b"\r", at, at + _LENGTH_DIGITS + 1)
        if end <= at or not data.startswith(self._before):
            return 0
        digits = data[at:end]
        if not digits.isdigit() or not data.startswith(self._after, end):
            return 0
        self.length = int(digits)
        return end + self._after_bytes
