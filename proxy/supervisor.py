"""One worker process per core: start, watch, restart, drain; probes on the private port.

Owns the listening sockets, one per worker (SO_REUSEPORT), and keeps them open across a
worker's death, so a connection made meanwhile waits for the replacement.
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from accounting.contract import catalogue
from accounting.contract.settings import Address, Settings
from proxy import metrics
from proxy.probes import Probes
from proxy.redis_pipe import RedisPipe
from proxy.worker import say

_BACKLOG = 4096
_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 5.0
_STEADY_SECONDS = 10.0
_KILL_AFTER_SECONDS = 15.0


class StartError(Exception):
    """The proxy cannot start; the text is one line for stderr."""


class Supervisor:
    """Runs the workers of one host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._count = settings.workers or len(os.sched_getaffinity(0))
        self._stopping = asyncio.Event()
        self._processes: dict[int, asyncio.subprocess.Process] = {}
        self._sockets: list[socket.socket] = []
        self._metrics_path = Path(settings.data_dir) / "run" / f"proxy-{os.getpid()}.metrics"

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError."""
        try:
            catalogue.load(self._settings.catalogue, os.environ, self._settings.sandbox)
        except catalogue.CatalogueError as error:
            raise StartError(str(error)) from None
        await _reach_redis(self._settings)
        self._sockets = listen(self._settings.listen, self._count)
        self._metrics_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        metrics.create(self._metrics_path, self._count)
        probes = Probes(metrics.HostMetrics(self._metrics_path, self._count), self._count)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        try:
            await probes.start(self._settings.private_listen)
            await self._serve()
        finally:
            await probes.stop()
            for one in self._sockets:
                one.close()
            self._metrics_path.unlink(missing_ok=True)

    async def _serve(self) -> None:
        keepers = [asyncio.create_task(self._keep(row)) for row in range(self._count)]
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
        failed = [one for one in keepers if one.done() and one.exception() is not None]
        stop.cancel()
        self._stopping.set()
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
        _, late = await asyncio.wait(
            keepers, timeout=self._settings.drain_timeout_seconds + _KILL_AFTER_SECONDS
        )
        for process in self._processes.values():
            _signal(process, signal.SIGKILL)
        if late:
            await asyncio.wait(late)
        if failed:
            raise StartError(str(failed[0].exception()))

    async def _keep(self, row: int) -> None:
        """Keep one worker running: a dead one is replaced, soon at first, then less soon."""
        pause = _FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        first = True
        while not self._stopping.is_set():
            started = loop.time()
            process = self._processes[row] = await self._spawn(row)
            if self._stopping.is_set():  # it came too late to be told with the others
                _signal(process, signal.SIGTERM)
            code = await process.wait()
            del self._processes[row]
            if self._stopping.is_set():
                return
            lived = loop.time() - started
            if first and lived < _STEADY_SECONDS and code == 1:
                raise StartError("a worker could not start (see above)")
            first = False
            say("worker died", row=row, code=code)
            pause = _FIRST_PAUSE_SECONDS if lived > _STEADY_SECONDS else pause
            await _wait(self._stopping, pause)
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)

    async def _spawn(self, row: int) -> asyncio.subprocess.Process:
        descriptor = self._sockets[row].fileno()
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "proxy.worker",
            str(row),
            str(descriptor),
            str(self._metrics_path),
            pass_fds=[descriptor],
        )

    def _reload(self) -> None:
        for process in self._processes.values():
            _signal(process, signal.SIGHUP)


async def _reach_redis(settings: Settings) -> None:
    """Say it once, before each worker does. Raises StartError."""
    url = settings.redis_url.reveal()
    pipe = RedisPipe(url, settings.redis_timeout_seconds, settings.redis_pending, lambda up: None)
    try:
        await pipe.start()
    except (OSError, TimeoutError) as error:
        where = urlsplit(url)
        address = f"{where.hostname}:{where.port or 6379}" if where.hostname else where.path
        why = str(error) or "no answer in time"
        raise StartError(f"cannot reach Redis at {address}: {why}") from None
    await pipe.stop()


def listen(address: Address, count: int) -> list[socket.socket]:
    """`count` sockets on one address. Raises StartError when it cannot be had.

    The first is bound without SO_REUSEPORT for a moment, so that another server on the same
    port is noticed instead of shared with.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            where = (where[0], probe.getsockname()[1], *where[2:])
        return [_listener(family, kind, where) for _ in range(count)]
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror or error}") from None


def _listener(family: int, kind: int, where: object) -> socket.socket:
    one = socket.socket(family, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(where)  # type: ignore[arg-type]
    one.listen(_BACKLOG)
    one.setblocking(False)
    return one


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
