"""Fills Redis from Postgres and the surviving stream: wallets, keys, spend; then opens the gate.

Needed when Redis has lost its data (the key `epoch` is gone), when it was started anew, for it
may lack its last seconds, or asked for by an operator.

Theory of operation. While `epoch` is missing nothing new is admitted, but exchanges that were
open still settle. A settle moves a balance and what the ledger expects of it by the same
amount, so the difference between the two, once reckoned, stays what it is: a script adds it,
whatever has settled since. Only a delta applied meanwhile would count twice; the script sees
that and changes nothing. What is held is summed anew from the leases within the script, after
the workers have told them anew (`muster.py`). The epoch names the run of Redis it is for, so
that the next start takes it away.

Several processes may find the epoch missing: a lock lets one rebuild, the others find it done.
"""

import asyncio
import logging
from collections import defaultdict
from typing import Any

import msgspec
from redis.asyncio import Redis

from accounting import keys, muster, reckoning
from accounting.contract import keyspace, scripts
from accounting.contract.identifiers import ulid
from accounting.contract.keyspace import KeyCounters
from accounting.reckoning import Reckoning

_LOCK = 0x70_6C_67_05
_CHUNK = 500  # workspaces reckoned together
_CONNECTIONS_EACH = 3  # of the pool, for one chunk
_CONNECTIONS_SPARED = 2
_ATTEMPTS = 100
_RESTORE = """
-- restore: add to a wallet and its keys what they differ from the ledger.
-- KEYS[1] {sNN}:ws:<workspace>
-- ARGV[1] MessagePack: {last delta applied when reckoned, last delta that the difference
--         includes, µcr to add to the balance, {{key id, µcr to add to its spend}, ...}}
-- reply   1 done; 0 a delta was applied since: reckon again
-- Invariant: held = sum of leases = sum of what keys hold, and of what expiry reserves.
local seen, last, balance, spent = unpack(cmsgpack.unpack(ARGV[1]))
local fields = redis.call('HGETALL', KEYS[1])
local w, counters, held, unused = nil, {}, 0, 0
local function counter(key_id)
  counters[key_id] = counters[key_id] or {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
  return counters[key_id]
end
for i = 1, #fields, 2 do
  local key_id = string.match(fields[i], '^c:(.+)$')
  if fields[i] == 'w' then w = cmsgpack.unpack(fields[i + 1]) end
  if key_id then
    local c = cmsgpack.unpack(fields[i + 1])
    c[6], c[7], c[8], c[10] = 0, 0, 0, 0
    counters[key_id] = c
  end
end
if not w or w[4] ~= seen then return 0 end
for i = 1, #fields, 2 do
  local boot, key_id = string.match(fields[i], '^l:(.+):([^:]+)$')
  if boot then
    local l = cmsgpack.unpack(fields[i + 1])
    held, unused = held + l[1], unused + (l[5] or 0)
    if boot ~= 'expiry' then
      local c = counter(key_id)
      c[6], c[7], c[8] = c[6] + l[3], c[7] + l[1], c[8] + l[2]
      c[10] = c[10] + (l[4] or 0)
    end
  end
end
for _, one in ipairs(spent) do
  local c = counter(one[1])
  c[9] = c[9] + one[2]
end
w[1], w[2], w[4], w[5] = w[1] + balance, held, last, unused
redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w))
for key_id, c in pairs(counters) do
  redis.call('HSET', KEYS[1], 'c:' .. key_id, cmsgpack.pack(c))
end
return 1
"""
_log = logging.getLogger("tollgate.accounting")


class RebuildError(Exception):
    """A wallet received credits during every attempt to restore it."""


async def needed(redis: Redis) -> bool:
    """Whether Redis does not say that it was filled, in the run it is in."""
    epoch: Any = await redis.get(keyspace.EPOCH)
    return not (epoch and keyspace.is_filled(epoch.decode(), (await muster.run_of(redis))[0]))


async def rebuild(pool: Any, redis: Redis, *, always: bool = False) -> int:
    """Restore every workspace; how many. With `always` also when nothing seems to be lost.

    Raises RebuildError, reckoning.RestlessError, and the drivers' errors: then the gate stays
    closed, and doing it again is safe.
    """
    async with pool.acquire() as connection:
        await connection.execute("select pg_advisory_lock($1)", _LOCK)
        try:
            if not always and not await needed(redis):
                return 0
            return await _rebuild(pool, redis)
        finally:
            await connection.execute("select pg_advisory_unlock($1)", _LOCK)


async def _rebuild(pool: Any, redis: Redis) -> int:
    epoch = keyspace.epoch_of(ulid(), (await muster.run_of(redis))[0])
    await redis.delete(keyspace.EPOCH)
    await muster.raise_ids(pool, redis)
    rows = await pool.fetch("select id, state from workspaces order by id")
    for start in range(0, len(rows), _CHUNK):
        await _make_known(redis, rows[start : start + _CHUNK])
    await keys.publish_all(pool, redis)
    missing = await muster.call(pool, redis, epoch)
    await _restore_all(pool, redis, [row["id"] for row in rows])
    await redis.set(keyspace.EPOCH, epoch)
    await redis.delete(keyspace.MUSTER)
    _log.info("Redis has been rebuilt: %d workspaces", len(rows))
    if missing:
        _log.error("did not tell what they hold: %s", ", ".join(sorted(missing)))
    return len(rows)


async def _make_known(redis: Redis, rows: list[Any]) -> None:
    """Without keys and balance, which come next, a workspace opens nothing."""
    await scripts.load_all(redis)
    async with redis.pipeline(transaction=False) as pipe:
        for row in rows:
            where = keyspace.workspace_key(row["id"])
            pipe.evalsha(scripts.SCRIPTS["put_workspace"].digest, 1, where, row["state"])
        await pipe.execute()


async def _restore_all(pool: Any, redis: Redis, workspace_ids: list[str]) -> None:
    by_shard: dict[int, list[str]] = defaultdict(list)
    for workspace_id in workspace_ids:
        by_shard[keyspace.shard_of(workspace_id)].append(workspace_id)
    chunks = iter(
        [
            (shard, ids[start : start + _CHUNK])
            for shard, ids in by_shard.items()
            for start in range(0, len(ids), _CHUNK)
        ]
    )

    async def restore_some() -> None:
        for shard, chunk in chunks:
            await _restore(pool, redis, shard, chunk)

    at_once = max(1, (pool.get_max_size() - _CONNECTIONS_SPARED) // _CONNECTIONS_EACH)
    tasks = [asyncio.create_task(restore_some()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _restore(pool: Any, redis: Redis, shard: int, workspace_ids: list[str]) -> None:
    """Write some workspaces of a shard, their rows locked: nobody changes a state meanwhile."""
    async with pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch(
            "select id, state from workspaces where id = any($1) order by id for no key update",
            workspace_ids,
        )
        await _make_known(redis, rows)
        for _ in range(_ATTEMPTS):
            found = await reckoning.reckon(pool, redis, shard, workspace_ids)
            done = await _add_differences(redis, found)
            await _mark_applied(connection, [one for one in found if one.workspace_id in done])
            workspace_ids = [one for one in workspace_ids if one not in done]
            if not workspace_ids:
                return
    raise RebuildError(f"{workspace_ids[0]} received credits {_ATTEMPTS} times while restored")


async def _add_differences(redis: Redis, found: list[Reckoning]) -> set[str]:
    """Bring wallets and spend to what they should be; the workspaces where that was possible."""
    digest = await redis.script_load(_RESTORE)
    async with redis.pipeline(transaction=False) as pipe:
        for one in found:
            pipe.evalsha(digest, 1, keyspace.workspace_key(one.workspace_id), _differences(one))
        replies = await pipe.execute()
    return {one.workspace_id for one, done in zip(found, replies, strict=True) if done}


def _differences(found: Reckoning) -> bytes:
    wallet = found.snapshot.wallet
    assert wallet is not None  # made known just before, and never removed
    counters = found.snapshot.counters
    spent = [
        (key_id, found.spent.get(key_id, 0) - counters.get(key_id, KeyCounters()).spent_ucr)
        for key_id in {*found.spent, *counters} - {""}
    ]
    return msgspec.msgpack.encode(
        (wallet.last_delta, found.last_delta, found.settled_ucr - wallet.balance, spent)
    )


async def _mark_applied(connection: Any, found: list[Reckoning]) -> None:
    """The deltas that are part of the figures just written."""
    await connection.execute(
        "update redis_deltas d set applied_at = now()"
        " from unnest($1::text[], $2::bigint[]) as x(workspace_id, last)"
        " where d.workspace_id = x.workspace_id and d.delta_id <= x.last and applied_at is null",
        [one.workspace_id for one in found],
        [one.last_delta for one in found],
    )
