"""What is measured: each scenario's load, and one measured run of it on one subject.

Owns the shape of the load and the pairing of its window with CPU. Leaves processes to
`processes`, the load itself to `load` and `wrk`, tables to `report`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import msgspec

from benchmarks import wrk
from benchmarks.load import Load, LoadResult, Target, target_for
from benchmarks.processes import cpu_seconds

PROMPT_BYTES = 1024
EVENT_CONTENT_BYTES = 20
CADENCE_MS = 20
BURST_CHUNKS = 200
# Within what the models of a catalogue allow; a stream here counts five tokens per event.
STREAM_MAX_TOKENS = 16_000
# No divisor of the cadence, so that streams opened evenly are spread over its phases.
OPENING_MS_PER_STREAM = 2.474
MARGIN_SECONDS = 0.5


class Subject(msgspec.Struct, frozen=True):
    """One way from the load to the stand-in: straight, or through a gateway.

    `groups` names the process trees whose CPU is counted, by their root ids; the one
    named like the subject comes first and does not count the trees of the others.
    """

    name: str
    base_url: str
    key: str = "none"
    model: str = "sandbox"
    groups: dict[str, list[int]] = {}


class Plan(msgspec.Struct, frozen=True):
    """How a scenario is run. Times in seconds; `concurrency` 0 is the scenario's own."""

    repetitions: int = 3
    seconds: float = 4.0
    warmup_seconds: float = 1.0
    concurrency: int = 0
    client: str = "auto"
    load_core: int | None = None


class Measurement(msgspec.Struct, frozen=True):
    """One window of one subject. `cpu_seconds` is by process group, `load` the client's own."""

    subject: str
    repetition: int
    client: str
    result: LoadResult
    cpu_seconds: dict[str, float]
    cpu_us_per_unit: dict[str, float]


class Scenario(msgspec.Struct, frozen=True):
    """A kind of load; `unit` is what CPU is divided by."""

    name: str
    summary: str
    unit: str
    concurrency: int
    run: Callable[[Subject, Plan, int, Meter], Awaitable[tuple[str, LoadResult]]]

    async def measure(
        self, subject: Subject, plan: Plan, repetition: int, others: dict[str, list[int]]
    ) -> Measurement:
        """One repetition on `subject`, counting `others` (the stand-in) as well."""
        meter = Meter(subject.groups | others)
        concurrency = plan.concurrency or self.concurrency
        client, result = await self.run(subject, plan, concurrency, meter)
        spent = meter.spent()
        units = max(1, result.requests if self.unit == "request" else result.chunks)
        per_unit = {name: round(seconds / units * 1e6, 2) for name, seconds in spent.items()}
        return Measurement(subject.name, repetition, client, result, spent, per_unit)


class Meter:
    """CPU of process groups at the edges of a window, from the kernel's accounting."""

    def __init__(self, groups: dict[str, list[int]]) -> None:
        self._groups = groups
        self._edges: list[dict[str, float]] = []

    def edge(self) -> None:
        """Note what every group has spent up to now."""
        counted = {}
        for name, roots in self._groups.items():
            others = {pid for other, pids in self._groups.items() if other != name for pid in pids}
            counted[name] = cpu_seconds(roots, leave_out=others)
        times = os.times()
        counted["load"] = times.user + times.system + times.children_user + times.children_system
        self._edges.append(counted)

    def spent(self) -> dict[str, float]:
        """CPU seconds of each group between the first edge and the last."""
        first, last = self._edges[0], self._edges[-1]
        return {name: round(last[name] - first[name], 3) for name in last}


def chat_body(subject: Subject, script: str = "", stream: bool = False) -> dict[str, object]:
    """A chat request of 1 KB whose prompt carries `script` for the stand-in."""
    directive = f" [[standin {script}]]" if script else ""
    shell: dict[str, object] = {"model": subject.model, "messages": [{"role": "user"}]}
    filler = "Lorem ipsum dolor sit amet, consectetur. " * (PROMPT_BYTES // 40)
    size = PROMPT_BYTES - len(msgspec.json.encode(shell)) - len(directive) - 50
    shell["messages"] = [{"role": "user", "content": filler[:size] + directive}]
    return shell | (
        {"stream": True, "max_tokens": STREAM_MAX_TOKENS} if stream else {"max_tokens": 100}
    )


def target(subject: Subject, script: str = "", stream: bool = False) -> Target:
    """`chat_body` as a target."""
    return target_for(subject.base_url, chat_body(subject, script, stream), subject.key)


async def rate(
    subject: Subject, plan: Plan, concurrency: int, meter: Meter
) -> tuple[str, LoadResult]:
    """Plain requests as fast as they are answered, from wrk if there is one."""
    if plan.client == "wrk" or (plan.client == "auto" and wrk.is_installed()):
        aim = target(subject)
        await wrk.run(aim, concurrency, plan.warmup_seconds, plan.load_core)
        meter.edge()
        result = await wrk.run(aim, concurrency, plan.seconds, plan.load_core)
        meter.edge()
        return "wrk", result
    load = Load(
        target(subject),
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        at_edges=meter.edge,
    )
    return "own", await load.run()


async def cadence(
    subject: Subject, plan: Plan, concurrency: int, meter: Meter
) -> tuple[str, LoadResult]:
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
    return "own", await load.run()


async def burst(
    subject: Subject, plan: Plan, concurrency: int, meter: Meter
) -> tuple[str, LoadResult]:
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
    return "own", await load.run()


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("rate", "plain requests, 1 KB in, 0.7 KB out", "request", 64, rate),
        Scenario("cadence", "streams, a 200-byte event every 20 ms", "chunk", 500, cadence),
        Scenario("burst", "streams of 200 events of 200 bytes, no delay", "chunk", 64, burst),
    )
}
