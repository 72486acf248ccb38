"""The product itself as a subject: it starts, is loaded with every limit on, and balances."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks.product import LIMITS

pytestmark = pytest.mark.processes


async def bench(results: Path, *arguments: str) -> tuple[str, dict[str, dict]]:
    """A run from the command line: what it said, and each report it saved."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", *arguments, "--results", str(results)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(240):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output, saved_in(results)


def saved_in(results: Path) -> dict[str, dict]:
    runs = [json.loads(path.read_bytes()) for path in results.glob("*.json")]
    return {run["scenario"]: run for run in runs}


def ours(run: dict) -> dict:
    return next(one for one in run["subjects"] if one["subject"] == "tollgate")


async def test_tollgate_is_measured_with_its_parts_apart_and_its_books_clean(tmp_path):
    output, runs = await bench(
        tmp_path,
        *("rate", "--repetitions", "1", "--seconds", "1", "--warmup", "0"),
        *("--concurrency", "4", "--client", "own"),
    )
    run = runs["rate"]
    subject = ours(run)
    assert (run["audit"], subject["errors"]) == ("clean", 0)
    cpu = subject["cpu_us_per_unit"]
    assert set(cpu) == {"tollgate", "redis", "provider", "load"}
    assert all(spread["median"] > 0 for spread in cpu.values())
    assert set(subject["figures"]) == {
        "accounting lag s",
        "accounting µs/event",
        "postgres µs/event",
    }
    assert "audit: clean" in output


def test_every_limit_of_the_key_is_on():
    from admin_api.operator.keys import NewLimits

    others = {"allowed_models", "expires_at"}
    assert set(LIMITS) == set(NewLimits.__struct_fields__) - others
