"""Audits from time to time while accounting runs: drift becomes a metric and a log line.

The first audit of a process is over all there is, and one a day; the others look at what was
posted since the last clean one.

One process of all audits at a time, by an advisory lock. What is checked is `audit.py`'s part.
"""

import asyncio
import logging
import time
from typing import Any

from msgspec import Struct
from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting import audit
from accounting.audit_ledger import Finding
from accounting.reckoning import RestlessError
from accounting.stores import OUTAGES

_FULL_SECONDS = 86_400.0
_FOR_EVER_SECONDS = 86_400.0
_LOCK = 0x70_6C_67_06
_log = logging.getLogger("tollgate.accounting")


class Audits(Struct):
    """What the last audit of this process found; none yet: `finished_at` is 0."""

    findings: list[Finding] = []
    finished_at: float = 0.0  # seconds since the epoch
    took_seconds: float = 0.0

    @property
    def drifted(self) -> dict[str, str]:
        """What was first of each invariant that did not hold, by its name."""
        return {one.name: one.first or "" for one in self.findings if one.drifted}


class Auditor:
    """Audits every so often until its task is cancelled."""

    def __init__(
        self, pool: Any, redis: Redis, every_seconds: float, longest_exchange_seconds: float
    ) -> None:
        """`every_seconds` 0: never."""
        self._pool, self._redis = pool, redis
        self._every_seconds = every_seconds
        self._longest_seconds = longest_exchange_seconds
        self._full_at = 0.0
        self.audits = Audits()

    def __repr__(self) -> str:
        return f"<Auditor every {self._every_seconds:g} s, drifted {sorted(self.audits.drifted)}>"

    async def run(self) -> None:
        """Raises what is neither an outage nor a system too busy to be read."""
        while True:
            await asyncio.sleep(self._every_seconds or _FOR_EVER_SECONDS)
            if not self._every_seconds:
                continue
            try:
                await self.audit()
            except (*OUTAGES, RedisError, RestlessError) as error:
                _log.warning("the audit was broken off: %s", type(error).__name__)

    async def audit(self) -> bool:
        """Audit now, unless another process does; whether it was done here."""
        async with self._pool.acquire() as connection:
            if not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):
                return False
            try:
                begun = time.monotonic()
                full = begun >= self._full_at
                findings = await audit.audit(
                    self._pool, self._redis, self._longest_seconds, recent=not full
                )
                if full:
                    self._full_at = begun + _FULL_SECONDS
                self._note(findings, time.monotonic() - begun)
            finally:
                await connection.execute("select pg_advisory_unlock($1)", _LOCK)
        return True

    def _note(self, findings: list[Finding], took_seconds: float) -> None:
        """Keep what was found, and say what has changed since the last time."""
        before = self.audits.drifted
        self.audits.findings = findings
        self.audits.finished_at = time.time()
        self.audits.took_seconds = took_seconds
        now = self.audits.drifted
        for name in sorted(now.keys() - before.keys()):
            _log.error("the audit found drift: %s: %s", name, now[name])
        for name in sorted(before.keys() - now.keys()):
            _log.info("the audit finds no drift any more: %s", name)
