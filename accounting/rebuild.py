"""Fills Redis from Postgres and the surviving stream: wallets, keys, spend; then opens the gate.

Needed when Redis has lost its data (the key `epoch` is gone), or asked for by an operator.

Theory of operation. While `epoch` is missing nothing new is admitted, but exchanges that were
open still settle. A settle moves a balance and what the ledger expects of it by the same
amount, so the difference between the two, once reckoned, stays what it is: a script adds it,
whatever has settled since. Only a delta applied meanwhile would count twice; the script sees
that and changes nothing. What is held is summed anew from the leases within the script.

Several processes may find the epoch missing: a lock lets one rebuild, the others find it done.
"""

import asyncio
import itertools
import logging
from collections import defaultdict
from typing import Any

import msgspec
from redis.asyncio import Redis

from accounting import keys, reckoning
from accounting.contract import keyspace, scripts
from accounting.contract.identifiers import ulid
from accounting.contract.keyspace import KeyCounters
from accounting.reckoning import Reckoning

_LOCK = 0x70_6C_67_05
_CHUNK = 100  # workspaces reckoned together
_AT_ONCE = 4  # publications under way
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
local w, counters, held = nil, {}, 0
local function counter(key_id)
  counters[key_id] = counters[key_id] or {0, 0, 0, 0, 0, 0, 0, 0, 0}
  return counters[key_id]
end
for i = 1, #fields, 2 do
  local key_id = string.match(fields[i], '^c:(.+)$')
  if fields[i] == 'w' then w = cmsgpack.unpack(fields[i + 1]) end
  if key_id then
    local c = cmsgpack.unpack(fields[i + 1])
    c[6], c[7], c[8] = 0, 0, 0
    counters[key_id] = c
  end
end
if not w or w[4] ~= seen then return 0 end
for i = 1, #fields, 2 do
  local boot, key_id = string.match(fields[i], '^l:(.+):([^:]+)$')
  if boot then
    local l = cmsgpack.unpack(fields[i + 1])
    held = held + l[1]
    if boot ~= 'expiry' then
      local c = counter(key_id)
      c[6], c[7], c[8] = c[6] + l[3], c[7] + l[1], c[8] + l[2]
    end
  end
end
for _, one in ipairs(spent) do
  local c = counter(one[1])
  c[9] = c[9] + one[2]
end
w[1], w[2], w[4] = w[1] + balance, held, last
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
    return not await redis.exists(keyspace.EPOCH)


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
    await redis.delete(keyspace.EPOCH)
    await _publish_keys(pool, redis)
    by_shard: dict[int, list[str]] = defaultdict(list)
    for row in await pool.fetch("select id from workspaces order by id"):
        by_shard[keyspace.shard_of(row["id"])].append(row["id"])
    for shard, workspace_ids in by_shard.items():
        for start in range(0, len(workspace_ids), _CHUNK):
            await _restore(pool, redis, shard, workspace_ids[start : start + _CHUNK])
    await redis.set(keyspace.EPOCH, ulid())
    count = sum(map(len, by_shard.values()))
    _log.info("Redis has been rebuilt: %d workspaces", count)
    return count


async def _publish_keys(pool: Any, redis: Redis) -> None:
    """Without wallets, which come next, they open nothing."""
    rows = iter(await pool.fetch("select id from api_keys order by id"))
    while group := list(itertools.islice(rows, _AT_ONCE)):
        await asyncio.gather(*(keys.publish(pool, redis, row["id"]) for row in group))


async def _restore(pool: Any, redis: Redis, shard: int, workspace_ids: list[str]) -> None:
    """Write some workspaces of a shard, their rows locked: nobody changes a state meanwhile."""
    async with pool.acquire() as connection, connection.transaction():
        rows = await connection.fetch(
            "select id, state from workspaces where id = any($1) order by id for no key update",
            workspace_ids,
        )
        for row in rows:
            key = keyspace.workspace_key(row["id"])
            await scripts.call(redis, "put_workspace", [key], [row["state"]])
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
    async with redis.pipeline(transaction=False) as pipe:
        for one in found:
            pipe.eval(_RESTORE, 1, keyspace.workspace_key(one.workspace_id), _differences(one))
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
