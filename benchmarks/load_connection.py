"""One connection of a load: what it asks and how it reads the answer.

Owns the reading of answers: chunks, their age, credits, and what is wrong with them.
Leaves when to ask, and the sums, to `load`.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import deque
from decimal import Decimal
from typing import TYPE_CHECKING

import httptools
import msgspec

if TYPE_CHECKING:
    from benchmarks.load import Load
    from benchmarks.load_request import Ask

TAIL_BLOCKS = 8
CREDITS_MARK = b'"credits_used":'
STAMP_MARK = b'"@'
STAMP_DIGITS = 19


class Latencies(msgspec.Struct, frozen=True):
    """Percentiles in milliseconds, of `count` samples."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


class ClientConnection(asyncio.Protocol):
    """One connection of a load, asking one thing at a time."""

    def __init__(self, load: Load) -> None:
        self.transport: asyncio.Transport
        self._load = load
        self._asked_at: int | None = None
        self._ask: Ask
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._first = True
        self._tail: deque[bytes] = deque(maxlen=TAIL_BLOCKS)
        self._credits: bytes | None = None
        self._chunks = 0
        self._half_break = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._load.connected(self)

    def ask(self, ask: Ask, asked_at: int) -> None:
        """Send the request; `asked_at` is when it was due, in monotonic nanoseconds."""
        self._ask, self._asked_at = ask, asked_at
        self._load.busy += 1
        self.transport.write(ask.request)

    def data_received(self, data: bytes) -> None:
        self._load.bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("not HTTP")
            self.transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 14 and name.lower() == b"x-credits-used":
            self._credits = value

    def on_body(self, body: bytes) -> None:
        load = self._load
        if self._first:
            self._first = False
            load.answering += 1
            load.firsts.append(time.monotonic_ns() - (self._asked_at or 0))
            load.told()
        if self._ask.streamed:
            # A break cut between two reads is counted too: 0.1 µs.
            found = body.count(b"\n\n") + (self._half_break and body[:1] == b"\n")
            self._half_break = body[-1:] == b"\n" and body[-2:] != b"\n\n"
            self._chunks += found
            load.chunks += found
            self._tail.append(body)
            at = body.find(STAMP_MARK)
            if at >= 0:
                self._note_ages(body, at)
            if self._ask.leave_after is not None and self._chunks >= self._ask.leave_after:
                self._hang_up()

    def _hang_up(self) -> None:
        """Leave in the middle of an answer."""
        if self._asked_at is not None:
            self._asked_at = None
            self._load.answering -= 1
            self._load.hung_up()
            self.transport.abort()

    def _note_ages(self, body: bytes, at: int) -> None:
        """How long ago the server wrote each stamped event in `body`."""
        now = time.monotonic_ns()
        while at >= 0:
            digits = body[at + 2 : at + 2 + STAMP_DIGITS]
            if len(digits) == STAMP_DIGITS and digits.isdigit():
                self._load.ages.append(now - int(digits))
            at = body.find(STAMP_MARK, at + 2)

    def on_message_complete(self) -> None:
        if self._asked_at is None:
            return
        status, load = self._parser.get_status_code(), self._load
        error = None if status == 200 else f"status {status}"
        if self._ask.streamed and error is None:
            error = self._stream_error(b"".join(self._tail))
        if self._ask.events is not None:
            load.missed += max(0, self._ask.events - self._chunks)
        if self._credits is not None:
            load.credits += Decimal(self._credits.decode("ascii"))
        if error is None:
            load.latencies.append(time.monotonic_ns() - self._asked_at)
        keep_alive = self._parser.should_keep_alive()
        self._end(error)
        if keep_alive:
            self._begin()
            load.ready(self)
        else:
            self.transport.close()

    def _stream_error(self, tail: bytes) -> str | None:
        """What is wrong with a stream that ended in `tail`; notes its credits."""
        found = credits_in(tail)
        if found is not None:
            self._credits = found
        if b'"error":{' in tail:
            return "error event"
        return None if b"[DONE]" in tail else "no [DONE]"

    def _end(self, error: str | None) -> None:
        if self._asked_at is not None:
            self._asked_at = None
            self._load.answering -= not self._first
            self._load.ended(self._ask, error)

    def connection_lost(self, error: Exception | None) -> None:
        if self._asked_at is not None:
            self._end("cut after its head" if not self._first else "cut before its head")
        self._load.disconnected(self)


def credits_in(tail: bytes) -> bytes | None:
    """The digits of the last `credits_used` in the end of a stream, or None."""
    _, mark, rest = tail.rpartition(CREDITS_MARK)
    if not mark:
        return None
    digits = rest.lstrip(b' "')
    size = next((at for at, byte in enumerate(digits) if byte not in b"0123456789.-+eE"), 0)
    return digits[:size] or None


def percentiles(samples_ns: array[int]) -> Latencies | None:
    """Percentiles in milliseconds of samples in nanoseconds; None of no samples."""
    if not samples_ns:
        return None
    ordered = sorted(samples_ns)
    last = len(ordered) - 1

    def at(share: float) -> float:
        return round(ordered[int(last * share)] / 1e6, 4)

    return Latencies(len(ordered), at(0.5), at(0.9), at(0.99), at(1.0))
