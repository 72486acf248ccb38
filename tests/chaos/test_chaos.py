"""A short run of chaos, always the same faults; and a schedule is its seed's alone."""

from itertools import islice
from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.faults import DECK, FORGETFUL, LASTING, Fault, schedule
from tests.chaos.run import Run

SEED = 39
SECONDS = 12.0


@pytest.mark.processes
async def test_no_promise_is_broken_while_parts_are_killed_and_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, SEED, brief=True)
    await run.run(SECONDS)
    told = "\n".join([*report.lines(run), *run.injector.story])
    assert not run.wrong, told
    assert run.injector.struck and run.noted.counts["whole"] and run.books.charged_ucr, told


def first(seed: int, count: int, brief: bool = False) -> list[Fault]:
    return list(islice(schedule(seed, brief), count))


def test_a_seed_gives_the_same_faults_again() -> None:
    assert first(1, 100) == first(1, 100) != first(2, 100)
    kinds = [fault.kind for fault in first(1, sum(DECK.values()))]
    assert {kind: kinds.count(kind) for kind in DECK} == DECK
    assert all(fault.alone for fault in first(1, 100) if fault.kind in FORGETFUL)
    assert not LASTING & {fault.kind for fault in first(1, 100, brief=True)}
