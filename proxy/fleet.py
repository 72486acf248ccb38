"""The worker processes of this host: started, told to end, and ended for certain.

Owns the set of those that live and the rows of the shared metrics file: each process counts
in a row of its own, and the next one there goes on where it stopped, so no figure is lost or
counted twice. Which worker follows which is `seat`'s.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable
from pathlib import Path

from accounting.contract.settings import Settings
from proxy import compiled
from proxy.metrics import HostMetrics
from proxy.worker import say

_KILL_AFTER_SECONDS = 20.0  # beyond the drain: partings, settles and leases given back
_LOOK_SECONDS = 0.02


class StartError(Exception):
    """The proxy cannot start; the text is one line for stderr."""


class WorkerProcess:
    """One worker. `ended` is its exit code, once it has one."""

    def __init__(
        self, process: asyncio.subprocess.Process, row: int, ended: "asyncio.Task[int]"
    ) -> None:
        self._process = process
        self.row = row
        self.ended = ended
        self.pid = process.pid
        self.started_at = asyncio.get_running_loop().time()

    def __repr__(self) -> str:
        return f"WorkerProcess(pid={self.pid}, row={self.row})"

    def tell(self, number: int) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return


class Fleet:
    """`catalogue`: the path that new workers read, or nothing for the starter catalogue."""

    def __init__(self, settings: Settings, metrics_path: Path, rows: int) -> None:
        self._metrics_path = metrics_path
        self._metrics = HostMetrics(metrics_path, rows)
        self._rows = list(range(rows - 1, -1, -1))
        self._end_seconds = settings.drain_timeout_seconds + _KILL_AFTER_SECONDS
        self._start_seconds = settings.start_timeout_seconds
        self._run_compiled = settings.compiled
        self._living: set[WorkerProcess] = set()
        self.stopping = asyncio.Event()
        self.catalogue = ""

    def __repr__(self) -> str:
        return f"Fleet({sorted(one.pid for one in self._living)})"

    async def start(self, listener: socket.socket, catalogue: str) -> WorkerProcess:
        """A new worker on a listening socket; it may end at once. Raises OSError."""
        row = self._rows.pop()
        self._metrics.clear_gauges(row)
        descriptor = listener.fileno()
        more = {**compiled.environment(self._run_compiled), "TOLLGATE_CATALOGUE": catalogue}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "proxy.worker", str(row), str(descriptor), str(self._metrics_path)),
                str(os.getpid()),
                pass_fds=[descriptor],
                env={**os.environ, **more},
            )
        except OSError:
            self._rows.append(row)
            raise
        worker = WorkerProcess(process, row, asyncio.create_task(process.wait()))
        worker.ended.add_done_callback(lambda _: self._left(worker))
        self._living.add(worker)
        if self.stopping.is_set():  # it came too late to be told with the others
            worker.tell(signal.SIGTERM)
        return worker

    def _left(self, worker: WorkerProcess) -> None:
        self._living.discard(worker)
        self._metrics.clear_gauges(worker.row)
        self._rows.append(worker.row)

    async def is_ready(self, worker: WorkerProcess) -> bool:
        """Wait until it serves and may admit. False when it ends, or takes too long."""
        deadline = worker.started_at + self._start_seconds
        while asyncio.get_running_loop().time() < deadline:
            if worker.ended.done() or self.stopping.is_set():
                return False
            if self._metrics.serves(worker.row):
                return True
            await asyncio.sleep(_LOOK_SECONDS)
        return False

    async def end(self, worker: WorkerProcess) -> None:
        """Tell it to stop, and wait until it has; one that drains too long is killed."""
        worker.tell(signal.SIGTERM)
        if not await happens(asyncio.shield(worker.ended), self._end_seconds):
            say("worker killed", worker=worker.pid)
            worker.tell(signal.SIGKILL)
            await worker.ended

    async def stop(self) -> None:
        """End all, at the same time."""
        self.stopping.set()
        while self._living:
            await asyncio.gather(*[self.end(worker) for worker in list(self._living)])


async def happens(what: Awaitable[object], seconds: float) -> bool:
    """Wait for something, at most so long."""
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        return False
    return True
