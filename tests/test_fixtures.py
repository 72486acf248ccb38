"""The shared fixtures keep what they promise: real servers, and no test sees another's data."""

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.waiting import eventually, eventually_blocking, free_port


@pytest.mark.parametrize("round_number", [1, 2])
async def test_each_test_starts_on_an_empty_redis(redis_client: Redis, round_number: int) -> None:
    assert await redis_client.dbsize() == 0
    await redis_client.set("left over", round_number)


@pytest.mark.parametrize("round_number", [1, 2])
async def test_each_test_has_a_database_of_its_own(
    empty_database_url: str, round_number: int
) -> None:
    connection = await asyncpg.connect(empty_database_url)
    await connection.execute("CREATE TABLE left_over ()")
    await connection.close()


async def test_eventually_returns_the_first_true_answer() -> None:
    answers = iter([0, None, "yes"])
    assert await eventually(lambda: next(answers)) == "yes"

    async def condition() -> int:
        return 7

    assert await eventually(condition) == 7


async def test_eventually_gives_up_with_the_last_answer() -> None:
    with pytest.raises(AssertionError, match="but 0"):
        await eventually(lambda: 0, timeout_seconds=0)
    with pytest.raises(AssertionError, match="but 0"):
        eventually_blocking(lambda: 0, timeout_seconds=0)


def test_free_ports_are_ports() -> None:
    assert 1024 <= free_port() <= 65535
