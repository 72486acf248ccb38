"""Chunked request bodies (RFC 9112 §7.1), strictly; sans-IO.

Sizes are plain hexadecimal digits, lines end with CR LF, chunk extensions are skipped and
bounded, trailers are dropped and bounded. Anything else is refused: a body two parsers
could read differently is how requests are smuggled.
"""

import re

from accounting.contract.errors import BodyTooLarge, MalformedHttp

_LINE_LIMIT = 4096
_TRAILER_LIMIT = 16_384
_HEX = frozenset(b"0123456789abcdefABCDEF")
_EXTENSION = re.compile(rb"[\t -~\x80-\xff]*")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")


class ChunkedBody:
    """Feed bytes; `body` is whole once `feed` has returned what follows it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._length = 0
        self._data = b""
        self._left = 0  # bytes of the present chunk still to come
        self._closing = False  # the CR LF after a chunk is still to come
        self._trailer_bytes = 0
        self._in_trailers = False

    @property
    def body(self) -> bytes:
        return b"".join(self._pieces)

    def feed(self, data: bytes) -> bytes | None:
        """None while more is needed, else the bytes after the body.

        Raises MalformedHttp or BodyTooLarge.
        """
        data = self._data + data if self._data else data
        at = 0
        while True:
            if self._left:
                piece = data[at : at + self._left]
                self._pieces.append(piece)
                self._left -= len(piece)
                at += len(piece)
                if self._left:
                    break
            if self._closing:
                if len(data) - at < 2:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise MalformedHttp("A chunk is longer than its size.")
                at += 2
                self._closing = False
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > _LINE_LIMIT + 1:  # a CR may be the last byte
                    raise MalformedHttp("A chunk line is too long.")
                break
            line, at = data[at:end], end + 2
            if len(line) > _LINE_LIMIT or b"\n" in line or b"\r" in line:
                raise MalformedHttp("A chunk line is malformed.")
            if not self._in_trailers:
                self._start_chunk(line)
            elif line:
                self._skip_trailer(line)
            else:
                return data[at:]
        self._data = data[at:]
        return None

    def _start_chunk(self, line: bytes) -> None:
        digits, extended, extension = line.partition(b";")
        if extended:
            digits = digits.rstrip(b" \t")
            if not _EXTENSION.fullmatch(extension):
                raise MalformedHttp("A chunk extension is malformed.")
        if not 1 <= len(digits) <= 15 or not _HEX.issuperset(digits):
            raise MalformedHttp("A chunk size is malformed.")
        size = int(digits, 16)
        if size == 0:
            self._in_trailers = True
            return
        self._length += size
        if self._length > self._limit:
            raise BodyTooLarge
        self._left = size
        self._closing = True

    def _skip_trailer(self, line: bytes) -> None:
        self._trailer_bytes += len(line)
        if self._trailer_bytes > _TRAILER_LIMIT or not _TRAILER.fullmatch(line):
            raise MalformedHttp("A trailer is malformed.")
