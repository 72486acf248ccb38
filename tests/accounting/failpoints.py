"""Kill a connection between any two statements: what a crash at that point leaves behind.

`Failpoints(n)` counts the statements and commands that go through its wrappers; before the
n-th, or after it and before its answer, the connection it goes over is gone. Running the same
thing for every n until none is hit any more visits every point there is.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting.contract.errors import Unavailable

SEEN = (OSError, asyncpg.InterfaceError, asyncpg.PostgresError, RedisError, Unavailable)


class Failpoints:
    """`answered`: the statement is carried out, and only its answer is lost."""

    def __init__(self, at: int, answered: bool) -> None:
        self._at, self._answered = at, answered
        self.steps = 0

    def __repr__(self) -> str:
        return f"<{'after' if self._answered else 'before'} step {self._at}>"

    @property
    def hit(self) -> bool:
        return self.steps >= self._at

    async def step(self, act: Callable[[], Awaitable[Any]], kill: Callable[[], None]) -> Any:
        self.steps += 1
        if self.steps != self._at:
            return await act()
        if self._answered:
            await act()
        kill()
        raise ConnectionResetError(f"killed {self!r}")


async def every_point(attempt: Callable[[Failpoints], Awaitable[None]]) -> int:
    """Call `attempt` for each point until one lies beyond its end; how many there were."""
    visited = 0
    for answered in (False, True):
        for at in range(1, 1000):
            points = Failpoints(at, answered)
            await attempt(points)
            if not points.hit:
                break
            visited += 1
    return visited


class FaultyConnection:
    """An asyncpg connection, counted."""

    def __init__(self, points: Failpoints, connection: Any) -> None:
        self._points, self._connection = points, connection

    async def _step(self, name: str, *arguments: Any, **more: Any) -> Any:
        act = getattr(self._connection, name)
        return await self._points.step(lambda: act(*arguments, **more), self._connection.terminate)

    async def execute(self, *arguments: Any, **more: Any) -> Any:
        return await self._step("execute", *arguments, **more)

    async def fetch(self, *arguments: Any, **more: Any) -> Any:
        return await self._step("fetch", *arguments, **more)

    async def fetchrow(self, *arguments: Any, **more: Any) -> Any:
        return await self._step("fetchrow", *arguments, **more)

    async def fetchval(self, *arguments: Any, **more: Any) -> Any:
        return await self._step("fetchval", *arguments, **more)

    @asynccontextmanager
    async def transaction(self, **options: Any) -> AsyncIterator[None]:
        transaction = self._connection.transaction(**options)
        await self._points.step(transaction.start, self._connection.terminate)
        try:
            yield
        except BaseException:
            if not self._connection.is_closed():
                await transaction.rollback()
            raise
        await self._points.step(transaction.commit, self._connection.terminate)


class FaultyPool:
    """An asyncpg pool whose connections are counted."""

    def __init__(self, points: Failpoints, pool: asyncpg.Pool) -> None:
        self._points, self._pool = points, pool

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[FaultyConnection]:
        async with self._pool.acquire() as connection:
            yield FaultyConnection(self._points, connection)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **more: Any) -> Any:
            async with self.acquire() as connection:
                return await getattr(connection, name)(*arguments, **more)

        return call


class FaultyRedis:
    """A Redis client, or a pipeline of one, counted by command or by execution."""

    def __init__(self, points: Failpoints, client: Any, counted: str | None = None) -> None:
        self._points, self._client, self._counted = points, client, counted

    def pipeline(self, **options: Any) -> Any:
        return FaultyRedis(self._points, self._client.pipeline(**options), "execute")

    async def __aenter__(self) -> Any:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *problem: Any) -> None:
        await self._client.__aexit__(*problem)

    def __getattr__(self, name: str) -> Any:
        act = getattr(self._client, name)
        if self._counted not in (None, name):
            return act

        async def call(*arguments: Any, **more: Any) -> Any:
            return await self._points.step(lambda: act(*arguments, **more), lambda: None)

        return call


def faulty(points: Failpoints, pool: asyncpg.Pool, redis: Redis) -> tuple[Any, Any]:
    """Both stores through the same points."""
    return FaultyPool(points, pool), FaultyRedis(points, redis)
