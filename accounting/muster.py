"""Before the gate of a rebuilt Redis opens: what workers alone know is told.

Owns the call and the waiting. Each living worker tells anew what it holds for requests in
flight, and late what it had settled and Redis has lost (`proxy.standing`). Whoever does not
answer in time does so before its own gate opens; what it held may then be promised twice, which
the ledger shows as a receivable, never as a wrong balance.
"""

import asyncio
import time
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from accounting import usage_entries, usage_records
from accounting.contract import keyspace
from accounting.contract.settings import SHARDS
from accounting.usage_entries import START, StreamId

_PATIENCE_SECONDS = 3.0
_POSTED_SECONDS = 2.0
_LOOK_SECONDS = 0.02
_LIVING_MS = 10_000
_FRESH_MS = 5_000
_EMPTIED_SECONDS = 0.3  # for workers to find a Redis that was emptied under them
_STARTED_SECONDS = 2.0  # and one that was started anew


async def run_of(redis: Redis) -> tuple[str, float]:
    """The run of this Redis, and for how many seconds it has lasted."""
    info: Any = await redis.info("server")
    return info["run_id"], float(info["uptime_in_seconds"])


async def call(pool: Any, redis: Redis, epoch: str) -> set[str]:
    """Have every worker tell what it knows; the boots that have not, within the patience."""
    _run, uptime = await run_of(redis)
    least = 0.0
    if await _is_fresh(redis) and await _was_used(pool):
        least = max(_EMPTIED_SECONDS, _STARTED_SECONDS - uptime)
    await redis.set(keyspace.MUSTER, epoch)
    began = time.monotonic()
    while True:
        found: Any = await redis.hgetall(keyspace.mustered_key(epoch))
        answers = {boot.decode(): int(told) for boot, told in found.items()}
        missing = await _living(redis) - set(answers)
        waited = time.monotonic() - began
        if waited >= (_PATIENCE_SECONDS if missing else least):
            break
        await asyncio.sleep(_LOOK_SECONDS)
    if any(answers.values()):
        await _until_posted(pool, redis)
    return missing


async def _is_fresh(redis: Redis) -> bool:
    """It has no past: nobody in it tells who lives."""
    ms: Any = await redis.hget(keyspace.CLOCK, "ms")
    return int(ms or 0) < _FRESH_MS


async def _was_used(pool: Any) -> bool:
    return bool(await pool.fetchval("select exists (select from journals where kind = 'usage')"))


async def _living(redis: Redis) -> set[str]:
    """Boots heard of lately, by the clock that moves only while they can be."""
    ms: Any = await redis.hget(keyspace.CLOCK, "ms")
    heard: Any = await redis.zrangebyscore(keyspace.HEARD, int(ms or 0) - _LIVING_MS, "+inf")
    fenced: Any = await redis.zrange(keyspace.FENCED, 0, -1)
    return {boot.decode() for boot in heard if boot not in fenced}


async def _until_posted(pool: Any, redis: Redis) -> None:
    """Wait a while for what was told late: the balances are to include it."""
    wanted = await positions(redis)
    deadline = time.monotonic() + _POSTED_SECONDS
    for shard, position in enumerate(wanted):
        while await usage_records.watermark(pool, shard) < position:
            if time.monotonic() >= deadline:
                return
            await asyncio.sleep(_LOOK_SECONDS)


async def positions(redis: Redis) -> list[StreamId]:
    """The last id of each shard's stream."""
    async with redis.pipeline(transaction=False) as pipe:
        for shard in range(SHARDS):
            pipe.xinfo_stream(keyspace.stream_key(shard))
        found = await pipe.execute(raise_on_error=False)
    return [START if isinstance(one, ResponseError) else _last_id(one) for one in found]


def _last_id(reply: Any) -> StreamId:
    if isinstance(reply, Exception):
        raise reply
    return usage_entries.stream_id(reply["last-generated-id"])


async def raise_ids(pool: Any, redis: Redis) -> None:
    """Let no new entry of a stream come before what is posted, whatever Redis's clock says."""
    found = await positions(redis)
    for row in await pool.fetch("select shard, last_ms, last_seq from stream_offsets"):
        posted = StreamId(row["last_ms"], row["last_seq"])
        if found[row["shard"]] >= posted:
            continue
        key = keyspace.stream_key(row["shard"])
        try:
            await redis.xgroup_create(key, keyspace.STREAM_GROUP, "0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        try:
            await redis.execute_command("XSETID", key, str(posted))  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if "smaller" not in str(error):  # an entry has come meanwhile, with a higher id
                raise
