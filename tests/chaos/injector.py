"""Carries out the faults of a schedule on a site, and takes the time until all is well again.

Owns kills, pauses and robberies, and the probing afterwards. A forgetful fault, one that makes
Redis lose what it had acknowledged, strikes while nothing else is wrong: that is what is
promised; all others may overlap.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import httptools
import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting.contract import keyspace
from tests.chaos.faults import FORGETFUL, Fault
from tests.chaos.load import PATH, Exchange, Noted
from tests.chaos.people import People
from tests.chaos.site import LOOK_SECONDS, Site
from tests.chaos.wire import ask, request
from tests.waiting import eventually

RECOVERY_SECONDS = 45.0
PROBE_SECONDS = 2.0
LONGEST_PAUSE, LONGEST_OUTAGE = 3.0, 4.0
AWAY_SECONDS = 7.0  # longer than accounting waits for a silent worker, see `site`
LOST_SECONDS = 1.0  # what Redis may lose of its file


class Injector:
    """See the module. `recoveries`: seconds by kind, until served and until posted."""

    def __init__(self, site: Site, people: People, noted: Noted) -> None:
        self.struck: Counter[str] = Counter()
        self.recoveries: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.story: list[str] = []
        self._site = site
        self._people = people
        self._noted = noted
        self._began = time.monotonic()
        self._sizes: list[tuple[float, int]] = []  # of Redis's file, when
        self.lost_bytes = 0  # of that file
        self._under_way: set[asyncio.Task[None]] = set()
        self._redis_lock, self._postgres_lock = asyncio.Lock(), asyncio.Lock()
        self._deeds: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "worker killed": self._kill_worker,
            "supervisor killed": self._kill_supervisor,
            "accounting killed": self._kill_accounting,
            "admin API killed": self._kill_admin,
            "Redis killed": self._kill_redis,
            "Redis rolled back": self._roll_redis_back,
            "Redis emptied": self._empty_redis,
            "Redis flushed": self._flush_redis,
            "Postgres killed": self._kill_postgres,
            "Postgres stopped at once": self._stop_postgres_at_once,
            "Postgres away": self._postgres_away,
            "Postgres connections used up": self._use_up_connections,
            "worker paused": self._pause_worker,
            "worker away": self._worker_away,
            "supervisor paused": self._pause_supervisor,
            "accounting paused": self._pause_accounting,
            "admin API paused": self._pause_admin,
            "Redis paused": self._pause_redis,
            "Postgres paused": self._pause_postgres,
            "proxy rolled": self._roll_proxy,
            "everything killed": self._kill_everything,
            "power lost": self._lose_power,
        }

    async def run(self, schedule: Iterator[Fault], stopping: asyncio.Event) -> None:
        """One fault after the other until stopped; all have healed when it ends."""
        watching = asyncio.create_task(self._watch_redis_file())
        try:
            for fault in schedule:
                if fault.alone:
                    await self._all_healed()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), fault.gap)
                if stopping.is_set():
                    break
                task = asyncio.create_task(self._strike(fault))
                self._under_way.add(task)
                if fault.alone:
                    await self._all_healed()
            await self._all_healed()
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _all_healed(self) -> None:
        under_way, self._under_way = self._under_way, set()
        if under_way:
            await asyncio.gather(*under_way)

    async def _strike(self, fault: Fault) -> None:
        self.struck[fault.kind] += 1
        at = f"{time.monotonic() - self._began:.2f} s: {fault.kind}"
        self.story.append(f"{at} (size {fault.size:.2f}, which {fault.which:.2f})")
        epoch = await self._epoch() if fault.kind in FORGETFUL else ""
        try:
            await self._deeds[fault.kind](fault)
        except psutil.NoSuchProcess:  # another fault was faster
            self.story.append(f"{at}: nobody there")
        healed = time.monotonic()
        if fault.kind in FORGETFUL:  # a worker may not have noticed yet, and admit on a lease
            await self._until(lambda: self._is_filled_anew(epoch), fault)
        served = await self._until(self._is_served, fault)
        posted = await self._until(self._is_posted, fault)
        self.recoveries[fault.kind].append((served - healed, posted - healed))
        self.story.append(f"{at}: served {served - healed:.2f} s, posted {posted - healed:.2f} s")

    async def _until(self, condition: Callable[[], Any], fault: Fault) -> float:
        try:
            await eventually(condition, RECOVERY_SECONDS)
        except AssertionError:
            text = f"no recovery within {RECOVERY_SECONDS:.0f} s of {fault}"
            self._noted.wrong.append(text)
            raise
        return time.monotonic()

    # Is all well again?

    async def _epoch(self) -> str:
        async with Redis.from_url(self._site.redis_url) as redis:
            found: Any = await redis.get(keyspace.EPOCH)
            return found.decode() if found else ""

    async def _is_filled_anew(self, before: str) -> bool:
        try:
            return await self._epoch() not in ("", before)
        except (OSError, RedisError):
            return False

    async def _is_served(self) -> bool:
        """Every worker admits, and a request is answered."""
        return bool(await self._site.is_ready()) and bool(await self._probe())

    async def _probe(self) -> str:
        """The id of a request that was served; empty if it was not."""
        person = self._people.named("rich")
        content = [{"role": "user", "content": "probe"}]
        body = {"model": "sandbox", "max_tokens": 5, "messages": content}
        exchange = Exchange(person, False, time.monotonic())
        try:
            answer = await ask(
                self._site.port, request("POST", PATH, person.secret, body), PROBE_SECONDS
            )
        except (OSError, httptools.HttpParserError):
            return ""
        self._noted.add(exchange, answer)
        return answer.request_id if answer.status == 200 else ""

    async def _is_posted(self) -> bool:
        """A request of now is in the ledger."""
        request_id = await self._probe()
        if not request_id:
            return False
        deadline = time.monotonic() + PROBE_SECONDS
        while time.monotonic() < deadline:
            if await self._is_recorded(request_id):
                return True
            await asyncio.sleep(LOOK_SECONDS)
        return False

    async def _is_recorded(self, request_id: str) -> bool:
        try:
            connection = await asyncpg.connect(self._site.database_url, timeout=PROBE_SECONDS)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        try:
            sql = "select exists (select from usage_records where request_id = $1)"
            return bool(await connection.fetchval(sql, request_id, timeout=PROBE_SECONDS))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        finally:
            connection.terminate()

    # The proxy

    def _worker(self, fault: Fault) -> psutil.Process:
        return chosen(self._site.workers(), fault)

    async def _kill_worker(self, fault: Fault) -> None:
        self._worker(fault).kill()

    async def _kill_supervisor(self, fault: Fault) -> None:
        self._site.part("proxy").kill()

    async def _roll_proxy(self, fault: Fault) -> None:
        self._site.part("proxy").send_signal(signal.SIGHUP)

    async def _pause_worker(self, fault: Fault) -> None:
        await pause([self._worker(fault)], fault.size * LONGEST_PAUSE)

    async def _worker_away(self, fault: Fault) -> None:
        """For longer than anybody waits for it."""
        await pause([self._worker(fault)], AWAY_SECONDS)

    async def _pause_supervisor(self, fault: Fault) -> None:
        await pause([self._site.part("proxy")], fault.size * LONGEST_PAUSE)

    # Accounting and the admin API

    def _accounting(self, fault: Fault) -> psutil.Process:
        return self._site.part("accounting-1" if fault.which < 0.5 else "accounting-2")

    async def _kill_accounting(self, fault: Fault) -> None:
        self._accounting(fault).kill()

    async def _pause_accounting(self, fault: Fault) -> None:
        await pause([self._accounting(fault)], fault.size * LONGEST_PAUSE)

    async def _kill_admin(self, fault: Fault) -> None:
        self._site.part("admin_api").kill()

    async def _pause_admin(self, fault: Fault) -> None:
        await pause([self._site.part("admin_api")], fault.size * LONGEST_PAUSE)

    # Redis

    async def _watch_redis_file(self) -> None:
        """How long it was, lately."""
        while True:
            now = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                self._sizes.append((now, self._redis_file.stat().st_size))
            self._sizes = [one for one in self._sizes if one[0] > now - 2 * LOST_SECONDS]
            await asyncio.sleep(0.02)

    @property
    def _redis_file(self) -> Path:
        return self._site.data_dir / "redis" / "appendonly.aof"

    async def _end_redis(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._site.redis.pid, signal.SIGKILL)
        await self._site.in_thread(lambda: self._site.redis.child.stop(1.0))

    async def _kill_redis(self, fault: Fault) -> None:
        async with self._redis_lock:
            await self._end_redis()
            await self._site.start_redis()

    async def _roll_redis_back(self, fault: Fault) -> None:
        lost_after = time.monotonic() - fault.size * LOST_SECONDS
        async with self._redis_lock:
            await self._end_redis()
            self._cut_redis_file(lost_after)
            await self._site.start_redis()

    def _cut_redis_file(self, lost_after: float) -> None:
        """To what was in it then: between two writes or in the middle of one."""
        size = self._redis_file.stat().st_size
        sizes, self._sizes = self._sizes, []  # the file is another one from now on
        kept = max((then for at, then in sizes if at <= lost_after), default=None)
        if kept is None:
            kept = sizes[0][1] if sizes else size
        self.lost_bytes += size - kept
        os.truncate(self._redis_file, kept)

    async def _empty_redis(self, fault: Fault) -> None:
        async with self._redis_lock:
            await self._end_redis()
            self._redis_file.unlink()
            self._sizes = []
            await self._site.start_redis()

    async def _flush_redis(self, fault: Fault) -> None:
        async with Redis.from_url(self._site.redis_url) as redis:
            await redis.flushall()

    async def _pause_redis(self, fault: Fault) -> None:
        await pause([psutil.Process(self._site.redis.pid)], fault.size * LONGEST_PAUSE)

    # Postgres

    async def _end_postgres(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._site.postgres.pid, number)
        await self._site.in_thread(lambda: self._site.postgres.child.stop(20.0))

    async def _kill_postgres(self, fault: Fault) -> None:
        async with self._postgres_lock:
            await self._end_postgres(signal.SIGKILL)
            await self._site.start_postgres()

    async def _stop_postgres_at_once(self, fault: Fault) -> None:
        """Its "immediate shutdown": without a checkpoint."""
        async with self._postgres_lock:
            await self._end_postgres(signal.SIGQUIT)
            await self._site.start_postgres()

    async def _postgres_away(self, fault: Fault) -> None:
        async with self._postgres_lock:
            await self._end_postgres(signal.SIGINT)
            await asyncio.sleep(fault.size * LONGEST_OUTAGE)
            await self._site.start_postgres()

    async def _use_up_connections(self, fault: Fault) -> None:
        """All of them, those of the product included."""
        taken: list[Any] = []
        deadline = time.monotonic() + fault.size * LONGEST_PAUSE
        try:
            while time.monotonic() < deadline:
                try:
                    taken.append(await asyncpg.connect(self._site.database_url, timeout=1.0))
                    if len(taken) == 1:
                        await taken[0].execute(
                            "select pg_terminate_backend(pid) from pg_stat_activity"
                            " where pid <> pg_backend_pid() and backend_type = 'client backend'"
                        )
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await asyncio.sleep(LOOK_SECONDS)
        finally:
            for one in taken:
                one.terminate()

    async def _pause_postgres(self, fault: Fault) -> None:
        await pause(self._site.postgres_processes(), fault.size * LONGEST_PAUSE)

    # All of it

    async def _kill_everything(self, fault: Fault) -> None:
        async with self._redis_lock, self._postgres_lock:
            await self._everything_ends()
            await self._everything_starts()

    async def _lose_power(self, fault: Fault) -> None:
        """And Redis its last moments; the disk has the rest."""
        lost_after = time.monotonic() - fault.size * LOST_SECONDS
        async with self._redis_lock, self._postgres_lock:
            await self._everything_ends()
            self._cut_redis_file(lost_after)
            await self._everything_starts()

    async def _everything_ends(self) -> None:
        self._site.held.update(("proxy", "accounting-1", "accounting-2", "admin_api"))
        for one in [*self._site.processes(), *self._site.postgres_processes()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        await self._end_redis()
        await self._end_postgres(signal.SIGKILL)

    async def _everything_starts(self) -> None:
        await self._site.start_redis()
        await self._site.start_postgres()
        self._site.held.clear()


def chosen(found: Sequence[psutil.Process], fault: Fault) -> psutil.Process:
    """One of several. Raises psutil.NoSuchProcess if there is none."""
    if not found:
        raise psutil.NoSuchProcess(0)
    return found[int(fault.which * len(found))]


async def pause(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Stop them, and let them go on after so long."""
    try:
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        await asyncio.sleep(max(0.1, seconds))
    finally:
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()
