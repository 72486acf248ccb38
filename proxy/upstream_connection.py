"""[6] One keep-alive connection to a provider: a request out, its answer in, again.

Owns the reading of HTTP/1.1 answers and what makes a connection fit for another one. Whoever
uses it implements `UpstreamUser`; each use ends with exactly one of `upstream_end`,
`upstream_lost` or the user's own `release()` (it needs no more of this answer) or `abandon()`
(cut it). The provider may have closed a pooled connection unseen; `reused` and `heard` tell
the user whether sending once more is safe.
"""

import asyncio
import socket
import ssl
from typing import Protocol, cast

import httptools

from accounting.contract.errors import Failure
from proxy.turn_end import TurnEnd

_MUTE_BYTES = 65_536  # heads, interim answers, trailers: this much may bring no body byte
_DEAD_MILLISECONDS = 20_000  # a peer that acknowledges nothing for so long is gone
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it


class UpstreamUser(Protocol):
    """What a connection tells the one who uses it."""

    def upstream_ready(self, connection: "UpstreamConnection") -> None: ...
    def upstream_refused(self, failure: Failure) -> None: ...
    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def upstream_body(self, data: bytes) -> None: ...
    def upstream_end(self) -> None: ...
    def upstream_lost(self, garbled: bool) -> None: ...


class Keeper(Protocol):
    """Where a connection goes when it is not in use."""

    turn_end: TurnEnd

    def put_back(self, connection: "UpstreamConnection") -> None: ...
    def learned(self, connection: "UpstreamConnection") -> None: ...
    def closed(self, connection: "UpstreamConnection") -> None: ...


class NotUnderstood(Exception):
    """Well-formed HTTP, but nothing that was asked for."""


class UpstreamConnection:
    """One HTTP/1.1 client connection to `address`, serving one user at a time; an
    asyncio.Protocol by its shape."""

    __slots__ = (
        "_complete", "_headers", "_keep", "_mute", "_outgoing", "_parser", "_paused", "_pieces",
        "_pool", "_status", "_transport", "_until_close", "address", "expires_at", "heard",
        "idle_since", "releasing", "reused", "user",
    )  # fmt: skip

    def __init__(self, pool: Keeper) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)  # for one answer after another
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._paused = False
        self.user: UpstreamUser | None = None
        self.address = ""
        self.reused = False
        self.expires_at = 0.0
        self.idle_since = 0.0
        self._reset()

    def __repr__(self) -> str:
        return f"UpstreamConnection(in_use={self.user is not None}, reused={self.reused})"

    def _reset(self) -> None:
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._mute = 0
        self._complete = False
        self._keep = False
        self._until_close = False
        self.heard = False
        self.releasing = False

    def send(self, head: bytes, body: bytes) -> None:
        """Written at the end of the loop turn, beside those of other connections: waking the
        provider once for many costs a fifth less CPU than once for each (see ARCHITECTURE)."""
        self._outgoing = [head, body]
        self._pool.turn_end.add(self._send_now)

    def _send_now(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self.usable and self._transport is not None:
            self._transport.writelines(outgoing)

    def pause(self) -> None:
        if self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def release(self) -> None:
        """The user has all it needs: read the answer's last bytes, then keep the connection."""
        self.user = None
        if self._complete:
            self._finish()
        else:
            self.resume()
            self.releasing = True
            self.idle_since = asyncio.get_running_loop().time()

    def abandon(self) -> None:
        """The user is done with an answer that has not ended: cut it at once."""
        self.user = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The TLS state of an open connection that has any."""
        found = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        return cast("ssl.SSLObject | None", found)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if _TCP_USER_TIMEOUT is not None:
            opened: socket.socket = transport.get_extra_info("socket")
            opened.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, _DEAD_MILLISECONDS)

    def data_received(self, data: bytes) -> None:
        user = self.user
        if user is None:
            self._read_rest(data)
            return
        self.heard = True
        had_head = self._status
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self._complete:
                self._lose(garbled=True)
                return
            self._keep = False
        if self._status and not had_head:
            self._mute = 0
            user.upstream_head(self._status, self._headers)
            if self.user is not user:  # the head was enough: cut, released or even in use again
                return
        pieces = self._pieces
        if pieces:
            self._mute = 0
            self._pieces = []
            user.upstream_body(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        elif self._says_nothing(data):
            return
        if self._complete and self.user is user:
            self._finish()
            user.upstream_end()

    def _says_nothing(self, data: bytes) -> bool:
        """Bound what is neither body nor end: heads and trailers are collected by the parser."""
        self._mute += len(data)
        too_much = self._mute > _MUTE_BYTES and not self._complete
        if too_much:
            self._lose(garbled=True)
        return too_much

    def _read_rest(self, data: bytes) -> None:
        """Bytes nobody waits for: the end of a released answer, else something is wrong."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.releasing = False
        self._pieces.clear()
        if not self.releasing:
            self.abandon()
        elif self._complete:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.closed(self)
        user = self.user
        if user is None:
            return
        if self._until_close and error is None:
            self.user = None
            user.upstream_end()
        else:
            self._lose(garbled=False)

    def _lose(self, garbled: bool) -> None:
        user, self.user = self.user, None
        if self._transport is not None:
            self._transport.abort()
        if user is not None:
            user.upstream_lost(garbled)

    def _finish(self) -> None:
        """The answer has ended: back to the pool, or closed if it may not be kept.

        An answer may come before its request was read to the end (413, say). What is then
        still unsent would go before the next request, to a peer that may never read it.
        """
        self.user = None
        transport = self._transport
        if transport is None:
            return
        if not self.reused:
            self.reused = True
            self._pool.learned(self)
        if not self._keep or transport.is_closing() or transport.get_write_buffer_size():
            transport.abort()
            return
        if self._paused:
            self.resume()
        self._reset()
        self._pool.put_back(self)

    # httptools

    def on_message_begin(self) -> None:
        """Something follows a whole answer, and nobody asked for it: keep it from the next."""
        if self._complete:
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._status:
            return  # a trailer, which nobody reads
        headers, name = self._headers, name.lower()
        headers[name] = b"%b, %b" % (headers[name], value) if name in headers else value

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer; 101 would be an upgrade nobody asked for
            self._headers = {}
            return
        self._status = status
        headers = self._headers
        coding = headers.get(b"transfer-encoding")
        if coding is not None and coding.lower() != b"chunked":
            raise NotUnderstood
        self._until_close = not (
            coding is not None or b"content-length" in headers or status in (204, 304)
        )

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._status and not self._until_close and not self._complete:
            self._complete = True
            self._keep = self._parser.should_keep_alive()
