"""Reading the streams: in order, pending ones first, nothing skipped, trimmed when posted."""

import pytest
from redis.asyncio import Redis

from accounting.contract.keyspace import STREAM_GROUP, stream_key
from accounting.usage_entries import START, Entry, StreamId
from accounting.usage_stream import UsageStream, read_range

WAIT = 0.01


async def add(redis: Redis, shard: int, *bodies: bytes) -> None:
    for body in bodies:
        await redis.xadd(stream_key(shard), {"b": "boot", "n": "1", "e": body})


async def reader(redis: Redis, *shards: int, batch: int = 100) -> UsageStream:
    stream = UsageStream(redis, batch)
    await stream.own(shards)
    await stream.read(WAIT)  # the pending lists, which are empty
    return stream


def bodies(entries: list[Entry]) -> list[tuple[int, bytes | None]]:
    return [(one.shard, one.body) for one in entries]


async def test_entries_come_in_order_and_once(redis_client: Redis) -> None:
    stream = await reader(redis_client, 3, 5)
    await add(redis_client, 3, b"a", b"b")
    await add(redis_client, 5, b"c")
    entries = await stream.read(WAIT)
    assert sorted(bodies(entries)) == [(3, b"a"), (3, b"b"), (5, b"c")]
    await stream.done(entries)
    assert await stream.read(WAIT) == []
    assert await redis_client.xlen(stream_key(3)) == await redis_client.xlen(stream_key(5)) == 0
    assert (await redis_client.xpending(stream_key(3), STREAM_GROUP))["pending"] == 0


async def test_a_successor_begins_with_what_was_pending(redis_client: Redis) -> None:
    first = await reader(redis_client, 3)
    await add(redis_client, 3, b"a", b"b")
    await first.read(WAIT)
    await add(redis_client, 3, b"c")
    second = UsageStream(redis_client, 100)
    await second.own([3])
    pending = await second.read(WAIT)
    assert bodies(pending) == [(3, b"a"), (3, b"b")]
    assert await second.deliveries(pending[0]) == 2
    await second.done(pending)
    assert await second.read(WAIT) == []  # nothing more is pending: onwards
    assert bodies(await second.read(WAIT)) == [(3, b"c")]


async def test_what_a_predecessor_still_took_is_not_skipped(redis_client: Redis) -> None:
    first, second = await reader(redis_client, 3), await reader(redis_client, 3)
    await add(redis_client, 3, b"a")
    await first.read(WAIT)  # it does not know yet that the shard is the other's
    await add(redis_client, 3, b"b")
    assert await second.read(WAIT) == []
    assert bodies(await second.read(WAIT)) == [(3, b"a"), (3, b"b")]


async def test_looking_behind_finds_what_a_predecessor_took(redis_client: Redis) -> None:
    first, second = await reader(redis_client, 3), await reader(redis_client, 3)
    await add(redis_client, 3, b"a")
    await first.read(WAIT)
    assert await second.read(WAIT) == []
    await second.look_behind()
    assert bodies(await second.read(WAIT)) == [(3, b"a")]


async def test_an_entry_can_be_read_again(redis_client: Redis) -> None:
    stream = await reader(redis_client, 3)
    await add(redis_client, 3, b"a", b"b")
    entries = await stream.read(WAIT)
    await stream.done(entries[:1])
    stream.read_again(3)
    assert await stream.read(WAIT) == entries[1:]
    assert await redis_client.xlen(stream_key(3)) == 1


async def test_a_trimmed_entry_that_is_pending_is_reported(redis_client: Redis) -> None:
    stream = await reader(redis_client, 3)
    await add(redis_client, 3, b"a", b"b")
    await stream.read(WAIT)
    await redis_client.xtrim(stream_key(3), maxlen=1, approximate=False)
    stream.read_again(3)
    assert bodies(await stream.read(WAIT)) == [(3, None), (3, b"b")]


async def test_lost_groups_are_made_again(redis_client: Redis) -> None:
    stream = await reader(redis_client, 3, 5)
    await redis_client.flushall()
    await add(redis_client, 3, b"a")
    assert await stream.read(WAIT) == []
    await stream.read(WAIT)
    assert bodies(await stream.read(WAIT)) == [(3, b"a")]
    await redis_client.flushall()
    await stream.look_behind()
    assert stream.shards == {3, 5}


async def test_only_owned_shards_are_read(redis_client: Redis) -> None:
    stream = await reader(redis_client, 3, 5)
    await stream.own([5])
    await add(redis_client, 3, b"a")
    assert await stream.read(WAIT) == []
    await stream.own([])
    assert await stream.read(WAIT) == []


@pytest.mark.parametrize("shards", [1, 10])
async def test_a_read_is_bounded(redis_client: Redis, shards: int) -> None:
    stream = await reader(redis_client, *range(shards), batch=10)
    for shard in range(shards):
        await add(redis_client, shard, *[b"x"] * 20)
    total = 0
    while entries := await stream.read(WAIT):
        assert len(entries) <= 10
        total += len(entries)
        await stream.done(entries)
    assert total == 20 * shards


async def test_a_range_excludes_its_start_and_includes_its_end(redis_client: Redis) -> None:
    await add(redis_client, 3, b"a", b"b", b"c")
    all_of_it = await read_range(redis_client, 3, START, StreamId(2**60, 0))
    assert [one.body for one in all_of_it] == [b"a", b"b", b"c"]
    middle = await read_range(redis_client, 3, all_of_it[0].id, all_of_it[1].id)
    assert [one.body for one in middle] == [b"b"]
