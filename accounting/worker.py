"""`python -m accounting run`: the consumers that post usage, and the chores beside them.

The composition root: what there is, how it starts and, as readably, how it stops. Several of
these processes may run at once; they share the shards, and every chore may be done by any of
them, or by two at the same time.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting import deltas, expiry, partitions, reaper, rebuild, withdrawals
from accounting.auditor import Auditor
from accounting.consumer import Consumer
from accounting.contract.settings import Settings
from accounting.counters import Counters
from accounting.metrics import MetricsServer
from accounting.reckoning import RestlessError
from accounting.store_states import POSTGRES, REDIS, StoreStates, store_of
from accounting.stores import OUTAGES, open_postgres, open_redis

_CONSUMERS = 2  # one decodes while Postgres works for the other
_CHORE_CONNECTIONS = 4  # a rebuild needs that many at once
_CHORES_SECONDS = 0.5
_PARTITIONS_SECONDS = 3600.0
_FENCES_SECONDS = 60.0
_BEATS_MISSED = 10  # at least, before a worker is given up
_log = logging.getLogger("tollgate.accounting")


class Worker:
    """One accounting process. `counters` may be read at any time."""

    def __init__(self, settings: Settings) -> None:
        connections = max(_CHORE_CONNECTIONS + _CONSUMERS, settings.database_connections)
        self._settings = msgspec.structs.replace(settings, database_connections=connections)
        self._states = StoreStates()
        self.counters = Counters()

    def __repr__(self) -> str:
        return f"<Worker {self._states!r} {self.counters!r}>"

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until `stopping` is set. Raises StoreError when a store is not there at first."""
        pool = await open_postgres(self._settings)
        try:
            redis = await open_redis(self._settings)
            try:
                await self._work(pool, redis, stopping)
            finally:
                await redis.aclose()
        finally:
            pool.terminate()

    async def _work(self, pool: asyncpg.Pool, redis: Redis, stopping: asyncio.Event) -> None:
        consumers = [
            Consumer(self._settings, pool, redis, self.counters, self._states)
            for _ in range(_CONSUMERS)
        ]
        chores = Chores(self._settings, pool, redis, self.counters, self._states)
        auditor = Auditor(
            pool, redis, self._settings.audit_seconds, self._settings.total_timeout_seconds
        )
        metrics = MetricsServer(self.counters, auditor.audits, self._settings.accounting_listen)
        beside = [asyncio.create_task(one.run()) for one in (auditor, metrics)]
        tasks = [asyncio.create_task(chores.run())]
        tasks += [asyncio.create_task(consumer.run()) for consumer in consumers]
        stop = asyncio.create_task(stopping.wait())
        _log.info("accounting runs")
        try:
            running = {stop, *tasks, *beside}
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            chores.stop()  # nothing new is begun beside the stream
            for consumer in consumers:
                consumer.stop()  # the batch in hand is committed and acknowledged
            stop.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for task in beside:
                task.cancel()
            results += await asyncio.gather(*beside, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        _log.info("accounting has stopped")


class Chores:
    """What has to be done from time to time. Each may fail without hindering the others."""

    def __init__(
        self,
        settings: Settings,
        pool: asyncpg.Pool,
        redis: Redis,
        counters: Counters,
        states: StoreStates,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._redis = redis
        self._counters = counters
        self._states = states
        self._stopping = asyncio.Event()
        self._partitions_at = 0.0
        self._fences_at = 0.0
        self._trouble: set[str] = set()

    def __repr__(self) -> str:
        return f"<Chores trouble={sorted(self._trouble)}>"

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        """Go round until stopped. Raises what is neither an outage nor a known trouble."""
        while not self._stopping.is_set():
            silent = set()
            for chore in (
                self._partitions,
                self._rebuild,
                self._deltas,
                self._expiry,
                self._withdrawals,
                self._reap,
            ):
                silent.add(await self._do(chore))
            self._states.answered({POSTGRES, REDIS} - silent, self)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _CHORES_SECONDS)

    async def _do(self, chore: Callable[[], Awaitable[Any]]) -> str:
        """The store that did not answer, if any."""
        name = chore.__name__.strip("_")
        try:
            await chore()
        except (deltas.WalletLostError, RestlessError, rebuild.RebuildError) as error:
            if name not in self._trouble:
                _log.error("%s: %s", name, error)
            self._trouble.add(name)
        except (*OUTAGES, RedisError) as error:
            self._counters.outages += self._states.lost(error, self)
            return store_of(error)
        else:
            self._trouble.discard(name)
        return ""

    async def _partitions(self) -> None:
        """Those of the coming days."""
        if time.monotonic() >= self._partitions_at:
            async with self._pool.acquire() as connection:
                await partitions.ensure(connection, partitions.due(datetime.now(UTC)))
            self._partitions_at = time.monotonic() + _PARTITIONS_SECONDS

    async def _rebuild(self) -> None:
        """If Redis has lost its data."""
        if await rebuild.needed(self._redis):
            self._counters.rebuilds += bool(await rebuild.rebuild(self._pool, self._redis))

    async def _deltas(self) -> None:
        """Those that did not reach Redis at once."""
        self._counters.deltas += await deltas.apply_pending(self._pool, self._redis)

    async def _expiry(self) -> None:
        """What is left of grants past their time."""
        longest = self._settings.total_timeout_seconds
        self._counters.expired_ucr += await expiry.sweep(self._pool, self._redis, longest)

    async def _withdrawals(self) -> None:
        """Those that were asked for and broken off."""
        await withdrawals.finish_abandoned(self._pool, self._redis)

    async def _reap(self) -> None:
        """What workers of lost hosts still lease."""
        settings = self._settings
        silence = max(settings.reap_seconds, _BEATS_MISSED * settings.heartbeat_seconds)
        for boot in await reaper.reap(self._redis, silence):
            self._counters.reaped += 1
            _log.error("%s was silent for %g s: what it leased is given back", boot, silence)
        if time.monotonic() >= self._fences_at:
            await reaper.forget_fences(self._redis)
            self._fences_at = time.monotonic() + _FENCES_SECONDS
