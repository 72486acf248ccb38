"""Redis for tests of single proxy parts: pipes to it, a relay in between, seeded workspaces."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self
from urllib.parse import urlsplit

from redis import Redis

from accounting.contract import keyspace
from accounting.contract.keyspace import KeyRecord
from proxy.redis_pipe import RedisPipe, pack
from tests.contract.store import Store


@contextmanager
def empty_store(redis_url: str) -> Iterator[Store]:
    """The scripts on an emptied Redis that says it was filled."""
    with Redis.from_url(redis_url) as client:
        client.flushall()
        client.set(keyspace.EPOCH, "1")
        yield Store(client)


@asynccontextmanager
async def open_pipe(
    url: str, timeout_seconds: float = 5.0, pending_limit: int = 1000
) -> AsyncIterator[RedisPipe]:
    """A connected pipe; `changes` on it lists its changes of state."""
    changes: list[bool] = []
    pipe = RedisPipe(url, timeout_seconds, pending_limit, changes.append)
    pipe.changes = changes  # type: ignore[attr-defined]
    await pipe.start()
    try:
        yield pipe
    finally:
        await pipe.stop()


def record(workspace_id: str = "ws_1", key_id: str = "key_1", version: int = 1) -> KeyRecord:
    return KeyRecord(version, key_id, workspace_id, "test", [], [])


class Between:
    """A relay in front of Redis. `silent`: replies are thrown away; `closed`: no way in."""

    def __init__(self, redis_url: str) -> None:
        self._redis = urlsplit(redis_url)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.silent = False
        self.closed = False
        self.commands_seen = b""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        login = self._redis.netloc.rpartition("@")[0]
        port = self._server.sockets[0].getsockname()[1]
        return self._redis._replace(netloc=f"{login}@127.0.0.1:{port}").geturl()

    def cut(self) -> None:
        """Reset every connection there is."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.transport.abort()
            return
        there = await asyncio.open_connection(self._redis.hostname, self._redis.port)
        self._writers += [writer, there[1]]
        for task in (
            asyncio.create_task(self._carry(reader, there[1], False)),
            asyncio.create_task(self._carry(there[0], writer, True)),
        ):
            self._tasks.add(task)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, replies: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if not replies:
                    self.commands_seen += data
                if not (replies and self.silent):
                    writer.write(data)
        except OSError:
            self.cut()
        writer.close()


class FailingCalls:
    """A pipe whose n-th call is lost, before Redis took it or after; then all of them."""

    def __init__(self, pipe: RedisPipe, lost_from: int, after: bool, error: Exception) -> None:
        self._pipe = pipe
        self._left = lost_from
        self._after = after
        self._error = error
        self.calls = 0

    async def call(self, packed: bytes) -> Any:
        self.calls += 1
        self._left -= 1
        if self._left > 0:
            return await self._pipe.call(packed)
        if self._left == 0 and self._after:
            await self._pipe.call(packed)
        raise self._error

    async def command(self, *words: Any) -> Any:
        return await self.call(pack(words))
