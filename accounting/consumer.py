"""Posts the shards it owns: read, post, acknowledge, again and again; survives both stores.

The loop and its decisions: when to read again, when to isolate an entry, when to give it up to
quarantine. How a batch is posted is `usage_posting.py`, how streams are read `usage_stream.py`.

Theory of operation. An outage of either store ends the session: connection, locks and all that
is in hand. Nothing is lost by that, since what was not acknowledged is delivered again and
what had been committed is recognised. An entry that Postgres refuses to take is tried alone;
what comes after it in its shard waits, for offsets pass over nothing; after the configured
number of deliveries it goes to quarantine.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from itertools import groupby
from typing import Any

import asyncpg
from redis.asyncio import ConnectionPool, Redis
from redis.exceptions import RedisError

from accounting import usage_posting, usage_records
from accounting.contract.settings import Settings
from accounting.counters import Counters
from accounting.quarantine import Alarm
from accounting.shard_locks import ShardLocks
from accounting.store_states import POSTGRES, REDIS, StoreStates
from accounting.stores import OUTAGES
from accounting.usage_entries import Entry
from accounting.usage_posting import Posted
from accounting.usage_stream import UsageStream

REFUSALS = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)
_LOST = (*OUTAGES, RedisError, asyncpg.IdleInTransactionSessionTimeoutError)
_TRANSACTION_BYTES = 1024 * 1024  # of events, some thousands, in one SQL transaction
_SHARE_SECONDS = 2.0
# From one read to the next, unless more is waiting than one brings: a read of all shards costs
# Redis 65 µs however little it finds, and each shard in it three commands more. With 1,500
# requests/s of as many workspaces: 221 -> 117 µs of accounting per event, Postgres 198 -> 140.
_GATHER_SECONDS = 0.05
_SHARE_SOON_SECONDS = 0.1  # while others are to give up shards, which nobody posts meanwhile
_REDIS_PATIENCE_SECONDS = 5.0
_PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_SESSION = """
-- A stopped or unreachable process must not keep its shards: Postgres ends its session.
set idle_session_timeout = '15s';
set idle_in_transaction_session_timeout = '15s';
set tcp_keepalives_idle = 5;
set tcp_keepalives_interval = 2;
set tcp_keepalives_count = 3;
set jit = off;
set application_name = 'tollgate accounting'
"""


class Consumer:
    """One session's worth of shards. Run `run` as a task, end it with `stop`."""

    def __init__(
        self,
        settings: Settings,
        pool: asyncpg.Pool,
        redis: Redis,
        counters: Counters,
        states: StoreStates,
    ) -> None:
        """One connection of the pool is kept for the session, and one like `redis`'s."""
        self._settings = settings
        self._pool = pool
        self._redis = redis
        self._counters = counters
        self._states = states
        self._alarm = Alarm()
        self._stopping = asyncio.Event()
        self._wait_seconds = min(settings.accounting_wait_seconds, _SHARE_SECONDS)
        self._failures = 0
        self._owned = 0

    def __repr__(self) -> str:
        return f"<Consumer owns={self._owned} failures={self._failures}>"

    def stop(self) -> None:
        """Finish the batch in hand and return from `run`."""
        self._stopping.set()

    async def run(self) -> None:
        """Post until stopped. Raises what no outage explains: a mistake of ours."""
        while not self._stopping.is_set():
            try:
                await self._session()
            except _LOST as error:
                self._counters.outages += self._states.lost(error, self)
                await self._pause()
            finally:
                self._own_count(0)

    async def _pause(self) -> None:
        seconds = _PAUSES_SECONDS[min(self._failures, len(_PAUSES_SECONDS) - 1)]
        self._failures += 1
        await self._stops_within(seconds)

    async def _stops_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    def _own_count(self, shards: int) -> None:
        self._counters.owned_shards += shards - self._owned
        self._owned = shards

    async def _session(self) -> None:
        connection = await self._pool.acquire(timeout=self._settings.database_timeout_seconds)
        redis = _patient(self._redis, self._wait_seconds + _REDIS_PATIENCE_SECONDS)
        try:
            await connection.execute(_SESSION)
            locks = ShardLocks(connection)
            await locks.join()
            stream = UsageStream(redis, self._settings.accounting_batch)
            await self._post_shards(connection, locks, stream)
        finally:
            with suppress(asyncpg.InterfaceError):  # lost, and taken back by the pool already
                connection.terminate()
            await self._pool.release(connection)
            await redis.aclose()

    async def _post_shards(self, connection: Any, locks: ShardLocks, stream: UsageStream) -> None:
        share_again_at = 0.0
        while not self._stopping.is_set():
            if time.monotonic() >= share_again_at:
                await stream.own(await locks.share())
                await stream.look_behind()
                self._own_count(len(locks.held))
                self._states.answered({POSTGRES, REDIS}, self)
                self._failures = 0
                soon = _SHARE_SOON_SECONDS if locks.short else _SHARE_SECONDS
                share_again_at = time.monotonic() + soon
            if not locks.held:
                await self._stops_within(max(0.0, share_again_at - time.monotonic()))
                continue
            entries = await self._read(stream)
            if entries:
                gathered_at = time.monotonic() + _GATHER_SECONDS
                await self._post(connection, stream, entries)
                if not stream.more:
                    await self._stops_within(max(0.0, gathered_at - time.monotonic()))

    async def _read(self, stream: UsageStream) -> list[Entry]:
        """The next entries, or none when asked to stop meanwhile: they stay pending."""
        read = asyncio.ensure_future(stream.read(self._wait_seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({read, stop}, return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else []
        finally:
            stop.cancel()
            read.cancel()
            await asyncio.gather(read, stop, return_exceptions=True)

    async def _post(self, connection: Any, stream: UsageStream, entries: list[Entry]) -> None:
        stuck: set[int] = set()
        for part in _parts(entries):
            for gone, run in groupby(part, key=lambda one: one.body is None):
                ready = [one for one in run if one.shard not in stuck]
                if gone:
                    for one in ready:
                        await self._gone(connection, stream, one)
                elif ready:
                    stuck |= await self._post_part(connection, stream, ready)

    async def _post_part(
        self, connection: Any, stream: UsageStream, entries: list[Entry]
    ) -> set[int]:
        """Post entries in one SQL transaction if possible; the shards that got stuck."""
        try:
            posted = await usage_posting.post(connection, entries, _today())
        except REFUSALS:
            return await self._one_by_one(connection, stream, entries)
        await self._done(stream, entries, posted)
        return set()

    async def _one_by_one(
        self, connection: Any, stream: UsageStream, entries: list[Entry]
    ) -> set[int]:
        """Post each entry alone; the shards in which one has to be tried again."""
        stuck: set[int] = set()
        for one in entries:
            if one.shard in stuck:
                continue
            try:
                posted = await usage_posting.post(connection, [one], _today())
            except REFUSALS as error:
                self._counters.refused += 1
                if await stream.deliveries(one) < self._settings.accounting_deliveries:
                    stuck.add(one.shard)
                    stream.read_again(one.shard)
                    continue
                posted = await usage_posting.post(connection, [one], _today(), str(error))
            await self._done(stream, [one], posted)
        return stuck

    async def _gone(self, connection: Any, stream: UsageStream, one: Entry) -> None:
        """An entry pending without its data: posted and trimmed, but for the acknowledgement."""
        posted = Posted()
        if one.id > await usage_records.watermark(connection, one.shard):
            reason = "trimmed away before it was posted"
            posted = await usage_posting.post(connection, [one], _today(), reason)
        await self._done(stream, [one], posted)

    async def _done(self, stream: UsageStream, entries: list[Entry], posted: Posted) -> None:
        counters = self._counters
        counters.batches += 1
        counters.entries += len(entries)
        counters.events += posted.new
        counters.duplicates += posted.duplicates
        counters.lag_ms = max(0, time.time_ns() // 1_000_000 - entries[0].id.ms)
        if posted.quarantined:
            counters.quarantined += posted.quarantined
            self._alarm.raised(counters.quarantined)
        await stream.done(entries)


def _patient(redis: Redis, timeout_seconds: float) -> Redis:
    """A client of the same Redis that waits longer for a reply: reads of streams block."""
    pool = redis.connection_pool
    arguments = {**pool.connection_kwargs, "socket_timeout": timeout_seconds}
    return Redis.from_pool(ConnectionPool(pool.connection_class, **arguments))


def _parts(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries in order, in parts of bounded size."""
    part: list[Entry] = []
    size = 0
    for one in entries:
        part.append(one)
        size += len(one.body or b"")
        if size >= _TRANSACTION_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _today() -> date:
    return datetime.now(UTC).date()
