"""[1] The door: one client connection, its lane, its order, its pace.

Owns the socket: keep-alive, pipelining, back-pressure, time-outs, and the hand-over to the
aiohttp lane. What bytes mean is `request_reader`'s; answers are written by exchanges.

Theory of operation: at most one exchange is under way per connection, so answers go out in
order. The next starts when the last has ended and the client has read enough of its answer.
A connection that turns to another lane is handed over whole, with every byte not yet read.

In a drain an answer says that its connection closes, unless more has already come in behind
its request; an idle connection may ask once more for a while. It is closed only while nothing
has come in, and what crosses the close is read and dropped: its sender sees an end without an
answer, never a reset, and knows that nothing was served.
"""

import asyncio
import select
import time
from typing import TYPE_CHECKING, cast

from accounting.contract.errors import Failure, RequestTimeout, Unavailable
from proxy import replies
from proxy.exchange import Exchange
from proxy.http_head import Request
from proxy.request_reader import RequestReader

if TYPE_CHECKING:
    from proxy.services import Services

_LINGER_SECONDS = 2.0
_READ_BYTES = 256_000  # what the loop reads at a time: this may come on top of what waits
_LEAST_ROOM = 4096
_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # elsewhere than on Linux only a reset shows


class FrontDoor:
    """One client connection, an asyncio.Protocol by its shape. `services` are the worker's."""

    __slots__ = (
        "_closing", "_exchange", "_lingering", "_outgoing", "_paused_at", "_pumping",
        "_reader", "_reading_paused", "_services", "_since", "_transport",
        "_within",
    )  # fmt: skip

    def __init__(self, services: "Services") -> None:
        self._services = services
        self._transport: asyncio.Transport | None = None
        self._reader = RequestReader(services.settings)
        self._exchange: Exchange | None = None
        self._outgoing: list[bytes] = []
        self._pumping = False
        self._closing = False
        self._lingering = False
        self._reading_paused = False
        self._paused_at = 0.0
        self._since = 0.0
        self._within = ""

    def __repr__(self) -> str:
        return f"FrontDoor(exchange={self._exchange!r}, reader={self._reader!r})"

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        services = self._services
        self._transport = transport = cast("asyncio.Transport", transport)
        self._since = services.now()
        room = services.settings.write_buffer_bytes - _READ_BYTES
        transport.set_write_buffer_limits(high=max(room, _LEAST_ROOM))
        services.connections.add(self)
        if len(services.connections) > services.settings.connections:
            self._reader.refuse(Unavailable("Too many connections."))
            self._pump()

    def connection_lost(self, error: Exception | None) -> None:
        self._services.connections.discard(self)
        self._transport = None
        self._closing = True
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

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        reader = self._reader
        reader.feed(data)
        if not reader.requests and reader.within != self._within:
            self._within = reader.within
            self._since = self._services.now()
        self._pump()

    # Serving, in order

    def _pump(self) -> None:
        """Start the next request when none is under way and the client reads its answers."""
        if self._pumping:
            return
        self._pumping = True
        reader = self._reader
        while self._exchange is None and reader.requests and not self._paused_at:
            if self._transport is None or self._closing:
                break
            was_full = reader.full
            request = reader.requests.popleft()
            if request.failure is not None:
                self._answer_refused(request, request.failure)
                break
            if self._services.draining and not self._owed:
                request.keep_alive = False
            self._exchange = Exchange(self._services, self, request)
            self._exchange.begin()
            if was_full:
                reader.feed(b"")
        self._pumping = False
        self._set_pace()

    def _set_pace(self) -> None:
        """Read on or not; turn to the other lane; tell a waiting client to go on."""
        reader = self._reader
        if not (reader.requests or reader.foreign or reader.owes_continue or self._reading_paused):
            return  # nothing out of the ordinary
        if self._transport is None or self._closing:
            return
        if self._exchange is None and not reader.requests:
            if reader.foreign:
                self._hand_over(reader.foreign)
                return
            if reader.owes_continue:
                reader.owes_continue = False
                self.write(replies.CONTINUE)
        must_pause = reader.full or bool(reader.foreign)
        if must_pause != self._reading_paused:
            self._reading_paused = must_pause
            if must_pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _answer_refused(self, request: Request, failure: Failure) -> None:
        request_id = self._services.request_ids.next(time.time_ns()).decode()
        answer = replies.error_reply(failure, request_id, close=True)
        if request.head.method == b"HEAD":
            answer = replies.head_of(answer)
        self.write(answer)
        self._linger()

    def _hand_over(self, data: bytes) -> None:
        """Give the connection to the aiohttp lane: earlier answers are out."""
        transport = self._transport
        assert transport is not None
        self._flush()
        self._services.connections.discard(self)
        self._closing = True
        handler = self._services.aiohttp_lane.protocol()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        if self._reading_paused:
            transport.resume_reading()
        handler.data_received(data)

    # The client's side of an exchange

    def write(self, data: bytes) -> None:
        """Written at the end of the loop turn, with all that this turn adds."""
        if not self._outgoing:
            self._services.turn_end.add(self._flush)
        self._outgoing.append(data)

    def write_now(self, data: bytes) -> None:
        """Written before anything else happens: a chunk is not to wait for those of others."""
        if self._outgoing:
            self._outgoing.append(data)
            self._flush()
        elif self._transport is not None:
            self._transport.write(data)

    def write_large(self, pieces: list[bytes]) -> None:
        """Written at once and as they are. The loop may read a provider's socket up to 32 times
        in a turn: only what is written can make it pause."""
        self._flush()
        if self._transport is not None:
            self._transport.writelines(pieces)

    def _flush(self) -> None:
        outgoing = self._outgoing
        if not outgoing:
            return
        self._outgoing = []
        if self._transport is not None:
            self._transport.write(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing))

    def exchange_done(self, close: bool) -> None:
        self._exchange = None
        self._within = ""
        self._since = self._services.now()
        if close:
            self._linger()
            return
        self._pump()

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # The end of the worker

    def drain(self) -> None:
        """A drain begins: the answer under way is the last, or the next one will be."""
        if self._owed:
            return
        if self._exchange is not None:
            self._exchange.make_last()
        else:
            self._since = self._services.now()

    def stop(self, failure: Failure) -> None:
        """A drain is over: end what is under way or has begun to come in, and close."""
        self._reader.requests.clear()
        if self._exchange is not None:
            self._exchange.make_last()
            self._exchange.cut(failure)
        elif self._reader.within and not self._closing:
            self._reader.refuse(failure)
            self._pump()
        if not self._closing:
            self._linger()

    @property
    def _owed(self) -> bool:
        """Whether more than the exchange under way has come in, whole or in part."""
        reader = self._reader
        return bool(reader.requests or reader.within or reader.foreign)

    def _linger(self) -> None:
        """Close so that the client gets the answer even while it is still sending."""
        self._flush()
        self._closing = True
        self._lingering = True
        self._since = self._services.now()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()

    # Time

    def check_time(self, now: float) -> None:
        """Called about twice a second."""
        settings = self._services.settings
        waited = now - self._since
        if self._paused_at and now - self._paused_at > settings.stalled_client_seconds:
            self.cut()
        elif self._exchange is not None:
            if self._reading_paused and self._client_is_gone():
                self.cut()
            else:
                self._exchange.check_time(now)
        elif self._lingering:
            if waited > _LINGER_SECONDS:
                self.cut()
        elif self._reader.within == "body":
            if waited > settings.body_timeout_seconds:
                self._time_out("The request body did not arrive in time.")
        elif self._reader.within == "head":
            if waited > settings.head_timeout_seconds:
                self._time_out("The request head did not arrive in time.")
        elif waited > self._idle_seconds and not self._shows(select.POLLIN):
            self._linger()

    @property
    def _idle_seconds(self) -> float:
        """How long a connection may be idle now."""
        settings = self._services.settings
        if self._services.draining:
            return min(settings.drain_idle_seconds, settings.idle_timeout_seconds)
        return settings.idle_timeout_seconds

    def _client_is_gone(self) -> bool:
        """Whether the client has closed: while reading is paused the loop does not tell."""
        return self._shows(_HUNG_UP)

    def _shows(self, event: int) -> bool:
        """What the socket has to tell that the loop has not told yet."""
        assert self._transport is not None
        if self._transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), event)
        return bool(poll.poll(0))

    def _time_out(self, text: str) -> None:
        self._reader.refuse(RequestTimeout(text))
        self._pump()


def door(services: "Services") -> asyncio.Protocol:
    """A new connection's, as an event loop takes it."""
    return cast("asyncio.Protocol", FrontDoor(services))
