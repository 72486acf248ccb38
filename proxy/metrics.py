"""Every metric of the proxy, declared once; counted per worker, summed per host.

Owns the cells: one shared file, a row of 64-bit integers per worker, written by that worker
with plain stores and read by the supervisor at scrape. A row has one worker at a time; the
next one goes on counting where it stopped, so counters never fall. There is a row more than
workers: while one is rolled, it and its successor both count. The file ends in a digest of
the layout: a roll may bring a worker whose code knows other cells than the supervisor's.
"""

import hashlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from accounting.contract import errors
from accounting.contract.errors import Failure
from accounting.contract.usage_event import UsageEvent

ROW_BYTES = 4096
_CELL_BYTES = 8


class Declared(NamedTuple):
    """A metric: its name, meaning, kind, and its label with all values it can have."""

    name: str
    meaning: str
    kind: str
    label: str = ""
    values: tuple[str, ...] = ("",)


def _failure_codes() -> tuple[str, ...]:
    found = {kind.code for kind in vars(errors).values() if _is_failure(kind)}
    return (*sorted(found), "other")


def _is_failure(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Failure)


_CODES = _failure_codes()
OUTCOMES = ("completed", "client_left", "provider_failed", "cut")
SETTLEMENTS = ("exact", "estimated", "void")
METRICS = (
    Declared("tollgate_requests", "Exchanges settled.", "counter", "outcome", OUTCOMES),
    Declared("tollgate_settlements", "How they were settled.", "counter", "kind", SETTLEMENTS),
    Declared("tollgate_refusals", "Requests refused at the door.", "counter", "code", _CODES),
    Declared("tollgate_upstream_failures", "Targets that failed.", "counter", "code", _CODES),
    Declared("tollgate_cooldowns", "Times that a target began to be passed over.", "counter"),
    Declared("tollgate_upstream_tls_failures", "Handshakes with providers failed.", "counter"),
    Declared("tollgate_charged_microcredits", "Charged to wallets.", "counter"),
    Declared("tollgate_overrun_microcredits", "Cost beyond holds, not charged.", "counter"),
    Declared("tollgate_input_tokens", "Input tokens settled.", "counter"),
    Declared("tollgate_output_tokens", "Output tokens settled.", "counter"),
    Declared("tollgate_answer_bytes", "Answer bytes relayed.", "counter"),
    Declared("tollgate_settle_refusals", "Settle batches Redis refused.", "counter"),
    Declared("tollgate_settles_late", "Settles left to accounting to charge.", "counter"),
    Declared("tollgate_journal_sync_failures", "Journals that did not reach the disk.", "counter"),
    Declared("tollgate_replayed_settles", "Settles found in dead workers' journals.", "counter"),
    Declared("tollgate_workers_ready", "Workers that serve.", "gauge"),
    Declared("tollgate_workers_compiled", "Workers that run compiled.", "gauge"),
    Declared("tollgate_redis_up", "Workers connected to Redis.", "gauge"),
    Declared("tollgate_gate_open", "Workers that may admit: Redis has its epoch.", "gauge"),
    Declared("tollgate_connections", "Client connections open.", "gauge"),
    Declared("tollgate_exchanges", "Exchanges under way.", "gauge"),
    Declared("tollgate_targets_cooling", "Targets passed over, summed over workers.", "gauge"),
    Declared("tollgate_settles_unacknowledged", "Settles Redis has not confirmed.", "gauge"),
    Declared("tollgate_journal_slots_used", "Journal slots in use.", "gauge"),
)

CELLS: dict[tuple[str, str], int] = {}
for _metric in METRICS:
    for _value in _metric.values:
        CELLS[_metric.name, _value] = len(CELLS)
assert len(CELLS) * _CELL_BYTES <= ROW_BYTES
_LAYOUT = hashlib.sha256(repr(sorted(CELLS.items())).encode()).digest()
_GAUGES = [CELLS[m.name, value] for m in METRICS if m.kind == "gauge" for value in m.values]


class LayoutError(OSError):
    """The shared file is of code that counts other things."""


def cell(name: str, value: str = "") -> int:
    return CELLS[name, value]


class Counters:
    """One worker's row. `cells[i] += 1` costs no more than a list's. Raises LayoutError."""

    def __init__(self, path: Path, row: int) -> None:
        if path.read_bytes()[-len(_LAYOUT) :] != _LAYOUT:
            raise LayoutError("metrics have changed: stop and start the proxy instead")
        self.cells = _map(path, row)
        for index in _GAUGES:
            self.cells[index] = 0
        self._requests = {value: cell("tollgate_requests", value) for value in OUTCOMES}
        self._settlements = {value: cell("tollgate_settlements", value) for value in SETTLEMENTS}
        self._charged = cell("tollgate_charged_microcredits")
        self._overrun = cell("tollgate_overrun_microcredits")
        self._input = cell("tollgate_input_tokens")
        self._output = cell("tollgate_output_tokens")
        self._bytes = cell("tollgate_answer_bytes")

    def settled(self, event: UsageEvent) -> None:
        cells = self.cells
        cells[self._requests[event.outcome]] += 1
        cells[self._settlements[event.settlement]] += 1
        cells[self._charged] += event.charge_ucr
        cells[self._input] += event.tokens.input
        cells[self._output] += event.tokens.output
        cells[self._bytes] += event.answer_bytes
        if event.overrun_ucr:
            cells[self._overrun] += event.overrun_ucr

    def refused(self, failure: Failure) -> None:
        self._count("tollgate_refusals", failure)

    def upstream_failed(self, failure: Failure) -> None:
        self._count("tollgate_upstream_failures", failure)

    def add(self, name: str, amount: int = 1) -> None:
        self.cells[CELLS[name, ""]] += amount

    def set(self, name: str, amount: int) -> None:
        self.cells[CELLS[name, ""]] = amount

    def _count(self, name: str, failure: Failure) -> None:
        index = CELLS.get((name, failure.code))
        self.cells[CELLS[name, "other"] if index is None else index] += 1


def create(path: Path, rows: int) -> None:
    """Make the shared file, empty, for so many workers."""
    path.write_bytes(bytes(rows * ROW_BYTES) + _LAYOUT)
    path.chmod(0o600)


def _map(path: Path, row: int) -> "memoryview[int]":
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        mapped = mmap.mmap(descriptor, ROW_BYTES, offset=row * ROW_BYTES)
    finally:
        os.close(descriptor)
    return memoryview(mapped).cast("q")


class HostMetrics:
    """All rows of a host, summed: a prometheus-client collector."""

    def __init__(self, path: Path, rows: int) -> None:
        self._rows = [_map(path, row) for row in range(rows)]

    def total(self, name: str, value: str = "") -> int:
        index = CELLS[name, value]
        return sum(row[index] for row in self._rows)

    def serves(self, row: int) -> bool:
        """Whether the worker that counts there serves and may admit."""
        cells = self._rows[row]
        return bool(cells[cell("tollgate_workers_ready")] and cells[cell("tollgate_gate_open")])

    def clear_gauges(self, row: int) -> None:
        """Nobody counts there: what was open in its last worker is no more."""
        for index in _GAUGES:
            self._rows[row][index] = 0

    def collect(self) -> Iterator[Metric]:
        for metric in METRICS:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(
                metric.name, metric.meaning, labels=[metric.label] if metric.label else []
            )
            for value in metric.values:
                total = self.total(metric.name, value)
                family.add_metric([value] if metric.label else [], total)
            yield family
