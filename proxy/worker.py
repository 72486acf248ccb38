"""One worker process: builds the hot path, serves on an inherited socket, stops in order.

Started by the supervisor as `python -m proxy.worker ROW SOCKET_FD METRICS_PATH PARENT_PID`.
SIGTERM drains it; SIGHUP is for the supervisor, which then replaces it.
"""

import asyncio
import ctypes
import gc
import os
import signal
import socket
import sys
from pathlib import Path

import hiredis
import msgspec
import uvloop

from accounting.contract import catalogue
from accounting.contract.identifiers import new_id
from accounting.contract.settings import Settings, load
from proxy import compiled, recalls
from proxy.aiohttp_lane import AiohttpLane
from proxy.cooldown import CooldownRules
from proxy.drain import drain
from proxy.front_door import door
from proxy.journal import Journal, OrphanJournal, find_orphans
from proxy.journal_sync import JournalSync
from proxy.keys import Keys
from proxy.leases import Leases
from proxy.memory import keep_freed_memory
from proxy.metrics import Counters
from proxy.redis_pipe import RedisDown, RedisPipe
from proxy.replay import replay, replay_stray, retire
from proxy.request_ids import RequestIds
from proxy.routing import Routing
from proxy.services import Services
from proxy.settlement import Settlement
from proxy.standing import Standing
from proxy.sweep import look_at_all
from proxy.tail import Tail, is_old, strays
from proxy.upstream import Upstreams

_SWEEP_SECONDS = 0.5
_SET_PARENT_DEATH_SIGNAL = 1  # Linux: a worker drains when its supervisor is gone
_LOOK_SECONDS = 0.02
_UNUSED_SECONDS = 0.1
_SETTLE_WAIT_SECONDS = 10.0
_GC_THRESHOLDS = (50_000, 20, 50)


def journal_folder(settings: Settings) -> Path:
    return Path(settings.data_dir) / "journals"


def say(event: str, **facts: object) -> None:
    """One JSON line on stderr per change of state; never a secret, prompt or answer."""
    line = msgspec.json.encode({"part": "proxy", "pid": os.getpid(), "event": event, **facts})
    sys.stderr.buffer.write(line + b"\n")
    sys.stderr.buffer.flush()


class Worker:
    """Composition root of one worker."""

    def __init__(self, settings: Settings, row: int, metrics_path: Path) -> None:
        self._settings = settings
        self._boot = new_id("boot")
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._kept: dict[str, str] = {}  # journals that could not be replayed, and why
        self._refused: set[str] = set()  # why Redis refuses settles
        self._late = 0  # settles told late, as counted before
        self._journals = journal_folder(settings)
        self._journals.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._counters = Counters(metrics_path, row)
        self._pipe = RedisPipe(
            settings.redis_url.reveal(),
            settings.redis_timeout_seconds,
            settings.redis_pending,
            self._redis_changed,
        )
        self.services = services = self._build()
        self._sync = JournalSync(
            [self._tail.descriptor, services.journal.descriptor],
            settings.journal_sync_seconds,
            self._sync_failed,
            services.journal.keep_progress,
        )
        self._standing = Standing(
            self._pipe, self._boot, services, self._tail, self._gate_moved, self._fenced
        )

    def _build(self) -> Services:
        settings, pipe, now = self._settings, self._pipe, self._loop.time
        journal = Journal(self._journals / f"{self._boot}.journal", settings.journal_slots)
        self._tail = Tail(self._journals / f"{self._boot}.tail")  # second: it is no stray
        keys = Keys(pipe, settings.key_cache_entries, settings.key_cache_seconds, now)
        upstreams = Upstreams(settings, self._distrusted)
        leases = Leases(pipe, self._boot)
        routing = Routing(
            catalogue.load(settings.catalogue, os.environ, settings.sandbox),
            upstreams,
            CooldownRules(
                settings.cooldown_window_seconds,
                settings.cooldown_failures,
                settings.cooldown_rate,
                settings.cooldown_seconds,
                settings.cooldown_limit_seconds,
            ),
            self._target_changed,
        )
        return Services(
            settings=settings,
            loop=self._loop,
            now=now,
            request_ids=RequestIds(),
            keys=keys,
            leases=leases,
            routing=routing,
            upstreams=upstreams,
            journal=journal,
            settlement=Settlement(
                pipe,
                journal,
                self._boot,
                settings.settle_interval_seconds,
                settings.settle_batch,
                self._settle_refused,
                self._tail,
                leases.tell,
            ),
            counters=self._counters,
            aiohttp_lane=AiohttpLane(settings, keys, routing),
        )

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, then drain."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stopping.set)
        await self._pipe.start()
        self._sync.start()
        await self._standing.look()
        services = self.services
        server = await self._loop.create_server(lambda: door(services), sock=listener, backlog=4096)
        self._tasks = [
            self._loop.create_task(self._sweep()),
            self._loop.create_task(self._standing.watch()),
            self._loop.create_task(self._give_back_unused()),
            self._loop.create_task(
                recalls.listen(
                    self._settings.redis_url.reveal(),
                    self._settings.redis_timeout_seconds,
                    services.leases.recalled,
                    self._recalls_heard,
                )
            ),
            self._loop.create_task(self._standing.keep_beating(self._settings.heartbeat_seconds)),
            self._loop.create_task(self._replay_orphans()),
        ]
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._counters.set("tollgate_workers_compiled", int(compiled.is_running()))
        self._counters.set("tollgate_workers_ready", 1)
        await self._stopping.wait()
        await self._stop(listener, server)

    async def _stop(self, listener: socket.socket, server: asyncio.Server) -> None:
        """Accept no more, let answers finish, cut the rest, settle, give back, leave."""
        services = self.services
        services.leases.may_lease_ahead = False
        services.leases.give_back_all()
        self._counters.set("tollgate_workers_ready", 0)
        await drain(services, listener, server)
        services.upstreams.close()
        settled = await self._settled()
        services.leases.release_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        retired = settled and await self._retired()
        await self._pipe.stop()
        self._sync.stop()
        self._tail.close(remove=False)  # should Redis lose its last seconds now
        services.journal.close(remove=retired)

    async def _settled(self) -> bool:
        """False when Redis did not take everything in time: the journal then stays.

        What was cut while it was being admitted is in the journal, too, until it is settled.
        """
        services = self.services
        try:
            async with asyncio.timeout(_SETTLE_WAIT_SECONDS):
                await services.settlement.drained()
                while services.journal.used:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError:
            return False
        return True

    async def _retired(self) -> bool:
        """Forget this boot. False when Redis cannot be told: the journal then stays."""
        try:
            await retire(self._pipe, self._boot)
        except (RedisDown, hiredis.ReplyError):
            return False
        return True

    # While serving

    async def _sweep(self) -> None:
        """Time-outs, idle connections and leases, gauges: about twice a second."""
        services, counters = self.services, self._counters
        while True:
            await look_at_all(services.connections, _SWEEP_SECONDS, self._loop.time)
            services.upstreams.sweep()
            services.leases.release_idle()
            counters.set("tollgate_connections", len(services.connections))
            counters.set("tollgate_exchanges", len(services.exchanges))
            counters.set("tollgate_targets_cooling", services.routing.cooling)
            counters.set("tollgate_settles_unacknowledged", services.settlement.unacknowledged)
            counters.add("tollgate_settles_late", services.settlement.late - self._late)
            self._late = services.settlement.late
            if not services.settlement.unacknowledged:
                self._refused.clear()
            counters.set("tollgate_journal_slots_used", services.journal.used)

    async def _give_back_unused(self) -> None:
        while True:
            await asyncio.sleep(_UNUSED_SECONDS)
            self.services.leases.release_unused()

    def _recalls_heard(self, heard: bool) -> None:
        """Without recalls nothing may be leased ahead."""
        leases = self.services.leases
        leases.may_lease_ahead = heard and not self.services.draining
        if not heard:
            leases.give_back_all()

    def _gate_moved(self, is_open: bool) -> None:
        self._counters.set("tollgate_gate_open", int(is_open))
        say("gate open" if is_open else "gate closed")

    def _fenced(self) -> None:
        """This boot was taken to be lost: make room for one that may lease."""
        say("boot retired by others", boot=self._boot)
        self._stopping.set()

    def _sync_failed(self, why: str) -> None:
        """Called from the thread that syncs."""
        self._loop.call_soon_threadsafe(self._say_unsynced, why)

    def _say_unsynced(self, why: str) -> None:
        self._counters.add("tollgate_journal_sync_failures")
        say("journal not on disk", why=why)

    async def _replay_orphans(self) -> None:
        """Settle what dead workers left; look again now and then."""
        while True:
            for journal in find_orphans(self._journals):
                await self._replay(journal)
            await self._replay_strays()
            if self._pipe.up:
                self._standing.orphans_settled = True
            await asyncio.sleep(self._settings.heartbeat_seconds)

    async def _replay_strays(self) -> None:
        for path in strays(self._journals):
            try:
                await replay_stray(path, self._pipe)
                if is_old(path):
                    path.unlink()
            except (RedisDown, hiredis.ReplyError, FileNotFoundError):
                continue  # there is a next time, or another worker was faster

    async def _replay(self, journal: OrphanJournal) -> None:
        done = False
        try:
            count = await replay(journal, self._pipe, self.services.journal.era)
            self._counters.add("tollgate_replayed_settles", count)
            say("journal replayed", boot=journal.boot, settles=count)
            done = True
        except (RedisDown, hiredis.ReplyError, msgspec.DecodeError) as error:
            self._say_kept(journal.boot, str(error) or "Redis is down")
        finally:
            journal.close(remove=done)

    def _say_kept(self, boot: str, why: str) -> None:
        """Once per journal and reason, however often it is looked at."""
        if self._kept.get(boot) != why:
            self._kept[boot] = why
            say("journal kept", boot=boot, why=why)

    def _redis_changed(self, up: bool) -> None:
        if up:
            self._standing.connected()
        self._counters.set("tollgate_redis_up", int(up))
        say("redis up" if up else "redis down")

    def _settle_refused(self, why: str) -> None:
        self._counters.add("tollgate_settle_refusals")
        if why not in self._refused:
            self._refused.add(why)
            say("settle refused", why=why)

    def _distrusted(self, provider: str, why: str, trusted_before: bool) -> None:
        self._counters.add("tollgate_upstream_tls_failures")
        if trusted_before:
            say("provider not trusted", provider=provider, why=why)

    def _target_changed(self, target: str, seconds: float) -> None:
        if seconds:
            self._counters.add("tollgate_cooldowns")
            say("target passed over", target=target, seconds=seconds)
        else:
            say("target serves again", target=target)


async def _main(row: int, listener: socket.socket, metrics_path: Path) -> None:
    await Worker(load(), row, metrics_path).run(listener)


def main(arguments: list[str]) -> int:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    keep_freed_memory()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    row, descriptor, metrics_path = int(arguments[0]), int(arguments[1]), Path(arguments[2])
    supervisor = arguments[3:]  # one that was started before an upgrade does not say its own
    if supervisor and os.getppid() != int(supervisor[0]):  # gone already: no signal will come
        say("worker ended", why="its supervisor is gone")
        return 1
    listener = socket.socket(fileno=descriptor)
    try:
        uvloop.run(_main(row, listener, metrics_path))
    except (OSError, TimeoutError, catalogue.CatalogueError) as error:
        say("worker failed", why=str(error) or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
