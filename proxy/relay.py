"""[7] One attempt at one target: its connection, and the answer as it comes in.

Owns the connection while it is used, the answer's status, its scanner or its pieces, and
their bounds. A stream is passed on as it comes, anything else is gathered whole. Whoever
reads it implements `Reader`; the attempt ends with exactly one of `relay_done`,
`relay_whole`, `relay_outran`, `relay_failed` or the reader's own `drop()`.
"""

from typing import Protocol

from accounting.contract.errors import Failure, ProviderBrokeOff, ProviderFailed, ProviderGarbled
from accounting.contract.settings import Settings
from accounting.contract.usage_event import TokenUsage
from proxy.chat_head import ChatHead
from proxy.patience import Patience
from proxy.provider_errors import CLIENTS_FAULT, failure_of, scrubbed
from proxy.provider_usage import read_answer
from proxy.routing import Stop
from proxy.sse import EventTooLong
from proxy.upstream_connection import UpstreamConnection
from proxy.usage_scanner import StreamScanner

_ERROR_BODY_LIMIT = 65_536


class Reader(Protocol):
    """Who is told what comes of an attempt."""

    def relay_ready(self, connection: UpstreamConnection) -> None: ...
    def relay_begins(self) -> None: ...
    def relay_block(self, block: bytes, scanner: StreamScanner) -> None: ...
    def relay_done(self, scanner: StreamScanner) -> None: ...
    def relay_whole(self, body: bytes, usage: TokenUsage | None) -> None: ...
    def relay_outran(self, scanner: StreamScanner) -> None: ...
    def relay_failed(self, failure: Failure) -> None: ...


class Relay:
    """See the module. `status` is 0 until the answer's head has come."""

    __deletable__ = ("_reader",)  # of the compiled form; see `let_go`
    __slots__ = (
        "_connection", "_head", "_limit", "_patience", "_pieces", "_reader", "_received",
        "_retried", "_retry_after", "_settings", "_stop", "scanner", "status", "waiting",
    )  # fmt: skip

    def __init__(
        self, reader: Reader, stop: Stop, head: ChatHead, settings: Settings, patience: Patience
    ) -> None:
        self._reader = reader
        self._stop = stop
        self._head = head
        self._settings = settings
        self._patience = patience
        self._connection: UpstreamConnection | None = None
        self._retried = False
        self._limit = _ERROR_BODY_LIMIT
        self._pieces: list[bytes] = []
        self._received = 0
        self._retry_after = b""
        self.scanner: StreamScanner | None = None
        self.status = 0
        self.waiting = False

    def __repr__(self) -> str:
        return f"Relay({self._stop.target}, status={self.status}, waiting={self.waiting})"

    @property
    def answer_bytes(self) -> int:
        return self._received if self.scanner is None else self.scanner.relayed_bytes

    # What its reader wants

    def connect(self, fresh: bool = False) -> None:
        """Begin, unless dropped before, with `relay_ready` or `relay_failed`."""
        self.waiting = True
        self._stop.pool.acquire(self, fresh)

    def release(self) -> None:
        """All that matters of the answer has come: the connection may be kept."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def drop(self) -> None:
        """Cut the attempt off, wherever it is."""
        if self.waiting:
            self.waiting = False
            self._stop.pool.forget(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def let_go(self) -> None:
        """Tell the reader no more. Without this the two would keep each other alive until a
        garbage collection: 5 % of the CPU of a plain request."""
        del self._reader

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    # What its connection tells

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        self.waiting = False
        self._connection = connection
        self._reader.relay_ready(connection)

    def upstream_refused(self, failure: Failure) -> None:
        self.waiting = False
        self._reader.relay_failed(failure)

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """A status that is not 200 says enough, unless the client is to hear the provider's
        own words; a 200 that is not what was asked for is none."""
        self.status = status
        if status != 200:
            self._retry_after = headers.get(b"retry-after", b"")
            if status not in CLIENTS_FAULT:
                self.release()
                self._reader.relay_failed(self._failure())
        elif self._is_as_asked(headers):
            self._reader.relay_begins()
        else:
            self._reader.relay_failed(ProviderGarbled())

    def upstream_body(self, data: bytes) -> None:
        self._patience.heard = True
        scanner = self.scanner
        if scanner is None:
            self._gather(data)
            return
        try:
            block = scanner.pass_on(data)
        except EventTooLong:
            self._reader.relay_failed(ProviderGarbled("An event of the provider is too large."))
            return
        self._pass_on(block, scanner)

    def upstream_end(self) -> None:
        """The provider's answer has ended cleanly, or by closing as announced."""
        self._connection = None
        if self.scanner is not None:
            self._finish_unasked(self.scanner)
        elif self.status != 200:
            self._reader.relay_failed(self._failure())
        else:
            body = self._body
            usage, is_json = read_answer(body)
            if is_json:
                self._reader.relay_whole(body, usage)
            else:
                self._reader.relay_failed(ProviderGarbled())

    def upstream_lost(self, garbled: bool) -> None:
        """The connection broke, or what came was not HTTP. A pooled one may have been closed
        unseen: if nothing was answered, once more on another."""
        connection, self._connection = self._connection, None
        unseen = connection is not None and connection.reused and not connection.heard
        if unseen and not self._retried:
            self._retried = True
            self.connect(fresh=True)
            return
        scanner = self.scanner
        if scanner is not None and scanner.finished:
            self._reader.relay_done(scanner)
        elif self.status not in (0, 200):
            self._reader.relay_failed(self._failure())
        else:
            self._reader.relay_failed(ProviderGarbled() if garbled else ProviderBrokeOff())

    # Its parts

    def _is_as_asked(self, headers: dict[bytes, bytes]) -> bool:
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return False
        settings, head = self._settings, self._head
        self._limit = settings.answer_limit_bytes
        if head.stream:
            if not headers.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
                return False
            self.scanner = StreamScanner(settings.event_limit_bytes, not head.wants_usage)
        return True

    def _gather(self, data: bytes) -> None:
        self._pieces.append(data)
        self._received += len(data)
        if self._received > self._limit:
            self._reader.relay_failed(ProviderGarbled("The provider's answer is too large."))

    def _pass_on(self, block: bytes, scanner: StreamScanner) -> None:
        if block:
            self._reader.relay_block(block, scanner)
        if scanner.failed is not None:
            words = scrubbed(scanner.failed, self._stop.target.provider)
            self._reader.relay_failed(ProviderFailed(words))
        elif scanner.done:
            self._reader.relay_done(scanner)
        elif (
            scanner.events > scanner.enough and self._connection is not None and scanner.has_outrun
        ):
            self._reader.relay_outran(scanner)

    def _finish_unasked(self, scanner: StreamScanner) -> None:
        """The stream ended without `[DONE]`: fine after its last chunk, an error before."""
        self._pass_on(scanner.finish(), scanner)
        if scanner.failed is not None or scanner.done:
            return
        if scanner.finished:
            self._reader.relay_done(scanner)
        else:
            self._reader.relay_failed(ProviderFailed("The provider ended its answer early."))

    @property
    def _body(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def _failure(self) -> Failure:
        """What an answer that is not 200 means to the client."""
        return failure_of(self.status, self._body, self._retry_after, self._stop.target)
