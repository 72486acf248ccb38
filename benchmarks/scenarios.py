"""The plain scenarios: requests as fast as they go, streams at a cadence, streams at once.

Owns the shape of their load. Leaves the load itself to `load` and `wrk`, its pairing with
CPU to `measures`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from benchmarks import wrk
from benchmarks.load import Load
from benchmarks.load_request import Target, target_for
from benchmarks.measures import Meter, Observed, Plan, Scenario, Subject

PROMPT_BYTES = 1024
EVENT_CONTENT_BYTES = 20
CADENCE_MS = 20
BURST_CHUNKS = 200
# Within what the models of a catalogue allow; a stream here counts five tokens per event.
STREAM_MAX_TOKENS = 16_000
# No divisor of the cadence, so that streams opened evenly are spread over its phases.
OPENING_MS_PER_STREAM = 2.474
MARGIN_SECONDS = 0.5
RATE = "plain requests, 1 KB in, 0.7 KB out"


def chat_body(
    subject: Subject, script: str = "", stream: bool = False, prompt_bytes: int = PROMPT_BYTES
) -> dict[str, object]:
    """A chat request of `prompt_bytes` in all, whose prompt carries `script` for the stand-in."""
    directive = f" [[standin {script}]]" if script else ""
    shell: dict[str, object] = {"model": subject.model, "messages": [{"role": "user"}]}
    filler = "Lorem ipsum dolor sit amet, consectetur. " * (prompt_bytes // 40)
    size = prompt_bytes - len(msgspec.json.encode(shell)) - len(directive) - 50
    shell["messages"] = [{"role": "user", "content": filler[:size] + directive}]
    return shell | (
        {"stream": True, "max_tokens": STREAM_MAX_TOKENS} if stream else {"max_tokens": 100}
    )


def target(
    subject: Subject,
    script: str = "",
    stream: bool = False,
    extra: Mapping[str, object] | None = None,
    prompt_bytes: int = PROMPT_BYTES,
) -> Target:
    """`chat_body`, with `extra` members over it, as a target."""
    body = chat_body(subject, script, stream, prompt_bytes) | dict(extra or {})
    return target_for(subject.base_url, body, subject.key)


async def rate(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Plain requests as fast as they are answered, from wrk if there is one."""
    if plan.client == "wrk" or (plan.client == "auto" and wrk.is_installed()):
        aim = target(subject)
        await wrk.run(aim, concurrency, plan.warmup_seconds, plan.load_core)
        meter.edge()
        result = await wrk.run(aim, concurrency, plan.seconds, plan.load_core)
        meter.edge()
        return Observed("wrk", result)
    load = Load(
        target(subject),
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        at_edges=meter.edge,
    )
    return Observed("own", await load.run())


async def cadence(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Streams that all run for the whole window, a 200-byte event every 20 ms in each."""
    opening = concurrency * OPENING_MS_PER_STREAM / 1000
    lasts = opening + plan.warmup_seconds + plan.seconds + MARGIN_SECONDS
    chunks = int(lasts * 1000 / CADENCE_MS)
    script = (
        f"stamp=1;chunks={chunks};chunk_bytes={EVENT_CONTENT_BYTES};chunk_delay_ms={CADENCE_MS}"
    )
    load = Load(
        target(subject, script, stream=True),
        streamed=True,
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        opening_seconds=opening,
        steady=True,
        at_edges=meter.edge,
    )
    return Observed("own", await load.run())


async def burst(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Streams of 200 events of 200 bytes with no delay, one after the other."""
    script = f"chunks={BURST_CHUNKS};chunk_bytes={EVENT_CONTENT_BYTES}"
    load = Load(
        target(subject, script, stream=True),
        streamed=True,
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        at_edges=meter.edge,
    )
    return Observed("own", await load.run())


SCENARIOS = (
    Scenario("rate", RATE, "request", 64, rate),
    Scenario("cadence", "streams, a 200-byte event every 20 ms", "chunk", 500, cadence),
    Scenario("burst", "streams of 200 events of 200 bytes, no delay", "chunk", 64, burst),
    *(
        Scenario(f"rate-{size}", RATE, "request", size, rate, repetitions=1, seconds=3.0)
        for size in (1, 16, 256)
    ),
)
