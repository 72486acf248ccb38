"""Hosts lost for good: what their workers still lease is given back when the time is up.

A worker that dies leaves its journal, and any living worker of its host replays that within
seconds. With the host gone nobody does; then the boot is silent, and after the setting's time
it is fenced and retired here. What it had used and not settled by then is settled late, should
the host come back (`proxy.replay`).

Theory of operation. Silence is measured by a clock in Redis that moves only while Redis serves
and accounting looks (`silent.lua`): after an outage of either, every worker has the whole time
again. A boot is fenced first, everywhere, so that no command of it that comes late can take a
hold or charge one; then each lease is given back. Any step may be lost: the boot stays among
those heard of until all is done, and is taken up again. Boots that never said they live, like
the one that reserves expiring credits, are none of the reaper's business.
"""

from typing import Any

from redis.asyncio import Redis

from accounting.contract import keyspace, scripts
from accounting.contract.settings import SHARDS

FENCE_KEPT_SECONDS = 30 * 86_400.0  # a host may come back from a long pause
_AT_ONCE = 100


async def reap(redis: Redis, silence_seconds: float) -> list[str]:
    """Retire the boots that have been silent for so long; their names.

    To be called about every second, by any number of processes. Raises redis's errors.
    """
    silence_ms, keep_ms = int(silence_seconds * 1000), int(FENCE_KEPT_SECONDS * 1000)
    keys = [keyspace.HEARD, keyspace.FENCED, keyspace.CLOCK]
    silent = await scripts.call(redis, "silent", keys, [silence_ms, keep_ms])
    boots = [boot.decode() for boot in silent]
    for boot in boots:
        await retire(redis, boot)
    return boots


async def retire(redis: Redis, boot: str) -> None:
    """Fence a boot in every shard, give back what it leases, and forget it."""
    await scripts.load_all(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for shard in range(SHARDS):
            keys = [keyspace.boots_key(shard), keyspace.leases_key(shard, boot)]
            pipe.evalsha(scripts.SCRIPTS["fence"].digest, 2, *keys, boot)
        found = await pipe.execute()
    async with redis.pipeline(transaction=False) as pipe:
        for shard, leased in enumerate(found):
            for member in leased:
                workspace_id, _, key_id = member.decode().partition("|")
                keys = [keyspace.workspace_key(workspace_id), keyspace.leases_key(shard, boot)]
                words: list[Any] = [*keys, boot, key_id, workspace_id, 0]
                pipe.evalsha(scripts.SCRIPTS["retire"].digest, 2, *words)
        await pipe.execute()
    keep_ms = int(FENCE_KEPT_SECONDS * 1000)
    await scripts.call(redis, "depart", [keyspace.HEARD, keyspace.FENCED], [boot, keep_ms])


async def forget_fences(redis: Redis) -> int:
    """Take down fences whose time is up: how many."""
    seconds, _ = await redis.time()
    now_ms = int(seconds) * 1000
    boots: Any = await redis.zrange(
        keyspace.FENCED,
        "-inf",
        now_ms,
        byscore=True,
        offset=0,
        num=_AT_ONCE,
    )
    for raw in boots:
        boot = raw.decode()
        async with redis.pipeline(transaction=False) as pipe:
            for shard in range(SHARDS):
                pipe.hdel(keyspace.boots_key(shard), boot)
                pipe.delete(keyspace.leases_key(shard, boot))
            pipe.zrem(keyspace.FENCED, boot)
            await pipe.execute()
    return len(boots)
