"""Counters in shared memory: per worker written, per host summed, with a bounded set of labels."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from accounting.contract.errors import Failure, InvalidKey, ProviderRefused, RateLimited
from accounting.contract.usage_event import TokenUsage
from proxy import metrics
from proxy.metrics import CELLS, METRICS, ROW_BYTES, Counters, HostMetrics, LayoutError, create
from tests.proxy.test_settlement import event


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create(path := tmp_path / "metrics", 3)
    return path


def exposed(path: Path) -> dict[tuple[str, ...], float]:
    """What a scrape gives: name and label value, to figure."""
    registry = CollectorRegistry()
    registry.register(HostMetrics(path, 3))  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_file_is_private_and_a_page_per_worker(path: Path) -> None:
    assert path.stat().st_size // ROW_BYTES == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_settled_exchange_counts_once_everywhere(path: Path) -> None:
    one = msgspec.structs.replace(
        event(1, 60, 100), tokens=TokenUsage(10, 20), answer_bytes=500, overrun_ucr=7
    )
    Counters(path, 0).settled(one)
    Counters(path, 2).settled(msgspec.structs.replace(one, outcome="cut", settlement="void"))
    found = exposed(path)
    assert found["tollgate_requests_total", "completed"] == 1
    assert found["tollgate_requests_total", "cut"] == 1
    assert found["tollgate_requests_total", "client_left"] == 0
    assert found["tollgate_settlements_total", "exact"] == 1
    assert found["tollgate_settlements_total", "void"] == 1
    assert found["tollgate_charged_microcredits_total",] == 120
    assert found["tollgate_overrun_microcredits_total",] == 14
    assert found["tollgate_input_tokens_total",] == 20
    assert found["tollgate_output_tokens_total",] == 40
    assert found["tollgate_answer_bytes_total",] == 1000


@pytest.mark.parametrize("outcome", metrics.OUTCOMES)
@pytest.mark.parametrize("settlement", metrics.SETTLEMENTS)
def test_every_outcome_has_its_cell(path: Path, outcome: str, settlement: str) -> None:
    counters = Counters(path, 1)
    counters.settled(
        msgspec.structs.replace(event(1, 0, 0), outcome=outcome, settlement=settlement)
    )
    host = HostMetrics(path, 3)
    assert host.total("tollgate_requests", outcome) == 1
    assert host.total("tollgate_settlements", settlement) == 1


def test_failures_count_under_their_code_and_foreign_codes_together(path: Path) -> None:
    """A provider's own codes must not become labels."""
    counters = Counters(path, 0)
    counters.refused(InvalidKey())
    counters.refused(RateLimited())
    counters.refused(RateLimited())
    for number in range(50):
        counters.upstream_failed(ProviderRefused(400, "no", f"made_up_{number}", None))
    found = exposed(path)
    assert found["tollgate_refusals_total", "invalid_api_key"] == 1
    assert found["tollgate_refusals_total", "rate_limit_exceeded"] == 2
    assert found["tollgate_upstream_failures_total", "other"] == 50
    assert not any("made_up" in label for labels in found for label in labels)


def subclasses(kind: type[Failure]) -> set[type[Failure]]:
    return {kind} | {one for child in kind.__subclasses__() for one in subclasses(child)}


def test_every_failure_of_ours_has_its_code(path: Path) -> None:
    for kind in subclasses(Failure):
        assert ("tollgate_refusals", kind.code) in CELLS


def test_a_replaced_worker_goes_on_counting_but_starts_its_gauges_anew(path: Path) -> None:
    first = Counters(path, 0)
    first.add("tollgate_replayed_settles", 5)
    first.set("tollgate_connections", 9)
    del first
    second = Counters(path, 0)
    second.add("tollgate_replayed_settles")
    host = HostMetrics(path, 3)
    assert host.total("tollgate_replayed_settles") == 6
    assert host.total("tollgate_connections") == 0


def test_a_row_can_be_cleared_of_what_was_open_in_its_last_worker(path: Path) -> None:
    host = HostMetrics(path, 3)
    counters = Counters(path, 1)
    counters.add("tollgate_replayed_settles", 5)
    counters.set("tollgate_workers_ready", 1)
    assert not host.serves(1)
    counters.set("tollgate_gate_open", 1)
    assert host.serves(1) and not host.serves(0)
    host.clear_gauges(1)
    assert not host.serves(1) and host.total("tollgate_workers_ready") == 0
    assert host.total("tollgate_replayed_settles") == 5


def test_code_that_counts_other_things_does_not_count_there(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(LayoutError, match="stop and start the proxy"):
        Counters(path, 0)


def test_counts_of_other_processes_are_seen_and_survive_them(path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from proxy.metrics import Counters\n"
        "Counters(Path(sys.argv[1]), 1).add('tollgate_settle_refusals', 2**40); os._exit(9)\n"
    )
    host = HostMetrics(path, 3)
    subprocess.run([sys.executable, "-c", program, str(path)], timeout=30)
    assert host.total("tollgate_settle_refusals") == 2**40


def test_everything_declared_is_exposed_with_its_meaning(path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(HostMetrics(path, 3))  # type: ignore[arg-type]
    text = generate_latest(registry).decode()
    for metric in METRICS:
        assert f"{metric.meaning}\n" in text
        assert metric.name.startswith("tollgate_")
    assert len(exposed(path)) == len(CELLS)


def test_cells_do_not_overlap_and_fit_their_row() -> None:
    assert sorted(CELLS.values()) == list(range(len(CELLS)))
    assert len(CELLS) * 8 <= ROW_BYTES
