"""The load client: many keep-alive connections asking one server, plain or streamed.

Owns the connections, the arrival of requests (closed loop, or an open loop in which a
stall is counted because latency runs from the scheduled moment) and the sums. Leaves
reading answers to `load_connection` and CPU to `processes`. Run it on uvloop. It spends
14 µs per plain request and 5 (zero delay) to 7 µs (500 × 20 ms) per chunk, so that it is
not what limits a run.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NamedTuple

import msgspec

from benchmarks.load_connection import ClientConnection, Latencies, percentiles
from benchmarks.load_request import Ask, Target

MAX_BACKLOG = 100_000
OPENING_AT_ONCE = 100
DRAIN_SECONDS = 10.0
REOPEN_SECONDS = 0.05


class LoadResult(msgspec.Struct, frozen=True):
    """What one measured window saw; all that is `…_total` is of the whole run.

    `errors` go on being counted while the last answers end. `left_total` hung up as they
    should, `faults_total` met the stand-in's faults, `missed_total` events never came.
    """

    seconds: float
    requests: int
    chunks: int
    bytes: int
    errors: dict[str, int]
    latency_ms: Latencies | None
    first_chunk_ms: Latencies | None
    chunk_age_ms: Latencies | None
    requests_total: int
    credits_total: Decimal
    left_total: int = 0
    faults_total: int = 0
    missed_total: int = 0


async def run_plain(target: Target, **limits: object) -> LoadResult:
    """Load `target` with plain requests; see `Load` for the limits."""
    return await Load(target, **limits).run()  # type: ignore[arg-type]


async def run_streams(target: Target, **limits: object) -> LoadResult:
    """Load `target` with streams, each of which must end in `[DONE]`; see `Load`."""
    return await Load(target, streamed=True, **limits).run()  # type: ignore[arg-type]


class Mark(NamedTuple):
    """All counters at one moment."""

    at: float
    requests: int
    chunks: int
    bytes: int
    errors: Counter[str]
    latencies: int
    firsts: int
    ages: int


class Load:
    """One run.

    concurrency       connections, each with one request at a time
    duration_seconds  length of the measured window, after `warmup_seconds`; or
    count             how many requests in total, all of them measured
    rate_per_second   open loop: requests are due at this rate, whatever is answered
    streamed          answers are SSE; a stream without `[DONE]` is an error
    at_edges          called at the start and at the end of the window
    opening_seconds   spread the opening of connections evenly over this time
    steady            do not start the warm-up before every connection is getting an answer
    limit_seconds     give up with TimeoutError when a count or a steady state takes longer
    drain_seconds     how long answers may take to end after the window
    asks              what is asked in turn, over and over, instead of the target's request
    """

    def __init__(
        self,
        target: Target,
        *,
        concurrency: int,
        duration_seconds: float | None = None,
        count: int | None = None,
        warmup_seconds: float = 0.0,
        opening_seconds: float = 0.0,
        rate_per_second: float | None = None,
        streamed: bool = False,
        steady: bool = False,
        at_edges: Callable[[], None] | None = None,
        limit_seconds: float = 120.0,
        drain_seconds: float = DRAIN_SECONDS,
        asks: Sequence[Ask] = (),
    ) -> None:
        if (duration_seconds is None) == (count is None):
            raise ValueError("a run has either a duration or a count")
        self.target = target
        self._asks = itertools.cycle(asks or [Ask(target.request, streamed)])
        self._concurrency, self._duration, self._count = concurrency, duration_seconds, count
        self._warmup, self._rate, self._steady = warmup_seconds, rate_per_second, steady
        self._opening = opening_seconds
        self._at_edges, self._limit, self._drain = at_edges, limit_seconds, drain_seconds
        self._left_to_send = count
        self._left_to_end = count
        self._stopping = self._cutting = False
        self._connections: set[ClientConnection] = set()
        self._idle: deque[ClientConnection] = deque()
        self._backlog: deque[int] = deque()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.busy = self.answering = 0
        self.requests = self.chunks = self.bytes = 0
        self.left = self.faults = self.missed = 0
        self.errors: Counter[str] = Counter()
        self.latencies, self.firsts, self.ages = array("q"), array("q"), array("q")
        self.credits = Decimal(0)

    async def run(self) -> LoadResult:
        """Open the connections, load, stop, and give what the window saw."""
        ticker = None if self._rate is None else asyncio.create_task(self._arrive(self._rate))
        try:
            if self._duration is None:
                start = self._mark()
                await self._open_all()
                await self._wait_for(lambda: self._left_to_end == 0)
            else:
                await self._open_all()
                if self._steady:
                    await self._wait_for(lambda: self.answering >= self._concurrency)
                await asyncio.sleep(self._warmup)
                start = self._mark()
                await asyncio.sleep(self._duration)
            end = self._mark()
        finally:
            if ticker is not None:
                ticker.cancel()
            await self._stop()
        return self._result(start, end)

    async def _open_all(self) -> None:
        """Open every connection: evenly over the opening time, or as fast as it goes."""
        loop = asyncio.get_running_loop()
        if self._opening:
            began, gap = loop.time(), self._opening / self._concurrency
            for number in range(self._concurrency):
                await asyncio.sleep(max(0.0, began + number * gap - loop.time()))
                await self._open()
            return
        for first in range(0, self._concurrency, OPENING_AT_ONCE):
            size = min(OPENING_AT_ONCE, self._concurrency - first)
            await asyncio.gather(*(self._open() for _ in range(size)))

    async def _open(self) -> None:
        """One more connection; raises OSError if the server does not accept it."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(
            lambda: ClientConnection(self), self.target.host, self.target.port
        )

    async def _reopen(self) -> None:
        """Open a connection for one that was lost; each failure counts as a request."""
        while not self._stopping and self._left_to_send != 0:
            try:
                await self._open()
                break
            except OSError as problem:
                if self._left_to_send == 0:
                    break
                if self._left_to_send is not None:
                    self._left_to_send -= 1
                self._count_end(f"connect: {problem.strerror}")
            await asyncio.sleep(REOPEN_SECONDS)

    async def _arrive(self, rate: float) -> None:
        """Open loop: hand out or queue each request when it is due."""
        began, sent = time.monotonic_ns(), 0
        while self._left_to_send != 0:
            now = time.monotonic_ns()
            while (due := began + int(sent * 1e9 / rate)) <= now and self._left_to_send != 0:
                sent += 1
                if self._idle:
                    self._send(self._idle.popleft(), due)
                elif len(self._backlog) < MAX_BACKLOG:
                    self._backlog.append(due)
                else:
                    self.errors["backlog full"] += 1
            await asyncio.sleep(0.001)

    def connected(self, connection: ClientConnection) -> None:
        """A connection is open and may ask."""
        self._connections.add(connection)
        self.ready(connection)

    def ready(self, connection: ClientConnection) -> None:
        """`connection` has nothing to do: give it the next request, or let it rest."""
        if self._stopping or self._left_to_send == 0:
            connection.transport.close()
        elif self._rate is None or self._backlog:
            due = self._backlog.popleft() if self._backlog else time.monotonic_ns()
            self._send(connection, due)
        else:
            self._idle.append(connection)

    def _send(self, connection: ClientConnection, due: int) -> None:
        if self._left_to_send is not None:
            self._left_to_send -= 1
        connection.ask(next(self._asks), due)

    def ended(self, ask: Ask, error: str | None) -> None:
        """A request has its whole answer, or has failed."""
        self.busy -= 1
        if ask.fault:
            self.faults += 1
            error = None
        self._count_end(error)

    def hung_up(self) -> None:
        """A request was left by its client, as it should be."""
        self.busy -= 1
        self.left += 1
        self._count_end(None)

    def _count_end(self, error: str | None) -> None:
        if error is None:
            self.requests += 1
        elif not self._cutting:
            self.errors[error] += 1
        if self._left_to_end is not None:
            self._left_to_end -= 1
        self._changed.set()

    def told(self) -> None:
        """Something that `run` may be waiting for has happened."""
        self._changed.set()

    def disconnected(self, connection: ClientConnection) -> None:
        """A connection is gone; another takes its place while the run lasts."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._changed.set()
        if not self._stopping and self._left_to_send != 0:
            task = asyncio.create_task(self._reopen())
            self._tasks.add(task)
            task.add_done_callback(self._reopened)

    def _reopened(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`; raises TimeoutError after `limit_seconds`."""
        try:
            async with asyncio.timeout(self._limit):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as problem:
            raise TimeoutError(f"the load stands still: {self!r}") from problem

    def __repr__(self) -> str:
        return (
            f"Load({self.requests} requests, {self.chunks} chunks, {self.answering} answering, "
            f"errors {dict(self.errors)})"
        )

    async def _stop(self) -> None:
        """Let running requests end for a while, then cut them."""
        self._stopping = True
        while self._idle:
            self._idle.popleft().transport.close()
        self._limit = min(self._limit, self._drain)
        try:
            await self._wait_for(lambda: not self._connections and not self._tasks)
        except TimeoutError:
            self._cutting = True
            for connection in list(self._connections):
                connection.transport.abort()
            await self._wait_for(lambda: not self._connections)

    def _mark(self) -> Mark:
        if self._at_edges is not None:
            self._at_edges()
        return Mark(
            time.monotonic(),
            self.requests,
            self.chunks,
            self.bytes,
            self.errors.copy(),
            len(self.latencies),
            len(self.firsts),
            len(self.ages),
        )

    def _result(self, start: Mark, end: Mark) -> LoadResult:
        return LoadResult(
            seconds=end.at - start.at,
            requests=end.requests - start.requests,
            chunks=end.chunks - start.chunks,
            bytes=end.bytes - start.bytes,
            errors=dict(self.errors - start.errors),
            latency_ms=percentiles(self.latencies[start.latencies : end.latencies]),
            first_chunk_ms=percentiles(self.firsts[start.firsts : end.firsts]),
            chunk_age_ms=percentiles(self.ages[start.ages : end.ages]),
            requests_total=self.requests,
            credits_total=self.credits,
            left_total=self.left,
            faults_total=self.faults,
            missed_total=self.missed,
        )
