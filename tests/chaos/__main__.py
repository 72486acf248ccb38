"""`python -m tests.chaos MINUTES [SEED]`: search for faults at random, step after step.

First the whole product under load and faults, then every fuzz target again and again. A step
that fails ends it with status 1, and the seed to do it again.
"""

import asyncio
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from tests.chaos import report
from tests.chaos.run import Run
from tests.fuzz.__main__ import main as fuzz

SHARE = 0.75  # of the time; starting, coming to rest and auditing come on top


def strike(minutes: float, seed: int) -> int:
    """Chaos; 0 if every promise was kept. In no time nothing is done."""
    if not minutes:
        return 0
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    run = Run(folder, seed)
    print(f"chaos: seed {seed}", flush=True)
    try:
        asyncio.run(run.run(60 * minutes))
    except Exception as error:  # whatever stopped it: the seed and the story are needed
        run.wrong.append(f"stopped: {error!r}")
        traceback.print_exception(error)
    for line in report.lines(run):
        print(line)
    if not run.wrong:
        shutil.rmtree(folder)
        return 0
    (folder / "story").write_text("\n".join([*run.injector.story, *run.wrong]))
    print(f"chaos: failed; the same faults again with SEED={seed}; logs and story: {folder}")
    return 1


STEPS = [(strike, SHARE), (fuzz, 1 - SHARE)]


def main(minutes: float, seed: int) -> int:
    for step, share in STEPS:
        if status := step(minutes * share, seed):
            print(f"make chaos: failed; it was MINUTES={minutes:g} SEED={seed}")
            return status
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = int(given[1]) if len(given) > 1 and given[1] else random.randrange(1_000_000_000)
    sys.exit(main(float(given[0]) if given else 5.0, chosen))
