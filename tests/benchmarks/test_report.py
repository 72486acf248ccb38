"""What a run is told as; and one short real run from the command line."""

import asyncio
import json
import sys
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from benchmarks import report, wrk
from benchmarks.__main__ import README, RESULTS
from benchmarks.catalogue import SCENARIOS
from benchmarks.load import LoadResult
from benchmarks.load_connection import Latencies
from benchmarks.load_request import target_for
from benchmarks.measures import Measurement, Plan, Subject
from benchmarks.nginx import nginx_path
from benchmarks.processes import free_port, is_answering
from benchmarks.scenarios import chat_body


def measured(subject: str, repetition: int, cpu: float, **more: float) -> Measurement:
    times = Latencies(10, 1.0, 2.0, 3.0, 4.0)
    result = LoadResult(2.0, 1000 * (repetition + 1), 0, 5, {}, times, times, None, 0, Decimal(0))
    per_unit = {subject: cpu, "load": 9.0, **more}
    return Measurement(subject, repetition, "own", result, {}, per_unit)


def test_medians_spreads_and_the_factor_over_nginx():
    runs = [measured("nginx", i, cpu) for i, cpu in enumerate((20.0, 22.0, 30.0))]
    runs += [measured("ours", i, cpu, redis=2.0) for i, cpu in enumerate((44.0, 40.0, 50.0))]
    made = report.report_of(SCENARIOS["rate"], Plan(), runs)
    nginx, ours = made.subjects
    assert nginx.cpu_us_per_unit["nginx"] == report.Spread(22.0, 20.0, 30.0)
    assert (nginx.times_baseline, ours.times_baseline) == (1.0, 2.0)
    assert ours.units_per_second == report.Spread(1000.0, 500.0, 1500.0)
    lines = report.table(made).splitlines()
    assert lines[-1].startswith("| ours | 1,000 (500.0–1,500) | 44.0 (40.0–50.0) | 2.00 |")
    assert "redis µs" in lines[2]
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_further_figures_are_columns_and_the_audit_is_told():
    runs = [measured("nginx", 0, 20.0)]
    runs += [
        msgspec.structs.replace(measured("ours", 0, 44.0), figures={"lag s": lag})
        for lag in (0.5, 1.5, 1.0)
    ]
    made = report.report_of(SCENARIOS["rate"], Plan(), runs, "clean")
    assert made.subjects[1].figures == {"lag s": report.Spread(1.0, 0.5, 1.5)}
    lines = report.table(made).splitlines()
    assert lines[2].endswith("| errors | lag s |")
    assert lines[-3].endswith("| 0 | – |")
    assert lines[-2].endswith("| 0 | 1.00 (0.50–1.50) |")
    assert lines[-1] == "audit: clean"


def test_one_measurement_has_no_spread():
    assert str(report.Spread(1234.5, 1234.5, 1234.5)) == "1,234"


def test_without_nginx_there_is_no_factor():
    made = report.report_of(SCENARIOS["rate"], Plan(), [measured("ours", 0, 5.0)])
    assert made.subjects[0].times_baseline is None


def test_saved_reports_are_json(tmp_path):
    made = report.report_of(SCENARIOS["rate"], Plan(), [measured("ours", 0, 5.0)])
    saved = json.loads(report.save(made, tmp_path / "new").read_bytes())
    assert saved["scenario"] == "rate"
    assert saved["measurements"][0]["result"]["requests"] == 1000
    assert saved["machine"]["processor"]


def test_quoted_figures_replace_the_last_ones(tmp_path):
    for cpu in (5.0, 6.0):
        made = report.report_of(SCENARIOS["rate"], Plan(), [measured("ours", 0, cpu)])
        assert report.save(made, tmp_path, quoted=True) == tmp_path / "quoted-rate.json"
    saved = json.loads((tmp_path / "quoted-rate.json").read_bytes())
    assert saved["subjects"][0]["cpu_us_per_unit"]["ours"]["median"] == 6.0


def test_the_readme_quotes_what_the_committed_results_say():
    made = report.quoted(RESULTS, list(SCENARIOS))
    assert f"{report.QUOTE_MARK}\n{made}\n{report.QUOTE_MARK}" in README.read_text()
    assert "| rate (requests) | tollgate |" in made


def test_quoting_replaces_what_was_quoted(tmp_path):
    text = tmp_path / "text.md"
    text.write_text(f"a\n{report.QUOTE_MARK}\nold\n{report.QUOTE_MARK}\nz\n")
    report.quote_in(text, "| new |")
    report.quote_in(text, "| newer |")
    assert text.read_text() == f"a\n{report.QUOTE_MARK}\n| newer |\n{report.QUOTE_MARK}\nz\n"


@pytest.mark.parametrize("stream", [False, True])
def test_requests_are_one_kilobyte(stream):
    body = chat_body(Subject("s", "http://h/v1"), "chunks=5", stream)
    assert 1000 <= len(msgspec.json.encode(body)) <= 1030
    assert body["messages"][0]["content"].endswith("[[standin chunks=5]]")


@pytest.mark.skipif(not wrk.is_installed(), reason="wrk is not installed")
async def test_wrk_sends_the_same_request_and_its_figures_are_read(provider):
    body = {"model": "m", "messages": [{"role": "user", "content": 'a "quoted" 漢字 [[x]]\\'}]}
    result = await wrk.run(target_for(provider.base_url, body, "key"), 2, 1, None)
    assert 0 < result.requests <= provider.served
    assert (result.errors, result.latency_ms.count) == ({}, result.requests)
    seen = provider.requests[0]
    assert (seen.path, json.loads(seen.body)) == ("/v1/chat/completions", body)
    assert seen.headers["authorization"] == "Bearer key"


def test_wrk_that_fails_says_why():
    with pytest.raises(RuntimeError, match="unable to connect"):
        wrk.result_in("unable to connect to 127.0.0.1:1\n")


@pytest.mark.processes
async def test_a_short_run_of_everything_but_the_product(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "all", "--repetitions", "1", "--seconds", "0.2"),
        *("--warmup", "0", "--concurrency", "4", "--client", "own", "--results", str(tmp_path)),
        "--no-tollgate",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(120):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    runs = saved_in(tmp_path)
    there = [Subject("direct", "http://h/v1")]
    there += [Subject("nginx", "http://h/v1", serving=[1])] if nginx_path() else []
    wanted = {
        scenario.name: [one.name for one in there if scenario.takes(one)]
        for scenario in SCENARIOS.values()
    }
    assert len(runs.pop("micro")["steps"]) > 10
    assert set(runs) == {name for name, subjects in wanted.items() if subjects}
    for name, run in runs.items():
        assert [subject["subject"] for subject in run["subjects"]] == wanted[name]
        assert all(subject["errors"] == 0 for subject in run["subjects"]), (name, run)
        assert all(one["result"]["requests_total"] > 0 for one in run["measurements"]), name
    assert [path.suffix for path in listed(tmp_path, "cpu-*")] == [".svg"]


def saved_in(results: Path) -> dict[str, dict]:
    runs = [json.loads(path.read_bytes()) for path in listed(results, "*.json")]
    return {run["scenario"]: run for run in runs}


def listed(results: Path, pattern: str) -> list[Path]:
    return sorted(results.glob(pattern))


async def test_a_gateway_is_started_measured_and_its_parts_counted_apart(tmp_path):
    port = free_port()
    command = f"{sys.executable} -m benchmarks.provider --listen 127.0.0.1:{port} --workers 2"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", "burst", "--repetitions", "1", "--seconds", "0.1"),
        *("--warmup", "0", "--concurrency", "2", "--no-direct", "--no-nginx"),
        *(
            "--no-tollgate",
            "--gateway-name",
            "ours",
            "--gateway-url",
            f"http://127.0.0.1:{port}/v1",
        ),
        *("--gateway-command", command, "--gateway-environment", "UPSTREAM={provider}"),
        *("--also", "worker=--workers 2", "--results", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    saved = saved_in(tmp_path)["burst"]
    (ours,) = saved["subjects"]
    assert ours["subject"] == "ours"
    assert set(ours["cpu_us_per_unit"]) == {"ours", "worker", "provider", "load"}
    assert ours["cpu_us_per_unit"]["worker"]["median"] > 0
    assert not is_answering(f"http://127.0.0.1:{port}/v1/models")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "invalid choice"),
        (["rate", "--gateway-url", "http://127.0.0.1:9/v1"], "--gateway-pid"),
        (
            [
                *(
                    "rate",
                    "--no-direct",
                    "--no-nginx",
                    "--no-tollgate",
                    "--gateway-url",
                    "http://127.0.0.1:9/v1",
                ),
                *("--gateway-command", "false"),
            ],
            "does not answer",
        ),
    ],
)
async def test_what_cannot_run_says_so_in_one_line(arguments, words):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        output = (await process.communicate())[0].decode()
    assert process.returncode != 0
    assert words in output
    assert "Traceback" not in output
