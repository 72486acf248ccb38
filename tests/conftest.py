"""Shared fixtures: one real Redis and one real Postgres for the whole run, clean for each test.

A test that takes `redis_client` starts on an empty Redis; one that takes
`database_url` gets a Postgres database of its own, copied from a migrated template.
"""

import asyncio
import importlib
import itertools
import os
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from accounting.embedded import Server, start_postgres, start_redis

if compiled := os.environ.get("COMPILED_PROXY"):  # the folder `proxy.compiled` prints
    sys.path.insert(0, compiled)
    importlib.import_module("proxy")  # at once: later the tests' own folder comes first again

_TEMPLATE = "migrated"
_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: starts whole programs; not in `make check`")
    config.addinivalue_line("markers", "interpreted: reaches into what may be compiled")
    config.addinivalue_line("markers", "stores: needs Redis or Postgres; not in `make check`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a store, directly or through another fixture; leave out what cannot be
    run compiled: subclasses and replaced methods of compiled classes."""
    skipped = pytest.mark.skip(reason="the compiled form has no such seam")
    for item in items:
        if compiled and item.get_closest_marker("interpreted"):
            item.add_marker(skipped)
        if {"redis_server", "postgres_server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("stores")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_postgres(tmp_path_factory.mktemp("postgres"), fsync=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(redis_server: Server) -> str:
    """The run's Redis, with whatever earlier tests left in it; see `redis_client`."""
    return redis_server.url


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[Redis]:
    """A client (bytes in, bytes out) on an empty Redis."""
    async with Redis.from_url(redis_url) as client:
        await client.flushall()
        yield client


@pytest.fixture(scope="session")
def postgres_url(postgres_server: Server) -> str:
    """The run's Postgres, as its owner; tests use a database of their own."""
    return postgres_server.url


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> str:
    """The name of a database with every migration applied, to copy from."""
    from accounting.migrate import migrate

    url = _database(postgres_url, _TEMPLATE)

    async def build() -> None:
        await _execute(postgres_url, f"CREATE DATABASE {_TEMPLATE}")
        await migrate(url)

    with ThreadPoolExecutor(1) as thread:  # away from the event loops of the tests
        thread.submit(asyncio.run, build()).result()
    return _TEMPLATE


@pytest.fixture
async def database_url(postgres_url: str, migrated_template: str) -> AsyncIterator[str]:
    """A migrated database for this test alone."""
    async for url in _fresh_database(postgres_url, migrated_template):
        yield url


@pytest.fixture
async def empty_database_url(postgres_url: str) -> AsyncIterator[str]:
    """A database without any migration, for this test alone."""
    async for url in _fresh_database(postgres_url, "template1"):
        yield url


async def _fresh_database(postgres_url: str, template: str) -> AsyncIterator[str]:
    name = f"test_{next(_numbers)}"
    await _execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _database(postgres_url, name)
    await _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def _database(url: str, name: str) -> str:
    return urlsplit(url)._replace(path=f"/{name}").geturl()
