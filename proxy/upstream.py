"""[6] Pooled keep-alive connections to providers: open, send, read answers, reuse.

Owns connections and their bounds. Whoever uses one implements `UpstreamUser`; each use ends
with exactly one of `upstream_end`, `upstream_lost` or the user's own `release()` (it needs
no more of this answer) or `abandon()` (cut it).

Theory of operation: a pool keeps idle connections last-in first-out, opens new ones up to
its bound (names are resolved anew each time), and beyond it lets users wait in order. A
connection goes back to the pool when an answer has ended cleanly and may be kept alive. The
provider may have closed a pooled connection unseen; `reused` and `heard` tell the user
whether sending once more is safe.
"""

import asyncio
import ssl
from collections import deque
from typing import Protocol, cast

import httptools

from accounting.contract.catalogue import Provider
from accounting.contract.errors import Failure, ProviderUnreachable, Unavailable

_RELEASE_SECONDS = 2.0  # an answer that was complete to its user may take this long to end


class UpstreamUser(Protocol):
    """What a connection tells the one who uses it."""

    def upstream_ready(self, connection: "UpstreamConnection") -> None: ...
    def upstream_refused(self, failure: Failure) -> None: ...
    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...
    def upstream_body(self, data: bytes) -> None: ...
    def upstream_end(self) -> None: ...
    def upstream_lost(self, garbled: bool) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One HTTP/1.1 client connection, serving one user at a time."""

    __slots__ = (
        "_complete", "_headers", "_keep", "_parser", "_pieces", "_pool", "_status", "_transport",
        "_until_close", "heard", "idle_since", "releasing", "reused", "user",
    )  # fmt: skip

    def __init__(self, pool: "ProviderPool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self.user: UpstreamUser | None = None
        self.reused = False
        self.idle_since = 0.0
        self._reset()

    def __repr__(self) -> str:
        return f"UpstreamConnection(in_use={self.user is not None}, reused={self.reused})"

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._complete = False
        self._keep = False
        self._until_close = False
        self.heard = False
        self.releasing = False

    def send(self, head: bytes, body: bytes) -> None:
        assert self._transport is not None
        self._transport.writelines([head, body])

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def release(self) -> None:
        """The user has all it needs: read the answer's last bytes, then keep the connection."""
        self.user = None
        self.resume()
        if self._complete:
            self._finish()
        else:
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

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

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
            user.upstream_head(self._status, self._headers)
        pieces = self._pieces
        if pieces and self.user is user:
            self._pieces = []
            user.upstream_body(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._complete and self.user is user:
            self._finish()
            user.upstream_end()

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
        """The answer has ended: back to the pool, or closed if it may not be kept."""
        self.user = None
        if self._keep and self.usable:
            self._reset()
            self.reused = True
            self._pool.put_back(self)
        elif self._transport is not None:
            self._transport.abort()

    # httptools

    def on_message_begin(self) -> None:
        """Something follows a whole answer, and nobody asked for it: keep it from the next."""
        if self._complete:
            self._keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer; 101 would be an upgrade nobody asked for
            self._headers = {}
            return
        self._status = status
        headers = self._headers
        self._until_close = not (
            b"content-length" in headers or b"transfer-encoding" in headers or status in (204, 304)
        )

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._status and not self._until_close and not self._complete:
            self._complete = True
            self._keep = self._parser.should_keep_alive()


class ProviderPool:
    """All connections of this worker to one provider."""

    def __init__(
        self,
        provider: Provider,
        limit: int,
        waiting_limit: int,
        idle_seconds: float,
        connect_seconds: float,
    ) -> None:
        self._provider = provider
        self._limit = limit
        self._waiting_limit = waiting_limit
        self._idle_seconds = idle_seconds
        self._connect_seconds = provider.connect_timeout_seconds or connect_seconds
        self._context = _tls_context(provider) if provider.tls else None
        self._loop = asyncio.get_running_loop()
        self._idle: list[UpstreamConnection] = []
        self._waiting: deque[UpstreamUser] = deque()
        self._dialling: dict[asyncio.Task[None], UpstreamUser] = {}
        self._open: set[UpstreamConnection] = set()

    def __repr__(self) -> str:
        return (
            f"ProviderPool({self._provider.name}, open={len(self._open)}, "
            f"idle={len(self._idle)}, waiting={len(self._waiting)})"
        )

    def acquire(self, user: UpstreamUser, fresh: bool = False) -> None:
        """Give `user` a connection (`upstream_ready`) now or soon, or `upstream_refused`."""
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable:
                connection.user = user
                user.upstream_ready(connection)
                return
        if len(self._open) + len(self._dialling) < self._limit:
            self._dial(user)
        elif len(self._waiting) < self._waiting_limit:
            self._waiting.append(user)
        else:
            user.upstream_refused(Unavailable("Too many requests wait for this provider."))

    def forget(self, user: UpstreamUser) -> None:
        """A user left before it had a connection."""
        if user in self._waiting:
            self._waiting.remove(user)
        for task, waiting in self._dialling.items():
            if waiting is user:
                task.cancel()
                break

    def put_back(self, connection: UpstreamConnection) -> None:
        if self._waiting:
            user = self._waiting.popleft()
            connection.user = user
            self._loop.call_soon(self._hand_over, connection, user)
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def closed(self, connection: UpstreamConnection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting and len(self._open) + len(self._dialling) < self._limit:
            self._dial(self._waiting.popleft())

    def sweep(self) -> None:
        """Close what has been idle too long: oldest first, as they lie."""
        before = self._loop.time() - self._idle_seconds
        for connection in [one for one in self._idle if one.idle_since < before]:
            self._idle.remove(connection)
            connection.abandon()
        late = self._loop.time() - _RELEASE_SECONDS
        for connection in [one for one in self._open if one.releasing and one.idle_since < late]:
            connection.abandon()

    def close(self) -> None:
        for task in self._dialling:
            task.cancel()
        for connection in list(self._open):
            connection.abandon()
        self._idle.clear()

    def _hand_over(self, connection: UpstreamConnection, user: UpstreamUser) -> None:
        if connection.user is user:
            user.upstream_ready(connection)

    def _dial(self, user: UpstreamUser) -> None:
        task = self._loop.create_task(self._connect(user))
        self._dialling[task] = user
        task.add_done_callback(self._dialled)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling.pop(task, None)

    async def _connect(self, user: UpstreamUser) -> None:
        provider = self._provider
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(self),
                    provider.host,
                    provider.port,
                    ssl=self._context,
                )
        except (OSError, TimeoutError, ssl.SSLError):
            user.upstream_refused(ProviderUnreachable())
            return
        self._open.add(connection)
        connection.user = user
        user.upstream_ready(connection)


def _tls_context(provider: Provider) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=provider.ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Upstreams:
    """The pools of all providers, made when first used."""

    def __init__(
        self, limit: int, waiting_limit: int, idle_seconds: float, connect_seconds: float
    ) -> None:
        self._bounds = (limit, waiting_limit, idle_seconds, connect_seconds)
        self._pools: dict[Provider, ProviderPool] = {}

    def __repr__(self) -> str:
        return f"Upstreams({list(self._pools.values())!r})"

    def pool(self, provider: Provider) -> ProviderPool:
        pool = self._pools.get(provider)
        if pool is None:
            pool = self._pools[provider] = ProviderPool(provider, *self._bounds)
        return pool

    def sweep(self) -> None:
        for pool in self._pools.values():
            pool.sweep()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
