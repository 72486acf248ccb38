"""The scenarios that ask for endurance: many open streams, big bodies, bad readers, a mix.

Owns the shape of their load and what they look at beside CPU: memory, missed events, holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal

from benchmarks import kernel
from benchmarks.load import Load, LoadResult
from benchmarks.load_request import Ask
from benchmarks.measures import GATEWAYS, NGINX, Meter, Observed, Plan, Scenario, Subject
from benchmarks.scenarios import EVENT_CONTENT_BYTES, PROMPT_BYTES, target

MIB = 1024 * 1024
OPENED_PER_SECOND = 800
EVENTS_BESIDE_CONTENT = 4  # role, finish, usage, [DONE]
WARMING_REQUESTS = 200
POLL_SECONDS = 0.02
LATE_SECONDS = 15.0
STREAM_CHUNKS = 2560
STALLED_CHUNK_BYTES = 16 * 1024
MIX_RATE = 300.0
MIX_CHUNKS, MIX_DELAY_MS, MIX_LEAVE_AFTER = 40, 10, 12
STREAM_FAULTS = ("reset_mid_stream", "eof_mid_stream", "error_event")
PLAIN_FAULTS = ("fault=reset_before_head", "status=500")


async def open_streams(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Streams that are all open for the whole window, an event per second in each."""
    streams = min(concurrency, most_streams(len(subject.serving)))
    await warm(subject)
    before = memory_kb(subject)
    at_edge: list[int] = []

    def edge() -> None:
        meter.edge()
        at_edge.append(memory_kb(subject))

    opening = streams / OPENED_PER_SECOND
    chunks = int(1.5 * opening + plan.warmup_seconds + plan.seconds) + 2
    lasts = chunks + 1 + opening  # the finish event comes a second after the last content
    script = f"chunks={chunks};chunk_bytes={EVENT_CONTENT_BYTES};chunk_delay_ms=1000;stamp=1"
    aim = target(subject, script, stream=True, extra={"stream_options": {"include_usage": True}})
    load = Load(
        aim,
        concurrency=streams,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        opening_seconds=opening,
        steady=True,
        at_edges=edge,
        limit_seconds=lasts + LATE_SECONDS,
        drain_seconds=lasts + LATE_SECONDS,
        asks=[Ask(aim.request, streamed=True, events=chunks + EVENTS_BESIDE_CONTENT)],
    )
    result = await load.run()
    grown = (at_edge[-1] - before) / streams
    figures = {"streams": streams, "missed events": result.missed_total}
    return Observed("own", result, figures | {"KB/stream": round(grown * 1.024, 1)})


def most_streams(processes: int) -> int:
    """How many streams so many processes may hold that need two sockets for each."""
    most = (kernel.raise_open_files() - kernel.OWN_FILES) // 2
    print(f"open files allow {most} streams through one process", file=sys.stderr)
    return most * processes


async def warm(subject: Subject) -> None:
    """Let code and caches be there before memory is looked at."""
    aim = target(subject, "chunks=3", stream=True)
    await Load(aim, streamed=True, concurrency=8, count=WARMING_REQUESTS).run()


def memory_kb(subject: Subject) -> int:
    """Memory of the processes that hold the subject's connections, in KiB."""
    return sum(kernel.proportional_kb(pid) for pid in subject.serving)


async def renew_workers(subject: Subject, plan: Plan) -> None:
    """Let a gateway replace the processes that hold connections: new ones have no past.

    Tollgate's supervisor replaces a worker that has ended; nginx does at SIGHUP.
    """
    old = list(subject.serving)
    roots = subject.groups.get(subject.name, [])
    if subject.product is not None:
        ended, number = old, signal.SIGTERM
    elif subject.name == NGINX:
        ended, number = roots, signal.SIGHUP
    else:
        return
    for pid in ended:
        os.kill(pid, number)
    deadline = time.monotonic() + LATE_SECONDS
    while len(new := kernel.tree_of(roots) - set(roots)) < len(old) or new & set(old):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{subject.name} does not replace its worker")
        await asyncio.sleep(POLL_SECONDS)
    subject.serving[:] = sorted(new)
    kernel.pin_tree(subject.serving, plan.subject_core)
    if subject.product is not None:
        await subject.product.until_ready()


@contextlib.asynccontextmanager
async def grown_mb(subject: Subject) -> AsyncIterator[dict[str, float]]:
    """Fills in by how much the subject's memory rose above its start, at most (MB)."""
    figures: dict[str, float] = {}
    if subject.serving:
        await warm(subject)
    before = sum(kernel.resident_kb(pid) for pid in subject.serving)
    for pid in subject.serving:
        kernel.forget_peak(pid)
    yield figures
    if subject.serving:
        peak = sum(kernel.resident_peak_kb(pid) for pid in subject.serving)
        figures["peak MB"] = round((peak - before) * 1.024 / 1000, 1)


async def big_prompts(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Plain requests with prompts of 1 MB."""
    return await bodies(subject, plan, concurrency, meter, prompt_bytes=MIB)


async def big_answers(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Plain answers of 10 MB."""
    script = f"answer_bytes={10 * MIB}"
    return await bodies(subject, plan, concurrency, meter, script, max_tokens=4 * MIB)


async def big_streams(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Streams of 10 MB in events of 4 KB, without delay."""
    script = f"chunks={STREAM_CHUNKS};chunk_bytes=4096"
    return await bodies(subject, plan, concurrency, meter, script, stream=True, max_tokens=4 * MIB)


async def bodies(
    subject: Subject,
    plan: Plan,
    concurrency: int,
    meter: Meter,
    script: str = "",
    *,
    stream: bool = False,
    prompt_bytes: int = PROMPT_BYTES,
    max_tokens: int = 100,
) -> Observed:
    """A closed loop of one kind of request, with the memory it takes."""
    extra = {"max_tokens": max_tokens}
    aim = target(subject, script, stream=stream, extra=extra, prompt_bytes=prompt_bytes)
    load = Load(
        aim,
        streamed=stream,
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        at_edges=meter.edge,
    )
    async with grown_mb(subject) as figures:
        result = await load.run()
    figures["MB/s answered"] = round(result.bytes / result.seconds / 1e6, 1)
    return Observed("own", result, figures)


async def stalled_readers(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Clients that ask for 40 MB and read nothing: what each costs while the window lasts."""
    script = f"chunks={STREAM_CHUNKS};chunk_bytes={STALLED_CHUNK_BYTES}"
    aim = target(subject, script, stream=True, extra={"max_tokens": 16 * MIB})
    began = time.monotonic()
    async with grown_mb(subject) as figures:
        before = memory_kb(subject)
        readers = [stalled_reader(aim.host, aim.port, aim.request) for _ in range(concurrency)]
        try:
            await asyncio.sleep(plan.warmup_seconds)
            meter.edge()
            await asyncio.sleep(plan.seconds)
            meter.edge()
            grown = memory_kb(subject) - before
        finally:
            for reader in readers:
                reader.close()
    figures["KB/reader"] = round(grown / concurrency * 1.024, 1)
    seconds = time.monotonic() - began
    return Observed("own", nothing_read(seconds, concurrency), figures)


def stalled_reader(host: str, port: int, request: bytes) -> socket.socket:
    """A connection that has asked and will not read, with little room in its own kernel."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((host, port))
    reader.sendall(request)
    return reader


def nothing_read(seconds: float, requests: int) -> LoadResult:
    """The result of a load that reads nothing."""
    return LoadResult(seconds, requests, 0, 0, {}, None, None, None, requests, Decimal(0))


async def mixed(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Open loop: 70 % streams, 10 % of all left by the client, 5 % failed by the stand-in."""
    load = Load(
        target(subject),
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        rate_per_second=MIX_RATE,
        at_edges=meter.edge,
        asks=mixture(subject),
    )
    result = await load.run()
    figures = {"left": float(result.left_total), "faults": float(result.faults_total)}
    if subject.product is not None:
        await subject.product.until_posted()
        figures["held $ after"] = await subject.product.held_usd()
    return Observed("own", result, figures)


def mixture(subject: Subject) -> Sequence[Ask]:
    """A hundred requests in an order that is always the same; each twenty have the shares."""
    script = f"chunks={MIX_CHUNKS};chunk_bytes={EVENT_CONTENT_BYTES};chunk_delay_ms={MIX_DELAY_MS}"

    def streamed(more: str = "", *, leave_after: int | None = None, fault: bool = False) -> Ask:
        request = target(subject, script + more, stream=True).request
        return Ask(request, True, leave_after, fault)

    def plain(script: str = "") -> Ask:
        return Ask(target(subject, script).request, fault=bool(script))

    failing = [streamed(f";fault={fault}", fault=True) for fault in STREAM_FAULTS]
    failing += [plain(script) for script in PLAIN_FAULTS]
    asks: list[Ask] = []
    for one in failing:
        twenty = [one, *[streamed(leave_after=MIX_LEAVE_AFTER)] * 2]
        twenty += [streamed()] * (14 - sum(ask.streamed for ask in twenty))
        twenty += [plain()] * (20 - len(twenty))
        random.Random(len(asks)).shuffle(twenty)
        asks += twenty
    return asks


SCENARIOS = (
    Scenario(
        "open-streams",
        "streams open at once, an event a second in each",
        "chunk",
        10_000,
        open_streams,
        GATEWAYS,
        prepare=renew_workers,
        repetitions=1,
        seconds=60.0,
        warmup_seconds=2.0,
    ),
    Scenario(
        "big-prompts",
        "plain requests, 1 MB in",
        "request",
        8,
        big_prompts,
        repetitions=2,
        seconds=2.0,
        prepare=renew_workers,
    ),
    Scenario(
        "big-answers",
        "plain answers of 10 MB",
        "request",
        4,
        big_answers,
        repetitions=2,
        seconds=2.0,
        prepare=renew_workers,
    ),
    Scenario(
        "big-streams",
        "streams of 10 MB",
        "request",
        4,
        big_streams,
        repetitions=2,
        seconds=2.0,
        prepare=renew_workers,
    ),
    Scenario(
        "stalled-readers",
        "clients that ask for 40 MB and read nothing",
        "request",
        50,
        stalled_readers,
        GATEWAYS,
        prepare=renew_workers,
        repetitions=1,
        seconds=2.0,
    ),
    Scenario(
        "mixed",
        f"open loop, {MIX_RATE:.0f}/s: 70 % streams, 10 % left, 5 % faults",
        "request",
        400,
        mixed,
        repetitions=1,
    ),
)
