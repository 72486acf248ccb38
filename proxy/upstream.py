"""[6] The connections to providers: found, opened, kept, bounded, closed.

Owns how many connections there are, who waits for one, and where they lead. What is said on
one is `upstream_connection`'s.

Theory of operation: a pool keeps idle connections last-in first-out, opens new ones up to its
bound, and beyond it lets users wait in order. A user waits, or has a connection dialled for
it, or has one; `forget` ends the first two. Every connection is in `_open` from the end of
its dialling to its loss; whatever makes room (`_fill`) serves who has waited longest.

A name is resolved anew for each connection (a lookup under way is shared by a burst). A
connection ends when it has been idle too long, when it is too old, or when its address has
been missing from the name's answers for as long as an idle connection is kept: answers may
take turns, so once is not enough. Sessions of TLS are taken up again, see `upstream_tls`.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from socket import SOCK_STREAM
from typing import Any, cast

from accounting.contract.catalogue import Provider
from accounting.contract.errors import Failure, ProviderUnreachable, Unavailable
from accounting.contract.settings import Settings
from proxy.turn_end import TurnEnd
from proxy.upstream_connection import UpstreamConnection, UpstreamUser
from proxy.upstream_tls import ResumingContext, context_of, reason_of

_RELEASE_SECONDS = 2.0  # an answer that was complete to its user may take this long to end

Resolve = Callable[[str, int], Awaitable[list[str]]]
Distrusted = Callable[[str, str, bool], None]  # provider, why, whether it was trusted before


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of `host`, in the order to try them. Raises OSError."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=SOCK_STREAM)
    except UnicodeError:
        raise OSError("not a name that can be looked up") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ProviderPool:
    """All connections of this worker to one provider."""

    def __init__(
        self,
        provider: Provider,
        settings: Settings,
        context: ResumingContext | None,
        resolve: Resolve,
        distrusted: Distrusted,
    ) -> None:
        self._provider = provider
        self._limit = settings.upstream_connections
        self._waiting_limit = settings.upstream_waiting
        self._idle_seconds = settings.upstream_idle_seconds
        self._age_seconds = settings.upstream_age_seconds
        self._connect_seconds = provider.connect_timeout_seconds or settings.connect_timeout_seconds
        self._context = context
        self._resolve = resolve
        self._distrusted = distrusted
        self._loop = asyncio.get_running_loop()
        self.turn_end = TurnEnd(self._loop)
        self._idle: dict[UpstreamConnection, None] = {}  # the longest idle first
        self._waiting: deque[UpstreamUser] = deque()
        self._dialling: dict[UpstreamUser, asyncio.Task[None]] = {}
        self._dials: set[asyncio.Task[None]] = set()  # those forgotten, too, until they ended
        self._open: set[UpstreamConnection] = set()
        self._lookup: asyncio.Task[list[str]] | None = None
        self._seen: dict[str, float] = {}  # addresses, and when the name last led there
        self._trusted = True

    def __repr__(self) -> str:
        return (
            f"ProviderPool({self._provider.name}, open={len(self._open)}, idle={len(self._idle)}, "
            f"dialling={len(self._dials)}, waiting={len(self._waiting)})"
        )

    # For users

    def acquire(self, user: UpstreamUser, fresh: bool = False) -> None:
        """Give `user` a connection (`upstream_ready`) now or soon, or `upstream_refused`.

        `fresh`: not one that was used before, unless all that may be open are in use.
        """
        while self._idle and not fresh:
            connection, _ = self._idle.popitem()
            if connection.usable:
                connection.user = user
                user.upstream_ready(connection)
                return
        if fresh and not self._has_room and self._idle:
            self._give_up(next(iter(self._idle)))
        if self._has_room:
            self._dial(user)
        elif len(self._waiting) < self._waiting_limit:
            self._waiting.append(user)
        else:
            user.upstream_refused(Unavailable("Too many requests wait for this provider."))

    def forget(self, user: UpstreamUser) -> None:
        """A user left before it had a connection."""
        task = self._dialling.pop(user, None)
        if task is not None:
            task.cancel()
        elif user in self._waiting:
            self._waiting.remove(user)

    # For connections

    def put_back(self, connection: UpstreamConnection) -> None:
        """An answer has ended in order, and the connection can carry another."""
        now = self._loop.time()
        if self._outlived(connection, now):
            connection.abandon()
        elif self._waiting:
            user = self._waiting.popleft()
            connection.user = user
            user.upstream_ready(connection)
        else:
            connection.idle_since = now
            self._idle[connection] = None

    def learned(self, connection: UpstreamConnection) -> None:
        """A connection has its first answer: its TLS session is known by now."""
        if self._context is not None and connection.tls is not None:
            self._context.remember(connection.tls)

    def closed(self, connection: UpstreamConnection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._fill()

    # For the worker

    def sweep(self) -> None:
        """Close what has been idle for too long, and answers that do not come to their end."""
        now = self._loop.time()
        idle_before, late = now - self._idle_seconds, now - _RELEASE_SECONDS
        for connection in list(self._idle):
            if connection.idle_since < idle_before or self._outlived(connection, now):
                self._give_up(connection)
        for connection in [one for one in self._open if one.releasing and one.idle_since < late]:
            connection.abandon()

    @property
    def empty(self) -> bool:
        return not (self._open or self._dials or self._waiting)

    def close(self) -> None:
        self._waiting.clear()
        self._dialling.clear()
        for task in (*self._dials, *([self._lookup] if self._lookup else [])):
            task.cancel()
        for connection in list(self._open):
            connection.abandon()
        self._idle.clear()

    # Its parts

    @property
    def _has_room(self) -> bool:
        return len(self._open) + len(self._dials) < self._limit

    def _fill(self) -> None:
        """There may be room now: for those who have waited longest."""
        while self._waiting and self._has_room:
            self._dial(self._waiting.popleft())

    def _outlived(self, connection: UpstreamConnection, now: float) -> bool:
        """Whether a connection is too old, or its name leads elsewhere by now."""
        return now > connection.expires_at or connection.address not in self._seen

    def _give_up(self, connection: UpstreamConnection) -> None:
        """Close an idle connection; its place is free at once."""
        del self._idle[connection]
        self._open.discard(connection)
        connection.abandon()

    def _dial(self, user: UpstreamUser) -> None:
        task = self._dialling[user] = self._loop.create_task(self._connect(user))
        self._dials.add(task)
        task.add_done_callback(self._dialled)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dials.discard(task)
        self._fill()
        if not task.cancelled():
            task.result()

    async def _connect(self, user: UpstreamUser) -> None:
        """Ends with `user` served or refused, or, when it left, with nothing open."""
        connection = UpstreamConnection(self)
        failed: OSError | None = None
        try:
            await self._reach(connection)
        except OSError as error:  # names, sockets, time-outs and TLS alike
            failed = error
        except asyncio.CancelledError:
            connection.abandon()
            raise
        del self._dialling[user]
        self._dials.discard(cast("asyncio.Task[None]", asyncio.current_task()))
        if failed is not None or not connection.usable:
            connection.abandon()
            self._fill()
            user.upstream_refused(self._failure_of(failed))
            return
        self._trusted = True
        self._open.add(connection)
        connection.expires_at = self._loop.time() + self._age_seconds
        connection.user = user
        user.upstream_ready(connection)

    async def _reach(self, connection: UpstreamConnection) -> None:
        """Connect to the first address that answers, each given its share of the time left.

        Raises OSError. A failed handshake is final for its address: nothing is ever sent in
        clear to a provider that has TLS.
        """
        provider, loop = self._provider, self._loop
        tls: dict[str, Any] = {}
        if self._context is not None:
            tls = {"ssl": self._context, "server_hostname": provider.host}
        async with asyncio.timeout(self._connect_seconds) as whole:
            addresses = await self._addresses()
            for left in range(len(addresses), 0, -1):
                address = addresses[-left]
                share = (cast("float", whole.when()) - loop.time()) / left
                try:
                    async with asyncio.timeout(share):
                        await loop.create_connection(
                            lambda: cast("asyncio.Protocol", connection),
                            address,
                            provider.port,
                            **tls,
                        )
                    connection.address = address
                    return
                except OSError:
                    if left == 1:
                        raise

    async def _addresses(self) -> list[str]:
        """Where the provider's name leads now; a lookup under way is joined. Raises OSError."""
        if self._lookup is None:
            self._lookup = self._loop.create_task(self._look_up())
            self._lookup.add_done_callback(self._looked_up)
        return await asyncio.shield(self._lookup)

    async def _look_up(self) -> list[str]:
        found = await self._resolve(self._provider.host, self._provider.port)
        if not found:
            raise OSError("the name has no address")
        now = self._loop.time()
        before = now - self._idle_seconds
        self._seen = {known: at for known, at in self._seen.items() if at >= before}
        self._seen |= dict.fromkeys(found, now)
        return found

    def _looked_up(self, task: "asyncio.Task[list[str]]") -> None:
        self._lookup = None
        if not task.cancelled():
            task.exception()  # those who asked have it, if any are left

    def _failure_of(self, error: OSError | None) -> Failure:
        if isinstance(error, ssl.SSLError):
            if self._context is not None:
                self._context.forget(self._provider.host)
            self._distrusted(self._provider.name, reason_of(error), self._trusted)
            self._trusted = False
        return ProviderUnreachable()


class Upstreams:
    """The pools of all providers of the catalogue, by name."""

    def __init__(
        self, settings: Settings, distrusted: Distrusted, resolve: Resolve = resolve
    ) -> None:
        self._settings = settings
        self._distrusted = distrusted
        self._resolve = resolve
        self.pools: dict[str, ProviderPool] = {}

    def __repr__(self) -> str:
        return f"Upstreams({list(self.pools.values())!r})"

    def add(self, providers: Iterable[Provider]) -> None:
        """A pool for each. Raises CatalogueError for a `ca_file` that cannot be used."""
        contexts: dict[str, ResumingContext] = {}
        for provider in providers:
            if provider.tls and provider.ca_file not in contexts:
                contexts[provider.ca_file] = context_of(provider)
            context = contexts[provider.ca_file] if provider.tls else None
            self.pools[provider.name] = ProviderPool(
                provider, self._settings, context, self._resolve, self._distrusted
            )

    def sweep(self) -> None:
        for pool in self.pools.values():
            pool.sweep()

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
