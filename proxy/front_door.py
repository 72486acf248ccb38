"""[1] The door: bytes from a client's socket become requests, one lane each, in order.

Owns one client connection: reading heads and bodies strictly, their bounds and time-outs,
keep-alive and pipelining, back-pressure, and the hand-over to the aiohttp lane. Answers are
written by exchanges, through the `Client` side below.

Theory of operation: a head is found by its blank line and parsed by llhttp, which is strict;
its body is cut by the one length it declares. Requests read ahead wait in a short queue; at
most one exchange is under way per connection, so answers go out in order. A path that is not
of the fast lane hands the transport over to aiohttp, with every byte not yet consumed.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast

from accounting.contract.errors import (
    BodyTooLarge,
    ExpectationFailed,
    Failure,
    HeadTooLarge,
    MalformedHttp,
    MethodNotAllowed,
    RequestTimeout,
    Unavailable,
)
from proxy import replies
from proxy.bill import ROUTE
from proxy.chunked import ChunkedBody
from proxy.exchange import Exchange
from proxy.http_head import Request, parse_head

if TYPE_CHECKING:
    from proxy.services import Services

_FAST_PATHS = frozenset({ROUTE.encode()})
_END = b"\r\n\r\n"
_LINGER_SECONDS = 2.0
_LENGTH_DIGITS = 15


class FrontDoor(asyncio.Protocol):
    """One client connection. `services` are the worker's."""

    __slots__ = (
        "_buffer", "_chunked", "_closing", "_exchange", "_lingering", "_missing", "_paused_at",
        "_pieces", "_pumping", "_queue", "_reading", "_services", "_since", "_transport",
    )  # fmt: skip

    def __init__(self, services: "Services") -> None:
        self._services = services
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._reading: Request | None = None
        self._missing = 0
        self._pieces: list[bytes] = []
        self._chunked: ChunkedBody | None = None
        self._queue: deque[Request] = deque()
        self._exchange: Exchange | None = None
        self._pumping = False
        self._closing = False
        self._lingering = False
        self._paused_at = 0.0
        self._since = 0.0

    def __repr__(self) -> str:
        return f"FrontDoor(exchange={self._exchange!r}, queued={len(self._queue)})"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        services = self._services
        self._transport = transport = cast("asyncio.Transport", transport)
        self._since = services.now()
        transport.set_write_buffer_limits(high=services.settings.write_buffer_bytes)
        services.connections.add(self)
        if len(services.connections) > services.settings.connections:
            self._refuse(Unavailable("Too many connections."))

    def connection_lost(self, error: Exception | None) -> None:
        self._services.connections.discard(self)
        self._transport = None
        self._closing = True
        self._queue.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_left()

    def eof_received(self) -> bool:
        """A client that closes its sending side is taken to have left."""
        return False

    def pause_writing(self) -> None:
        self._paused_at = self._services.now()
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._paused_at = 0.0
        if self._exchange is not None:
            self._exchange.resume()
        else:
            self._pump()
            self._read_on()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        elif self._reading is None:
            self._since = self._services.now()  # a head's first byte
        try:
            self._read(data)
        except Failure as failure:
            self._refuse(failure)
        self._pump()

    # Reading

    def _read(self, data: bytes) -> None:
        """Turn bytes into queued requests; keep what is not whole yet."""
        while data and not self._closing:
            if self._reading is not None:
                rest = self._read_body(self._reading, data)
                if rest is None:
                    return
                data = rest
                continue
            if len(self._queue) >= self._services.settings.pipeline_depth:
                self._keep(data)
                self._pause_reading()
                return
            end = data.find(_END)
            if end < 0:
                self._keep_partial_head(data)
                return
            rest = self._read_head(data, end + 4)
            if rest is None:
                return
            data = rest

    def _keep(self, data: bytes) -> None:
        if not self._buffer:
            self._since = self._services.now()
        self._buffer = data

    def _keep_partial_head(self, data: bytes) -> None:
        if data.startswith(b"\r\n"):
            data = data[2:]
        if len(data) > self._services.settings.head_limit_bytes:
            raise HeadTooLarge
        if b"\n\n" in data or b"\0" in data:
            raise MalformedHttp
        self._buffer = data

    def _read_head(self, data: bytes, end: int) -> bytes | None:
        """One head at the start of `data`. None once there is nothing more to read here."""
        start = 2 if data.startswith(b"\r\n") else 0  # RFC 9112 §2.2: one empty line is skipped
        if end - start > self._services.settings.head_limit_bytes:
            raise HeadTooLarge
        request = parse_head(data[start:end])
        if request.path not in _FAST_PATHS:
            self._hand_over(data[start:])
            return None
        if request.method != b"POST":
            request.failure = MethodNotAllowed("Use POST here.")
            request.keep_alive = False
            self._queue.append(request)
            self._closing = True
            return None
        self._expect_body(request, whole=len(data) > end)
        return data[end:]

    def _expect_body(self, request: Request, whole: bool) -> None:
        """Prepare for the body the head announces. Raises for what cannot be trusted."""
        headers = request.headers
        limit = self._services.settings.body_limit_bytes
        length = headers.get(b"content-length")
        coding = headers.get(b"transfer-encoding")
        self._reading = request
        self._since = self._services.now()
        if coding is not None:
            if length is not None or request.http_1_0 or coding.lower() != b"chunked":
                raise MalformedHttp
            self._chunked = ChunkedBody(limit)
        else:
            digits = length or b"0"
            if not digits.isdigit() or len(digits) > _LENGTH_DIGITS:
                raise MalformedHttp
            self._missing = int(digits)
            if self._missing > limit:
                raise BodyTooLarge
            if not self._missing:
                self._body_read(request, b"")
                return
        expectation = headers.get(b"expect")
        if expectation is not None:
            self._continue(expectation, whole)

    def _continue(self, expectation: bytes, whole: bool) -> None:
        if expectation.lower() != b"100-continue":
            raise ExpectationFailed
        if not whole and self._exchange is None and not self._queue:
            self.write(replies.CONTINUE)

    def _read_body(self, request: Request, data: bytes) -> bytes | None:
        """Take the request's body off the front of `data`; None while more is to come."""
        if self._chunked is not None:
            rest = self._chunked.feed(data)
            if rest is None:
                return None
            body, self._chunked = self._chunked.body, None
            self._body_read(request, body)
            return rest
        missing = self._missing
        if len(data) < missing:
            self._pieces.append(data)
            self._missing = missing - len(data)
            return None
        body = data[:missing]
        if self._pieces:
            self._pieces.append(body)
            body = b"".join(self._pieces)
            self._pieces = []
        self._missing = 0
        self._body_read(request, body)
        return data[missing:]

    def _body_read(self, request: Request, body: bytes) -> None:
        request.body = body
        self._reading = None
        self._queue.append(request)

    def _pause_reading(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    # Serving, in order

    def _pump(self) -> None:
        """Start the next request when none is under way and the client reads its answers."""
        if self._pumping:
            return
        self._pumping = True
        while self._exchange is None and self._queue and not self._paused_at:
            if self._transport is None:
                break
            request = self._queue.popleft()
            if request.failure is not None:
                self._answer_refused(request, request.failure)
                break
            self._exchange = Exchange(self._services, self, request)
            self._exchange.begin()
        self._pumping = False

    def _answer_refused(self, request: Request, failure: Failure) -> None:
        answer = replies.error_reply(failure, None, close=True)
        if request.method == b"HEAD":
            answer = answer[: answer.index(_END) + len(_END)]
        self.write(answer)
        self._linger()

    def _read_on(self) -> None:
        """An answer is out: go on with what had been kept back."""
        if self._buffer and not self._closing:
            data, self._buffer = self._buffer, b""
            if self._transport is not None:
                self._transport.resume_reading()
            self.data_received(data)

    def _refuse(self, failure: Failure) -> None:
        """The connection cannot go on: answer what came before, then this, then close."""
        request = self._reading or Request()
        request.failure = failure
        self._reading = None
        self._closing = True
        self._buffer = b""
        self._queue.append(request)
        self._pump()

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to the aiohttp lane, once earlier answers are out."""
        if self._exchange is not None or self._queue:
            self._keep(data)
            self._pause_reading()
            return
        transport = self._transport
        assert transport is not None
        self._services.connections.discard(self)
        self._closing = True
        handler = self._services.aiohttp_lane.protocol()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    # The client's side of an exchange

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def exchange_done(self, close: bool) -> None:
        self._exchange = None
        self._since = self._services.now()
        if close:
            self._closing = True
            self._queue.clear()
            self._linger()
            return
        if not self._pumping:
            self._pump()
        if self._exchange is None:
            if self._buffer:
                self._services.loop.call_soon(self._read_on)
            elif self._services.draining and not self._queue:
                self.close()

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close an idle connection."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """Close so that the client gets the answer even while it is still sending."""
        self._lingering = True
        self._since = self._services.now()
        if self._transport is not None:
            self._transport.write_eof()

    # Time

    @property
    def idle(self) -> bool:
        return self._exchange is None and not self._queue

    def check_time(self, now: float) -> None:
        """Called about twice a second."""
        settings = self._services.settings
        waited = now - self._since
        if self._paused_at and now - self._paused_at > settings.stalled_client_seconds:
            self.cut()
        elif self._exchange is not None:
            self._exchange.check_time(now)
        elif self._lingering:
            if waited > _LINGER_SECONDS:
                self.cut()
        elif self._reading is not None:
            if waited > settings.body_timeout_seconds:
                self._refuse(RequestTimeout("The request body did not arrive in time."))
        elif self._buffer:
            if waited > settings.head_timeout_seconds:
                self._refuse(RequestTimeout("The request head did not arrive in time."))
        elif waited > settings.idle_timeout_seconds:
            self.close()
