"""`python -m tests.fuzz MINUTES [SEED]`: every fuzz target again and again, each round anew.

A round runs all targets on one seed, printed before it; the first round is on SEED, so a
round that failed is repeated by its seed and no minutes. Ends 1 with the first failure.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EFFORT = "5"


def run_round(seed: int) -> int:
    """Every target once; the exit status of pytest."""
    command = [sys.executable, "-m", "pytest", "tests/fuzz", f"--hypothesis-seed={seed}", "-x"]
    environment = os.environ | {"FUZZ_EFFORT": EFFORT}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(minutes: float, seed: int) -> int:
    end = time.monotonic() + 60 * minutes
    while True:
        print(f"fuzz: seed {seed}", flush=True)
        if run_round(seed):
            print(f"fuzz: failed; again with: make chaos MINUTES=0 SEED={seed}")
            return 1
        if time.monotonic() >= end:
            return 0
        seed += 1


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = int(given[1]) if len(given) > 1 and given[1] else random.randrange(1_000_000_000)
    sys.exit(main(float(given[0]) if given else 5.0, chosen))
