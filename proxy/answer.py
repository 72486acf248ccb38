"""[9] One answer on its way to one client: its head at the right moment, framing, its end.

Owns what has been written. Exactly one of `plain`, `failure`, `end_stream` ends it.
"""

from typing import Protocol

from accounting.contract.errors import Failure
from proxy import replies
from proxy.http_head import Head

_LARGE = 16_384  # bytes; more is not copied together with its frame: 190 µs per 250 kB


class Request(Protocol):
    """What the front door read of a request."""

    head: Head
    body: bytes
    keep_alive: bool


class Client(Protocol):
    """The client's side of the wire."""

    def write(self, data: bytes) -> None: ...
    def write_now(self, data: bytes) -> None: ...
    def write_large(self, pieces: list[bytes]) -> None: ...
    def exchange_done(self, close: bool) -> None: ...


class Answer:
    """See the module. `extra`: header lines known by the time of the head."""

    __slots__ = ("_chunked", "_client", "_close", "_request_id", "extra", "served", "started")

    def __init__(self, client: Client, request: Request, request_id: bytes) -> None:
        self._client = client
        self._request_id = request_id
        self._close = not request.keep_alive
        self._chunked = not request.head.http_1_0
        self.extra = b""
        self.served = b""
        self.started = False

    def make_last(self) -> None:
        """The connection closes after this answer, if its head can still say so."""
        self._close = self._close or not self.started

    def plain(self, body: bytes, charge_ucr: int) -> None:
        head = replies.plain_head(
            self._request_id, len(body), charge_ucr, self.served, self.extra, self._close
        )
        self.started = True
        if len(body) < _LARGE:
            self._client.write(head + body)
        else:
            self._client.write_large([head, body])

    def failure(self, failure: Failure) -> None:
        self.started = True
        self._client.write(
            replies.error_reply(failure, self._request_id.decode(), self._close, self.extra)
        )

    def stream(self, data: bytes) -> None:
        """Events for the client; the head goes with the first of them, in one write."""
        if len(data) >= _LARGE:
            self._client.write_large([self._head(), *self._framed(data)])
            return
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if not self.started:
            framed = self._head() + framed
        self._client.write_now(framed)

    def _head(self) -> bytes:
        """The head of a stream, once."""
        if self.started:
            return b""
        self.started = True
        self._close = self._close or not self._chunked
        return replies.stream_head(
            self._request_id, self.served, self.extra, self._chunked, self._close
        )

    def _framed(self, data: bytes) -> list[bytes]:
        return [b"%x\r\n" % len(data), data, b"\r\n"] if self._chunked else [data]

    def end_stream(self, data: bytes) -> None:
        """The last events, and the end of the body."""
        self.stream(data)
        if self._chunked:
            self._client.write(replies.LAST_CHUNK)

    def done(self) -> None:
        """Let go of the client."""
        self._client.exchange_done(self._close)
