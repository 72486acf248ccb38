"""Shards are shared out evenly, held by one session each, and free when it ends."""

from contextlib import AsyncExitStack

import asyncpg

from accounting.contract.settings import SHARDS
from accounting.shard_locks import ShardLocks
from tests.waiting import eventually

ALL = set(range(SHARDS))


async def member(stack: AsyncExitStack, url: str) -> ShardLocks:
    connection = await asyncpg.connect(url)
    stack.callback(connection.terminate)
    locks = ShardLocks(connection)
    await locks.join()
    return locks


async def settled(*members: ShardLocks) -> list[set[int]]:
    """Everybody's shards, after each has had its turn twice."""
    for _ in range(2):
        for one in members:
            await one.share()
    return [one.held for one in members]


async def test_one_session_takes_all(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        assert await settled(await member(stack, database_url)) == [ALL]


async def test_several_share_evenly_and_hold_nothing_twice(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        members = [await member(stack, database_url)]
        await settled(*members)
        for count in range(2, 6):
            members.append(await member(stack, database_url))
            shares = await settled(*members)
            assert set().union(*shares) == ALL
            assert sum(map(len, shares)) == SHARDS
            assert max(map(len, shares)) == -(-SHARDS // count)


async def test_the_shards_of_a_dead_session_are_taken_over(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        one, two = await member(stack, database_url), await member(stack, database_url)
        await settled(one, two)
        async with AsyncExitStack() as admin:
            connection = await asyncpg.connect(database_url)
            admin.push_async_callback(connection.close)
            await connection.execute(
                "select pg_terminate_backend($1)", one._connection.get_server_pid()
            )
            assert await eventually(lambda: _takes_all(two))


async def _takes_all(locks: ShardLocks) -> bool:
    return await locks.share() == ALL


async def test_a_held_shard_is_not_given_twice(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        one = await member(stack, database_url)
        await one.share()
        two = await member(stack, database_url)
        assert await two.share() == set()  # until the first has given up its surplus
        assert two.short and not one.short
        assert len(await one.share()) == SHARDS // 2
        assert await two.share() == ALL - one.held
        assert not two.short
