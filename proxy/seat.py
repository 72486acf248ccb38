"""One seat per core: a listening socket, the worker that serves on it, and its successor.

Theory of operation: a worker that dies is replaced; connections made meanwhile wait in the
socket. A worker that is to be rolled stays until another one serves on the same socket: only
then is it told to drain, so at every moment somebody accepts. If the successor does not get
ready the worker stays, and has noticed nothing. One that drains is no longer the seat's
worker: what becomes of it is told to who asked for the roll.
"""

import asyncio
import socket

from proxy.fleet import Fleet, StartError, WorkerProcess, happens
from proxy.worker import say

_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 5.0
_STEADY_SECONDS = 10.0


class Seat:
    """See the module. `number` is for the log alone."""

    def __init__(self, fleet: Fleet, number: int, listener: socket.socket) -> None:
        self._fleet = fleet
        self._number = number
        self._listener = listener
        self._asked = asyncio.Event()
        self._candidate = ""
        self._outcome: asyncio.Future[bool] | None = None
        self._endings: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"Seat({self._number}, asked={self._asked.is_set()})"

    def close(self) -> None:
        """Let go of the socket: it closes when its last worker has accepted what waits."""
        self._listener.close()

    async def keep(self) -> None:
        """Keep a worker running: a dead one is replaced, soon at first, then less soon."""
        pause = _FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        first = True
        while not self._fleet.stopping.is_set():
            worker = begun = await self._fleet.start(self._listener, self._fleet.catalogue)
            while not worker.ended.done():
                worker = await self._watch(worker)
            if self._fleet.stopping.is_set():
                break
            code, lived = worker.ended.result(), loop.time() - worker.started_at
            if first and worker is begun and lived < _STEADY_SECONDS and code == 1:
                raise StartError("a worker could not start (see above)")
            first = False
            say("worker died", row=self._number, code=code)
            pause = _FIRST_PAUSE_SECONDS if lived > _STEADY_SECONDS else pause
            await happens(self._fleet.stopping.wait(), pause)
            pause = min(pause * 2, _LAST_PAUSE_SECONDS)
        if self._endings:
            await asyncio.wait(self._endings)

    async def roll(self, catalogue: str) -> bool:
        """Give the worker a successor, which reads `catalogue`; at most one call at a time.

        True once the predecessor has ended. False when it stays, since the successor did not
        get ready; the successor has ended then.
        """
        self._outcome = asyncio.get_running_loop().create_future()
        self._candidate = catalogue
        self._asked.set()
        return await self._outcome

    async def _watch(self, worker: WorkerProcess) -> WorkerProcess:
        """Until the worker ends, or is asked for a successor; then whoever serves now."""
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait([worker.ended, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self._fleet.stopping.is_set():
            self._asked.clear()
        if worker.ended.done() or not self._asked.is_set():
            return worker
        self._asked.clear()
        try:
            successor = await self._fleet.start(self._listener, self._candidate)
        except OSError as error:
            say("worker not started", row=self._number, why=str(error))
            self._tell(False)
            return worker
        ready = await self._fleet.is_ready(successor)
        leaving, staying = (worker, successor) if ready else (successor, worker)
        ending = asyncio.create_task(self._end(leaving, ready))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return staying

    async def _end(self, leaving: WorkerProcess, rolled: bool) -> None:
        await self._fleet.end(leaving)
        self._tell(rolled)

    def _tell(self, rolled: bool) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(rolled)
