"""One pipelined connection to Redis: commands out in one write per loop turn, replies in order.

Owns the connection, its time-outs and its return after an outage. What commands mean is
others' business. Every command sent gets exactly one callback: with the reply, with a
`hiredis.ReplyError`, or with `RedisDown`.

Theory of operation: `send` appends packed bytes to a list and the callback to a queue; the
list is written once at the end of the loop turn. A watchdog looks at the oldest waiting
command; past the time-out the connection is given up and everything waiting fails, so a
hung Redis costs an exchange one time-out at most and later ones nothing. A new connection
is greeted (password, database, scripts) before it carries anyone's command. A Redis that
lost its scripts says so in a reply; they are loaded again at once.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import hiredis

from accounting.contract.scripts import SCRIPTS

OnReply = Callable[[Any], None]
pack = cast("Callable[[tuple[object, ...]], bytes]", hiredis.pack_command)
_LOADS = [("SCRIPT", "LOAD", script.source) for script in SCRIPTS.values()]
_FIRST_RETRY_SECONDS = 0.05
_LEAST_PATIENCE_SECONDS = 0.001
_LAST_RETRY_SECONDS = 0.5


class RedisDown(Exception):
    """No reply: not connected, connection lost, timed out, or too many commands waiting."""


class RedisPipe(asyncio.Protocol):
    """See the module. `on_change(up)` is called at each change of state."""

    def __init__(
        self,
        url: str,
        timeout_seconds: float,
        pending_limit: int,
        on_change: Callable[[bool], None],
    ) -> None:
        self._url = urlsplit(url)
        self._timeout = timeout_seconds
        self._pending_limit = pending_limit
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader()
        self._waiting: deque[tuple[float, OnReply]] = deque()
        self._outgoing: list[bytes] = []
        self._flush_planned = False
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._loading = False
        self.up = False

    def __repr__(self) -> str:
        return f"RedisPipe(up={self.up}, waiting={len(self._waiting)})"

    async def start(self) -> None:
        """Connect once, raising OSError where Redis cannot be had; then keep connected."""
        await self._connect()
        self._keeper = self._loop.create_task(self._keep())

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self.up = False
        self._drop()

    def send(self, packed: bytes, on_reply: OnReply) -> None:
        """Send one packed command; `on_reply` is called exactly once, never from inside."""
        if not self.up or len(self._waiting) >= self._pending_limit:
            self._loop.call_soon(on_reply, RedisDown())
            return
        self._enqueue(packed, on_reply)

    def _enqueue(self, packed: bytes, on_reply: OnReply) -> None:
        self._waiting.append((self._loop.time(), on_reply))
        self._outgoing.append(packed)
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    async def command(self, *words: Any) -> Any:
        """One command, awaited. Raises RedisDown or hiredis.ReplyError."""
        return await self.call(pack(words))

    async def call(self, packed: bytes) -> Any:
        """One packed command, awaited. Raises RedisDown or hiredis.ReplyError."""
        return await self._reply_to(packed, self.send)

    async def _reply_to(self, packed: bytes, send: Callable[[bytes, OnReply], None]) -> Any:
        reply: asyncio.Future[Any] = self._loop.create_future()
        send(packed, lambda got: None if reply.done() else reply.set_result(got))
        got = await reply
        if isinstance(got, Exception):
            raise got
        return got

    def _flush(self) -> None:
        self._flush_planned = False
        if self._transport is not None and self._outgoing:
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    # Connection

    async def _connect(self) -> None:
        url = self._url
        self._reader = hiredis.Reader()
        self._lost.clear()
        async with asyncio.timeout(max(1.0, self._timeout)):
            if url.scheme == "unix":
                await self._loop.create_unix_connection(lambda: self, url.path)
            else:
                context = ssl.create_default_context() if url.scheme == "rediss" else None
                await self._loop.create_connection(
                    lambda: self, url.hostname or "127.0.0.1", url.port or 6379, ssl=context
                )
            await self._greet()
        self.up = True
        self._on_change(True)

    async def _greet(self) -> None:
        try:
            await self._introduce()
        except (RedisDown, hiredis.ReplyError, asyncio.CancelledError) as error:
            self._drop()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise ConnectionError(f"Redis refused the greeting: {error}") from None
        if self._transport is None:
            raise ConnectionError("Redis closed the connection after the greeting")

    async def _introduce(self) -> None:
        url = self._url
        greeting: list[tuple[str, ...]] = []
        if url.password:
            name = [unquote(url.username)] if url.username else []
            greeting.append(("AUTH", *name, unquote(url.password)))
        database = url.path.strip("/") if url.scheme != "unix" else ""
        if database:
            greeting.append(("SELECT", database))
        greeting += _LOADS
        for words in greeting:
            await self._reply_to(pack(words), self._enqueue)

    def _load_scripts(self) -> None:
        """Redis forgot them: later commands will find them again."""
        if not self._loading:
            self._loading = True
            for words in _LOADS:
                self.send(pack(words), self._loaded)

    def _loaded(self, reply: object) -> None:
        self._loading = False

    async def _keep(self) -> None:
        """Watch the oldest command; connect again after a loss, waiting longer each time."""
        while True:
            while self.up:
                try:
                    await asyncio.wait_for(self._lost.wait(), self._patience_left())
                except TimeoutError:
                    await self._check_oldest()
            pause = _FIRST_RETRY_SECONDS
            while not self.up:
                try:
                    await self._connect()
                except (OSError, TimeoutError):
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LAST_RETRY_SECONDS)

    def _patience_left(self) -> float:
        """Until the oldest command can be late; one sent meanwhile is not late before."""
        if not self._waiting:
            return self._timeout
        left = self._waiting[0][0] + self._timeout - self._loop.time()
        return max(_LEAST_PATIENCE_SECONDS, left)

    async def _check_oldest(self) -> None:
        if self._late:
            await asyncio.sleep(0.001)  # if it was this loop that stood still: read what is there
            if self._late:
                self._drop()

    @property
    def _late(self) -> bool:
        waiting = self._waiting
        return bool(waiting) and self._loop.time() - waiting[0][0] > self._timeout

    def _drop(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()
        self._down()

    def _down(self) -> None:
        was_up, self.up = self.up, False
        self._outgoing.clear()
        self._lost.set()
        self._fail_waiting()
        if was_up:
            self._on_change(False)

    def _fail_waiting(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for _, on_reply in waiting:
            self._tell(on_reply, RedisDown())

    def _tell(self, on_reply: OnReply, reply: Any) -> None:
        """One exchange's bug must not cost the others a reply."""
        try:
            on_reply(reply)
        except Exception as error:
            self._loop.call_exception_handler({"message": "on_reply", "exception": error})

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        try:
            reader.feed(data)
            reply = reader.gets()
            while reply is not False:
                on_reply = waiting.popleft()[1]
                self._tell(on_reply, reply)
                if self._waiting is not waiting:
                    return  # the connection was given up meanwhile
                if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                    self._load_scripts()
                reply = reader.gets()
        except (hiredis.ProtocolError, IndexError):  # not Redis, or more replies than commands
            self._drop()

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._transport = None
            self._down()
