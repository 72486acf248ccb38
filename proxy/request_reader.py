"""[1] A client's bytes become requests: heads, bodies, their bounds, their order; sans-IO.

Theory of operation: a head is found by its blank line and parsed strictly; its body is cut by
the one length it declares. Requests read ahead wait in `requests`, at most `pipeline_depth`;
bytes beyond that are kept unread. A head whose path the fast lane does not serve ends the
reading: its bytes and all that follow are `foreign`, for another lane. What cannot be
trusted ends it too, as a request that carries its refusal.
"""

from collections import deque

from accounting.contract.errors import (
    BodyTooLarge,
    ExpectationFailed,
    Failure,
    HeadTooLarge,
    MalformedHttp,
    MethodNotAllowed,
)
from accounting.contract.settings import Settings
from proxy.chunked import ChunkedBody
from proxy.http_head import Head, Request, parse_head
from proxy.repeated_head import RepeatedHead

FAST_PATHS = frozenset({b"/v1/chat/completions"})
_EMPTY_LINE = b"\r\n"
_END = b"\r\n\r\n"
_SPACE = b" \t"  # may stand around a value (RFC 9110 §5.5); the parser leaves what follows one
_LENGTH_DIGITS = 15
_UNREPEATED = frozenset({b"transfer-encoding", b"expect"})


def _start_of(data: bytes) -> int:
    """Where a head starts: one empty line before it is skipped (RFC 9112 §2.2)."""
    return 2 if data.startswith(_EMPTY_LINE) else 0


class RequestReader:
    """The reading side of one connection."""

    __slots__ = (
        "_buffer", "_chunked", "_known", "_missing", "_pieces", "_reading", "_settings", "ended",
        "foreign", "owes_continue", "requests",
    )  # fmt: skip

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._buffer = b""
        self._reading: Request | None = None
        self._missing = 0
        self._pieces: list[bytes] = []
        self._chunked: ChunkedBody | None = None
        self._known: RepeatedHead | None = None
        self.requests: deque[Request] = deque()
        self.foreign = b""
        self.ended = False
        self.owes_continue = False  # the body waits for `100 Continue`

    def __repr__(self) -> str:
        return f"RequestReader(requests={len(self.requests)}, in={self.within!r})"

    @property
    def within(self) -> str:
        """What has begun to arrive: `head`, `body`, or nothing."""
        if self._reading is not None:
            return "body"
        return "head" if self._buffer and self._buffer != _EMPTY_LINE else ""

    @property
    def full(self) -> bool:
        """Reading further must wait until a request has been taken."""
        return len(self.requests) >= self._settings.pipeline_depth

    def feed(self, data: bytes) -> None:
        """Read on, with what had been kept and `data`."""
        if self.ended:
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        try:
            self._read(data)
        except Failure as failure:
            self.refuse(failure)

    def refuse(self, failure: Failure) -> None:
        """Nothing after this can be read: the request at hand, or none, is refused."""
        request = self._reading or Request(Head())
        request.failure = failure
        self._reading = None
        self._buffer = b""
        self.ended = True
        self.requests.append(request)

    def _read(self, data: bytes) -> None:
        while data and not self.ended:
            if self._reading is not None:
                data = self._read_body(self._reading, data)
                continue
            known = self._known
            start = known.match(data) if known is not None and not self.full else 0
            if known is not None and start:
                data = self._repeat(known, data, start)
                continue
            end = data.find(_END)
            if end < 0:
                self._keep_partial_head(data)
                return
            if self.full:
                self._buffer = data
                return
            data = self._read_head(data, end + len(_END))

    def _keep_partial_head(self, data: bytes) -> None:
        if len(data) - _start_of(data) > self._settings.head_limit_bytes:
            raise HeadTooLarge
        if b"\n\n" in data or b"\0" in data:
            raise MalformedHttp
        self._buffer = data

    def _read_head(self, data: bytes, end: int) -> bytes:
        """One head at the start of `data`; returns what follows it."""
        start = _start_of(data)
        if end - start > self._settings.head_limit_bytes:
            raise HeadTooLarge
        head = parse_head(data[start:end])
        if head.path not in FAST_PATHS:
            self.foreign = data[start:]
            self.ended = True
        elif head.method != b"POST":
            self._reading = Request(head)
            raise MethodNotAllowed("Use POST here.")
        else:
            self._expect_body(head, whole=len(data) > end)
            if _UNREPEATED.isdisjoint(head.headers) and b"content-length" in head.headers:
                self._known = RepeatedHead(head, data[start:end])
        return data[end:]

    def _repeat(self, known: RepeatedHead, data: bytes, start: int) -> bytes:
        """The known head again, its body at `start` of `data`; returns what follows."""
        request, length = Request(known.head), known.length
        if length > self._settings.body_limit_bytes:
            self._reading = request
            raise BodyTooLarge
        end = start + length
        if len(data) < end:
            self._reading, self._missing = request, length
            return data[start:]
        request.body = data[start:end]
        self.requests.append(request)
        return data[end:]

    def _expect_body(self, head: Head, whole: bool) -> None:
        """Prepare for the body the head announces. Raises for what cannot be trusted."""
        headers, request = head.headers, Request(head)
        limit = self._settings.body_limit_bytes
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        expectation = headers.get(b"expect")
        self._reading = request
        if expectation is not None and expectation.rstrip(_SPACE).lower() != b"100-continue":
            raise ExpectationFailed
        if coding is not None:
            plain = coding.rstrip(_SPACE).lower() == b"chunked"
            if length is not None or head.http_1_0 or not plain:
                raise MalformedHttp
            self._chunked = ChunkedBody(limit)
        else:
            digits = b"0" if length is None else length.rstrip(_SPACE)
            if not digits.isdigit() or len(digits) > _LENGTH_DIGITS:
                raise MalformedHttp
            self._missing = int(digits)
            if self._missing > limit:
                raise BodyTooLarge
            if not self._missing:
                self._finish(request, b"")
        if expectation is not None and not head.http_1_0:  # RFC 9110 §10.1.1
            self.owes_continue = not whole and self.within == "body"

    def _read_body(self, request: Request, data: bytes) -> bytes:
        """Take the request's body off the front of `data`; returns what follows it."""
        self.owes_continue = False
        if self._chunked is not None:
            rest = self._chunked.feed(data)
            if rest is None:
                return b""
            body, self._chunked = self._chunked.body, None
            self._finish(request, body)
            return rest
        missing = self._missing
        if len(data) < missing:
            self._pieces.append(data)
            self._missing = missing - len(data)
            return b""
        body = data[:missing]
        if self._pieces:
            self._pieces.append(body)
            body = b"".join(self._pieces)
            self._pieces = []
        self._missing = 0
        self._finish(request, body)
        return data[missing:]

    def _finish(self, request: Request, body: bytes) -> None:
        request.body = body
        self._reading = None
        self.requests.append(request)
