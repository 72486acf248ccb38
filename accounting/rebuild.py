"""Fills Redis from Postgres and the surviving stream: wallets, keys, spend; then opens the gate.

Needed when Redis has lost its data (the key `epoch` is gone), or asked for by an operator.

Theory of operation. While `epoch` is missing nothing new is admitted, but exchanges that were
open still settle. A wallet is therefore computed and written under WATCH: whatever touches the
workspace meanwhile makes the write fail, and it is computed again. Several processes may find
the epoch missing: a lock lets one rebuild, the others then find it done.
"""

import asyncio
import itertools
import logging
from collections import Counter, defaultdict
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import WatchError

from accounting import keys, reckoning
from accounting.contract import keyspace
from accounting.contract.identifiers import ulid
from accounting.contract.keyspace import KeyCounters, LeaseRecord, Wallet
from accounting.deltas import RESERVE
from accounting.reckoning import Reckoning

_LOCK = 0x70_6C_67_05
_CHUNK = 100  # workspaces written in one step
_AT_ONCE = 4  # publications under way
_ATTEMPTS = 100
_log = logging.getLogger("tollgate.accounting")


class RebuildError(Exception):
    """A wallet was touched during every attempt to restore it."""


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
        states = dict(
            await connection.fetch(
                "select id, state from workspaces where id = any($1) order by id for no key update",
                workspace_ids,
            )
        )
        for _ in range(_ATTEMPTS):
            try:
                found = await _write(pool, redis, shard, states)
            except WatchError:
                continue
            await _mark_applied(connection, found)
            return
    raise RebuildError(f"wallets of shard {shard} changed {_ATTEMPTS} times while restored")


async def _write(pool: Any, redis: Redis, shard: int, states: dict[str, int]) -> list[Reckoning]:
    """Reckon and write as one step. Raises WatchError when anything changed in between."""
    async with redis.pipeline(transaction=True) as pipe:
        await pipe.watch(*map(keyspace.workspace_key, states))
        found = await reckoning.reckon(pool, redis, shard, list(states))
        pipe.multi()
        for one in found:
            fields = restored(one, states[one.workspace_id])
            pipe.hset(keyspace.workspace_key(one.workspace_id), mapping=fields)
        await pipe.execute()
    return found


def restored(found: Reckoning, state: int) -> dict[str, bytes]:
    """The fields a workspace should have: its wallet, and what each key has open and spent."""
    leases = found.snapshot.leases
    wallet = Wallet(
        balance=found.settled_ucr,
        held=sum(lease.credits_ucr for lease in leases.values()),
        state=state,
        last_delta=found.last_delta,
    )
    fields = {"w": msgspec.msgpack.encode(wallet)}
    leased: dict[str, LeaseRecord] = defaultdict(LeaseRecord)
    for (boot, key_id), lease in leases.items():
        if boot == RESERVE:
            continue
        leased[key_id].credits_ucr += lease.credits_ucr
        leased[key_id].tokens += lease.tokens
        leased[key_id].slots += lease.slots
    spent = Counter(found.spent)
    for key_id in {*spent, *leased, *found.snapshot.counters} - {""}:
        counters = found.snapshot.counters.get(key_id, KeyCounters())
        counters.spent_ucr = spent[key_id]
        counters.held_ucr = leased[key_id].credits_ucr
        counters.held_tokens = leased[key_id].tokens
        counters.open = leased[key_id].slots
        fields[f"c:{key_id}"] = msgspec.msgpack.encode(counters)
    return fields


async def _mark_applied(connection: Any, found: list[Reckoning]) -> None:
    """The deltas that are part of the figures just written."""
    await connection.execute(
        "update redis_deltas d set applied_at = now()"
        " from unnest($1::text[], $2::bigint[]) as x(workspace_id, last)"
        " where d.workspace_id = x.workspace_id and d.delta_id <= x.last and applied_at is null",
        [one.workspace_id for one in found],
        [one.last_delta for one in found],
    )
