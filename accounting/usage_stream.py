"""The usage streams in Redis: read as one consumer group, acknowledged, trimmed.

Each shard has a stream and, in the group, one consumer whose name never changes. So what was
delivered to a reader that died is its successor's own pending list, to be read again first.

Theory of operation. A shard is read either onwards (`>`) or again from its pending list
(`0`), which is how it begins. After reading onwards the pending list must hold exactly what
was read: anything more was delivered to somebody who still believed to own the shard and can
post nothing any more. Then what was just read is put back, so to say, and the shard is read
again from its pending list, in order. Only what is posted is acknowledged and trimmed.
"""

from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from accounting.contract.keyspace import STREAM_GROUP, stream_key
from accounting.usage_entries import Entry, StreamId, entry

_CONSUMER = "shard"
_AGAIN, _ONWARDS = "0", ">"
_RANGE_PAGE = 500


class UsageStream:
    """The streams of some shards. Not to be used by two tasks at once."""

    def __init__(self, redis: Redis, batch: int) -> None:
        """`batch`: entries wanted per read, of all shards together."""
        self._redis = redis
        self._batch = batch
        self._position: dict[int, str] = {}
        self._busy = 0  # shards that had something at the last read
        self.more = False  # than the last read could bring, of some shard, may be waiting

    def __repr__(self) -> str:
        return f"<UsageStream shards={sorted(self._position)}>"

    @property
    def shards(self) -> set[int]:
        return set(self._position)

    async def own(self, shards: Iterable[int]) -> None:
        """Read these shards from now on, new ones from their pending list."""
        wanted = set(shards)
        for shard in self.shards - wanted:
            del self._position[shard]
        for shard in wanted - self.shards:
            await self._make_group(shard)
            self._position[shard] = _AGAIN

    def read_again(self, shard: int) -> None:
        """Something of it was not posted after all."""
        if shard in self._position:
            self._position[shard] = _AGAIN

    async def look_behind(self) -> None:
        """With nothing in hand nothing may be pending: what is, will be read again."""
        try:
            behind = await self._more_pending_than(dict.fromkeys(self._position, 0))
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._begin_again()
            return
        for shard in behind:
            self._position[shard] = _AGAIN

    async def read(self, wait_seconds: float) -> list[Entry]:
        """The next entries of each shard in order; empty when none came in time."""
        if not self._position:
            return []
        try:
            return await self._read(wait_seconds)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            await self._begin_again()
            return []

    async def _begin_again(self) -> None:
        """Redis has lost the groups, perhaps with the streams: make them, read from the start."""
        shards = self.shards
        self._position.clear()
        await self.own(shards)

    async def _read(self, wait_seconds: float) -> list[Entry]:
        reply = await self._read_group(wait_seconds)
        found: list[Entry] = []
        onwards: dict[int, int] = {}
        for shard, entries in reply.items():
            if self._position[shard] == _ONWARDS:
                onwards[shard] = len(entries)
            elif not entries:
                self._position[shard] = _ONWARDS
            found += entries
        self._busy = sum(1 for entries in reply.values() if entries)
        overtaken = await self._more_pending_than(onwards)
        for shard in overtaken:
            self._position[shard] = _AGAIN
        return [one for one in found if one.shard not in overtaken]

    async def _read_group(self, wait_seconds: float) -> dict[int, list[Entry]]:
        keys = {stream_key(shard): shard for shard in sorted(self._position)}
        count = max(1, self._batch // max(1, self._busy or len(keys)))
        reply: Any = await self._redis.xreadgroup(
            STREAM_GROUP,
            _CONSUMER,
            {key: self._position[shard] for key, shard in keys.items()},
            count=count,
            block=max(1, int(wait_seconds * 1000)),
        )
        found = {}
        for key, entries in reply:
            shard = keys[key.decode()]
            found[shard] = [entry(shard, raw_id, fields) for raw_id, fields in entries]
        self.more = any(len(entries) >= count for entries in found.values())
        return found

    async def _more_pending_than(self, expected: dict[int, int]) -> set[int]:
        if not expected:
            return set()
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in expected:
                pipe.xpending(stream_key(shard), STREAM_GROUP)
            pairs = zip(expected.items(), await pipe.execute(), strict=True)
        return {shard for (shard, count), reply in pairs if reply["pending"] != count}

    async def deliveries(self, one: Entry) -> int:
        """How often an entry was delivered by now."""
        found = await self._redis.xpending_range(
            stream_key(one.shard), STREAM_GROUP, str(one.id), str(one.id), 1
        )
        return int(found[0]["times_delivered"]) if found else 0

    async def done(self, entries: list[Entry]) -> None:
        """Acknowledge what was posted, and trim each stream up to the last of it."""
        posted: dict[int, list[StreamId]] = {}
        for one in entries:
            posted.setdefault(one.shard, []).append(one.id)
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard, ids in posted.items():
                pipe.xack(stream_key(shard), STREAM_GROUP, *map(str, ids))
                pipe.xtrim(stream_key(shard), minid=str(max(ids).next), approximate=False)
            await pipe.execute()

    async def _make_group(self, shard: int) -> None:
        try:
            await self._redis.xgroup_create(stream_key(shard), STREAM_GROUP, "0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise


async def read_range(redis: Redis, shard: int, after: StreamId, until: StreamId) -> list[Entry]:
    """A page of the entries after one id, up to and including another."""
    reply: Any = await redis.xrange(stream_key(shard), str(after.next), str(until), _RANGE_PAGE)
    return [entry(shard, raw_id, fields) for raw_id, fields in reply]
