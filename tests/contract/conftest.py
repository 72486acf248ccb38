"""An empty Redis for each test of the scripts, behind a synchronous client."""

from collections.abc import Iterator

import pytest
from redis import Redis

from tests.contract.store import Store


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield Store(client)
        client.config_set("maxmemory", 0)


@pytest.fixture
def clocked(redis_url: str) -> Iterator[Store]:
    """A store whose scripts read the time that `set_clock` wrote."""
    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield Store(client, with_clock=True)
