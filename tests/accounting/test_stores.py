"""What counts as an outage and what as a mistake; how a store that cannot be used is named."""

import asyncio

import asyncpg
import pytest
from msgspec import structs
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from accounting.contract import scripts
from accounting.contract.errors import NotFound, Unavailable
from accounting.contract.settings import Secret, Settings
from accounting.stores import StoreError, guarded, open_postgres, open_redis
from tests.accounting.scene import pool_on
from tests.waiting import free_port


@guarded
async def fetch(pool: asyncpg.Pool, sql: str, *arguments: object) -> object:
    return await pool.fetchval(sql, *arguments)


@guarded
async def fail(error: BaseException) -> None:
    raise error


async def test_a_mistake_is_not_an_outage(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        assert await fetch(pool, "select 1") == 1
        with pytest.raises(asyncpg.UndefinedTableError):
            await fetch(pool, "select * from nowhere")
        with pytest.raises(asyncpg.DataError):
            await fetch(pool, "select $1::bigint", "a word")
    with pytest.raises(ResponseError):
        await guarded(scripts.call)(redis_client, "put_workspace", ["{s00}:ws:x"], [9])
    with pytest.raises(NotFound):
        await fail(NotFound())


async def test_a_store_that_gives_up_is_an_outage(database_url: str) -> None:
    async with pool_on(database_url) as pool:
        with pytest.raises(Unavailable):
            await fetch(pool, "select pg_terminate_backend(pg_backend_pid())")
        assert await fetch(pool, "select 1") == 1
    with pytest.raises(Unavailable):
        await fetch(pool, "select 1")
    for error in (
        ConnectionResetError(),
        TimeoutError(),
        asyncpg.DeadlockDetectedError(),
        asyncpg.InternalClientError(),  # Postgres said good-bye a moment before it was asked
    ):
        with pytest.raises(Unavailable) as refused:
            await fail(error)
        assert refused.value.__cause__ is error and refused.value.retry_after_seconds == 1


async def test_a_cancellation_passes() -> None:
    with pytest.raises(asyncio.CancelledError):
        await fail(asyncio.CancelledError())


async def test_stores_are_opened(redis_url: str, database_url: str, redis_client: Redis) -> None:
    settings = Settings(redis_url=Secret(redis_url), database_url=Secret(database_url))
    settings = structs.replace(settings, redis_timeout_seconds=5.0)
    async with await open_redis(settings) as redis, await open_postgres(settings) as pool:
        await redis.set("here", "1")
        assert await redis_client.get("here") == b"1"
        assert await pool.fetchval("select count(*) from workspaces") == 0


async def test_what_is_wrong_is_one_line_without_the_password(
    redis_url: str, postgres_url: str, empty_database_url: str
) -> None:
    where = f"127.0.0.1:{free_port()}"
    cases = [
        (open_redis, {"redis_url": f"redis://:hidden@{where}/0"}, f"cannot reach Redis at {where}"),
        (open_redis, {"redis_url": _with_password(redis_url)}, "cannot reach Redis at"),
        (open_redis, {"redis_url": ""}, "TOLLGATE_REDIS_URL is not set"),
        (open_postgres, {"database_url": f"postgresql://a:hidden@{where}/x"}, f"at {where}: "),
        (open_postgres, {"database_url": _with_password(postgres_url)}, "cannot reach Postgres at"),
        (open_postgres, {"database_url": empty_database_url}, "accounting migrate"),
        (open_postgres, {"database_url": ""}, "TOLLGATE_DATABASE_URL is not set"),
    ]
    for opening, changed, text in cases:
        secrets = {name: Secret(url) for name, url in changed.items()}
        with pytest.raises(StoreError) as refused:
            await opening(Settings(**secrets, redis_timeout_seconds=5.0))
        assert text in str(refused.value)
        assert "hidden" not in str(refused.value) and "\n" not in str(refused.value)


def _with_password(url: str) -> str:
    """The URL with another password than the right one."""
    before, _, rest = url.rpartition("@")
    return before.rpartition(":")[0] + ":hidden@" + rest
