"""The product itself as a subject: it starts, is loaded with every limit on, and balances."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks.catalogue import SCENARIOS
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


async def test_every_scenario_runs_on_tollgate_without_an_error_and_its_books_are_clean(tmp_path):
    output, runs = await bench(
        tmp_path,
        *("all", "--no-direct", "--no-nginx", "--repetitions", "1", "--seconds", "0.5"),
        *("--warmup", "0", "--concurrency", "16", "--client", "own"),
    )
    assert {step["name"] for step in runs.pop("micro")["steps"]} > {"parse head", "price"}
    assert set(runs) == set(SCENARIOS) - {"backlog"}
    for name, run in runs.items():
        assert (run["audit"], ours(run)["errors"]) == ("clean", 0), name
        cpu = ours(run)["cpu_us_per_unit"]
        assert set(cpu) == {"tollgate", "redis", "provider", "load"}
        assert cpu["tollgate"]["median"] > 0
        assert {"accounting lag s", "accounting µs/event", "postgres µs/event"} <= set(
            ours(run)["figures"]
        )
    figures = {name: medians(run) for name, run in runs.items()}
    assert figures["open-streams"]["missed events"] == 0
    assert figures["open-streams"]["streams"] == 16
    assert figures["mixed"]["left"] > 0
    assert figures["mixed"]["faults"] > 0
    assert figures["mixed"]["held $ after"] == 0
    assert figures["big-prompts"]["peak MB"] > 0
    assert figures["redis-hot"]["requests/s per Redis core"] > 0
    assert figures["accounting"]["backlog events"] > 0
    assert "audit: clean" in output


def medians(run: dict) -> dict[str, float]:
    return {name: spread["median"] for name, spread in ours(run)["figures"].items()}


def test_every_limit_of_the_key_is_on():
    from admin_api.operator.keys import NewLimits

    others = {"allowed_models", "expires_at"}
    assert set(LIMITS) == set(NewLimits.__struct_fields__) - others
