"""The wire form of answers: HTTP heads and chunks, SSE events, and odd ways to cut them.

Owns bytes and `Step`, the unit of which answers consist. Leaves which steps an answer
has to `steps`.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.provider.script import Script

REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
JSON_TYPE = "application/json"
# Long enough for two writes to arrive as two reads, and for data to pass before a reset.
GAP_SECONDS = 0.003
EVENTS_PER_WRITE = 8
# Where a stamp goes: `@` and CLOCK_MONOTONIC in nanoseconds, 19 digits.
STAMP_PLACE = "@" + "0" * 19


class Ending(enum.Enum):
    """How an answer ends once its bytes are written."""

    COMPLETE = "the connection serves the next request"
    CLOSE = "the connection is closed"
    RESET = "the connection is reset"
    HANG = "nothing more ever comes"


class Stamped(NamedTuple):
    """An event to which the moment of its writing is added, so that a reader can tell its age."""

    before: bytes
    after: bytes


# Seconds to wait, then what to write, or how to end.
Step = tuple[float, bytes | Stamped | Ending]


def head(
    status: int, content_type: str, framing: str, extra: Iterable[tuple[str, str]] = ()
) -> bytes:
    """An HTTP/1.1 head; `framing` is the line that says how the body is delimited."""
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}",
        f"content-type: {content_type}",
        framing,
        *(f"{name}: {value}" for name, value in extra),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def whole(
    status: int, body: bytes, content_type: str = JSON_TYPE, extra: Iterable[tuple[str, str]] = ()
) -> bytes:
    """A complete answer with a Content-Length."""
    return head(status, content_type, f"content-length: {len(body)}", extra) + body


def http_chunk(data: bytes) -> bytes:
    """`data` as one chunk of the chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stamped(data: bytes) -> bytes | Stamped:
    """`data` with its place for a stamp opened, if it has one."""
    before, place, after = data.partition(STAMP_PLACE.encode())
    return Stamped(before + b"@", after) if place else data


def sse(script: Script, data: bytes) -> bytes:
    """`data` as one SSE event in the scripted framing, after a comment if scripted."""
    end = b"\r\n" if script.crlf else b"\n"
    name = b"data:" if script.no_space else b"data: "
    comment = b": ping" + end + end if script.comments else b""
    return comment + name + data + end + end


def shaped(script: Script, steps: Iterator[Step]) -> Iterator[Step]:
    """The same events cut into, or gathered in, the scripted writes."""
    if script.split_events:
        return cut_anywhere(steps, random.Random(script.seed))
    if script.split_utf8:
        return cut_inside_characters(steps)
    return gathered(steps) if script.coalesce else steps


def cut_anywhere(steps: Iterator[Step], chance: random.Random) -> Iterator[Step]:
    """Each event in two to four writes, cut at offsets drawn from `chance`."""
    for wait, payload in steps:
        if not isinstance(payload, bytes) or len(payload) < 4:
            yield wait, payload
            continue
        offsets = sorted(chance.sample(range(1, len(payload)), chance.randint(1, 3)))
        for start, stop in zip([0, *offsets], [*offsets, len(payload)], strict=True):
            yield wait, payload[start:stop]
            wait = GAP_SECONDS


def cut_inside_characters(steps: Iterator[Step]) -> Iterator[Step]:
    """Each event with a multi-byte character in two writes, cut inside that character."""
    for wait, payload in steps:
        if isinstance(payload, bytes):
            lead = next((at for at, byte in enumerate(payload) if byte >= 0xC0), None)
            if lead is not None:
                yield wait, payload[: lead + 1]
                wait, payload = GAP_SECONDS, payload[lead + 1 :]
        yield wait, payload


def gathered(steps: Iterator[Step]) -> Iterator[Step]:
    """Up to eight events in one write, waiting as long as the events would have."""
    total, events = 0.0, list[bytes]()
    for wait, payload in steps:
        total += wait
        if isinstance(payload, bytes):
            events.append(payload)
        if events and (len(events) == EVENTS_PER_WRITE or not isinstance(payload, bytes)):
            yield total, b"".join(events)
            total, events = 0.0, []
        if not isinstance(payload, bytes):
            yield total, payload
