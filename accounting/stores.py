"""The two stores, Postgres and Redis: opening them, and what their absence means.

Owns the one translation of outages: whatever a driver raises because a store is down, slow
or refusing becomes `Unavailable` (503 with Retry-After) where a function is `guarded`.
A mistake of ours (bad SQL, a script's refusal) is not an outage and passes unchanged.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import asyncpg
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from accounting.contract.errors import Unavailable
from accounting.contract.settings import Secret, Settings
from accounting.embedded_files import noted_url

_CONNECT_SECONDS = 5.0
_REDIS_CONNECTIONS = 128  # of one process; beyond it a call is refused like in any outage
OUTAGES = (
    OSError,  # TimeoutError is one
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection used after Postgres ended it, before it closed
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.ReadOnlySQLTransactionError,
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.OutOfMemoryError,
    redis_errors.ClusterDownError,
)

P = ParamSpec("P")
T = TypeVar("T")


class StoreError(Exception):
    """A store cannot be used from the start; the text is one line and names no password."""


def guarded(function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Turn an outage inside `function` into `Unavailable`."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(*args, **kwargs)
        except OUTAGES as error:
            raise Unavailable from error

    return call


async def open_postgres(settings: Settings) -> asyncpg.Pool:
    """A pool on a reachable, migrated database. Raises StoreError."""
    url = _url(settings, settings.database_url, "TOLLGATE_DATABASE_URL", "postgres")
    try:
        pool = await asyncpg.create_pool(
            url,
            min_size=1,
            max_size=settings.database_connections,
            timeout=min(_CONNECT_SECONDS, settings.database_timeout_seconds),
            command_timeout=settings.database_timeout_seconds,
        )
    except (*OUTAGES, asyncpg.PostgresError, ValueError) as error:
        raise StoreError(f"cannot reach Postgres{_where(url)}: {_why(error)}") from None
    if await pool.fetchval("select to_regclass('workspaces') is null"):
        await pool.close()
        raise StoreError("the database is empty: run `python -m accounting migrate`")
    return pool


async def open_redis(settings: Settings) -> Redis:
    """A client (bytes in, bytes out) of a reachable Redis. Raises StoreError.

    One repeat at once, for a connection that went stale: every script may run twice.
    """
    url = _url(settings, settings.redis_url, "TOLLGATE_REDIS_URL", "redis")
    try:
        client = Redis.from_url(
            url,
            socket_timeout=settings.redis_timeout_seconds,
            socket_connect_timeout=settings.redis_timeout_seconds,
            retry=Retry(NoBackoff(), 1),
            max_connections=_REDIS_CONNECTIONS,
        )
    except ValueError as error:
        raise StoreError(f"cannot reach Redis{_where(url)}: {_why(error)}") from None
    try:
        await client.ping()
    except (OSError, redis_errors.RedisError) as error:
        await client.aclose()
        raise StoreError(f"cannot reach Redis{_where(url)}: {_why(error)}") from None
    return client


def _url(settings: Settings, chosen: Secret, variable: str, embedded: str) -> str:
    """The URL that is set, else that of the embedded server of the data directory."""
    url = chosen.reveal() or noted_url(Path(settings.data_dir), embedded)
    if not url:
        raise StoreError(f"{variable} is not set, and nothing runs in {settings.data_dir}")
    return url


def _where(url: str) -> str:
    """` at host:port` of a URL, without its credentials; nothing when it has none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if not host:
        return ""
    return f" at {host}:{port}" if port else f" at {host}"


def _why(error: Any) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
