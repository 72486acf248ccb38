"""What one measurement is: a subject, how often and how long, and what came of it.

Owns the pairing of a window of load with CPU. Leaves the load to the scenarios, the reading
of /proc to `kernel`, tables to `report`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import msgspec

from benchmarks.kernel import cpu_seconds
from benchmarks.load import LoadResult
from benchmarks.product import Product

DIRECT, NGINX, TOLLGATE = "direct", "nginx", "tollgate"
GATEWAYS, OURS = "gateways", "ours"  # what a scenario is only for
BEHIND = ("accounting", "postgres")  # they work when they come to it: counted per usage event


class Subject(msgspec.Struct, frozen=True):
    """One way from the load to the stand-in: straight, or through a gateway.

    `groups` names the process trees whose CPU is counted, by their root ids; the one
    named like the subject comes first and does not count the trees of the others.
    `serving` are the processes that hold the connections, if they are known.
    """

    name: str
    base_url: str
    key: str = "none"
    model: str = "sandbox"
    groups: dict[str, list[int]] = {}
    serving: list[int] = []
    product: Product | None = None


class Plan(msgspec.Struct, frozen=True):
    """How a scenario is run. Times in seconds; `concurrency` 0 is the scenario's own."""

    repetitions: int = 3
    seconds: float = 4.0
    warmup_seconds: float = 1.0
    concurrency: int = 0
    client: str = "auto"
    load_core: int | None = None
    subject_core: int | None = None


class Measurement(msgspec.Struct, frozen=True):
    """One window of one subject. `cpu_seconds` is by process group, `load` the client's own.

    `figures` are what else the scenario measures, by name with unit.
    """

    subject: str
    repetition: int
    client: str
    result: LoadResult
    cpu_seconds: dict[str, float]
    cpu_us_per_unit: dict[str, float]
    figures: dict[str, float] = {}


class Observed(msgspec.Struct, frozen=True):
    """What the load of a scenario gives: from which client, what it saw, further figures."""

    client: str
    result: LoadResult
    figures: dict[str, float] = {}


class Scenario(msgspec.Struct, frozen=True):
    """A kind of load; `unit` is what CPU is divided by.

    `only` GATEWAYS leaves the direct path out, OURS all but Tollgate. `seconds`, `repetitions`
    and `warmup_seconds` are its own defaults. `prepare` is called first and not measured.
    """

    name: str
    summary: str
    unit: str
    concurrency: int
    run: Callable[[Subject, Plan, int, Meter], Awaitable[Observed]]
    only: str = ""
    repetitions: int = 3
    seconds: float = 4.0
    warmup_seconds: float = 1.0
    prepare: Callable[[Subject, Plan], Awaitable[None]] | None = None

    def takes(self, subject: Subject) -> bool:
        """Whether `subject` can be measured by it."""
        if self.only == OURS:
            return subject.product is not None
        return self.only != GATEWAYS or bool(subject.serving)

    async def measure(
        self, subject: Subject, plan: Plan, repetition: int, others: dict[str, list[int]]
    ) -> Measurement:
        """One repetition on `subject`, counting `others` (the stand-in) as well.

        It ends when Tollgate's accounting has posted what the load used.
        """
        if self.prepare is not None:
            await self.prepare(subject, plan)
        meter, books = Meter(subject.groups | others), Books(subject)
        await books.open()
        seen = await self.run(subject, plan, plan.concurrency or self.concurrency, meter)
        figures = seen.figures | await books.closed()
        spent = {name: s for name, s in meter.spent().items() if name not in BEHIND}
        units = max(1, seen.result.requests if self.unit == "request" else seen.result.chunks)
        per_unit = {name: round(seconds / units * 1e6, 2) for name, seconds in spent.items()}
        return Measurement(
            subject.name, repetition, seen.client, seen.result, spent, per_unit, figures
        )


class Books:
    """What a run costs behind Tollgate's answers: from its first request to its last posting."""

    def __init__(self, subject: Subject) -> None:
        self._product = subject.product
        self._meter = Meter(subject.groups)
        self._served = 0

    async def open(self) -> None:
        """Before the load."""
        if self._product is not None:
            self._served = await self._product.served()
            self._meter.edge()

    async def closed(self) -> dict[str, float]:
        """After the load: wait for accounting, give the figures."""
        if self._product is None:
            return {}
        lag = await self._product.until_posted()
        self._meter.edge()
        events = max(1, await self._product.served() - self._served)
        spent = self._meter.spent()
        costs = {f"{name} µs/event": round(spent[name] / events * 1e6, 1) for name in BEHIND}
        return {"accounting lag s": lag, **costs}


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
        return {name: round(last[name] - first[name], 4) for name in last}
