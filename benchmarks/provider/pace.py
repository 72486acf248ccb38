"""When the steps of answers happen: one clock for all streams of a provider.

Theory of operation: every answer in progress is a `Delivery` that holds its next
payload and the moment it is due. The `Metronome` keeps deliveries in buckets of one
millisecond with a single timer for the earliest bucket, so 500 streams of 20 ms cost at
most 1,000 wake-ups a second instead of 25,000. Steps with no delay go into the batch of
the next event-loop turn, one write each. A stream is due by its schedule, not by its
last write: one that fell behind catches up. A delivery whose client reads too slowly
stands still until the transport asks for more.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.provider.framing import Ending, Stamped, Step

if TYPE_CHECKING:
    from benchmarks.provider.connection import ProviderConnection

TICKS_PER_SECOND = 1000


class Metronome:
    """Calls `step` of each delivery when it is due, many per timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: list[Delivery] = []
        self._buckets: dict[int, list[Delivery]] = {}
        self._ticks: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return self._loop.time()

    def soon(self, delivery: Delivery) -> None:
        """Step `delivery` in the next turn of the event loop."""
        if not self._ready:
            self._loop.call_soon(self._turn)
        self._ready.append(delivery)

    def at(self, due: float, delivery: Delivery) -> None:
        """Step `delivery` at `due` (loop seconds), rounded up to a millisecond."""
        tick = int(due * TICKS_PER_SECOND) + 1
        bucket = self._buckets.get(tick)
        if bucket is not None:
            bucket.append(delivery)
            return
        self._buckets[tick] = [delivery]
        heapq.heappush(self._ticks, tick)
        if self._timer is None or tick < self._armed_for:
            self._arm()

    def stop(self) -> None:
        """Forget every delivery."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._ready, self._buckets, self._ticks = [], {}, []

    def _turn(self) -> None:
        batch, self._ready = self._ready, []
        for delivery in batch:
            delivery.step()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = self._ticks[0]
        self._timer = self._loop.call_at(self._armed_for / TICKS_PER_SECOND, self._tick)

    def _tick(self) -> None:
        self._timer = None
        present = int(self._loop.time() * TICKS_PER_SECOND + 0.5)
        while self._ticks and self._ticks[0] <= present:
            for delivery in self._buckets.pop(heapq.heappop(self._ticks)):
                delivery.step()
        if self._ticks and self._timer is None:
            self._arm()


class Delivery:
    """One answer in progress on a connection."""

    __slots__ = ("_connection", "_due", "_metronome", "_next_step", "_payload", "_write", "blocked")

    def __init__(
        self, connection: ProviderConnection, metronome: Metronome, steps: Iterator[Step]
    ) -> None:
        self._connection = connection
        self._metronome = metronome
        self._write = connection.transport.write
        self._next_step = steps.__next__
        self._payload: bytes | Stamped | Ending | None = None
        self._due = metronome.now()
        self.blocked = False

    def advance(self) -> None:
        """Fetch the next step and wait until it is due."""
        delay, payload = self._next_step()
        self._payload = payload
        if delay:
            self._due += delay
            self._metronome.at(self._due, self)
        elif not isinstance(payload, Ending):
            self._metronome.soon(self)
        else:
            # The end belongs to the last write: the client may leave right after it.
            self.step()

    def step(self) -> None:
        """Do what is due now; a cancelled delivery does nothing."""
        payload = self._payload
        if isinstance(payload, bytes):
            self._write(payload)
            if not self.blocked:
                self.advance()
        elif isinstance(payload, Stamped):
            self._write(b"%b%019d%b" % (payload.before, time.monotonic_ns(), payload.after))
            if not self.blocked:
                self.advance()
        elif payload is not None:
            self._payload = None
            self._connection.answer_ended(payload)

    def cancel(self) -> None:
        """The client left: whatever is still scheduled does nothing."""
        self._payload = None

    def resume(self) -> None:
        """The client reads again."""
        if self.blocked:
            self.blocked = False
            self.advance()
