"""What a run is told as: medians with their spread, a table, a JSON file.

Owns figures derived from measurements, and their wording. Pure but for `save`.
"""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import sysconfig
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from accounting.contract.settings import load
from benchmarks.measures import NGINX as BASELINE
from benchmarks.measures import Measurement, Plan, Scenario
from benchmarks.micro import Timed
from benchmarks.nginx import nginx_path
from proxy import compiled

QUOTE_MARK = "<!-- quoted figures -->"


class Spread(msgspec.Struct, frozen=True):
    """Median, least and greatest of the repetitions."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return figure(self.median)
        return f"{figure(self.median)} ({figure(self.low)}–{figure(self.high)})"


class Summary(msgspec.Struct, frozen=True):
    """One subject over all repetitions. `times_baseline` is CPU over nginx's in the same run."""

    subject: str
    units_per_second: Spread
    cpu_us_per_unit: dict[str, Spread]
    times_baseline: float | None
    latency_p50_ms: Spread | None
    latency_p99_ms: Spread | None
    errors: int
    figures: dict[str, Spread] = {}


class Report(msgspec.Struct, frozen=True):
    """Everything of one run."""

    scenario: str
    summary: str
    unit: str
    at: datetime
    machine: dict[str, str]
    plan: Plan
    subjects: list[Summary]
    measurements: list[Measurement]
    audit: str = ""


def report_of(
    scenario: Scenario, plan: Plan, measurements: Sequence[Measurement], audit: str = ""
) -> Report:
    """The report of one run; subjects in the order in which they were first measured."""
    names = list(dict.fromkeys(measured.subject for measured in measurements))
    grouped = {n: [m for m in measurements if m.subject == n] for n in names}
    baseline = own_cpu(BASELINE, grouped.get(BASELINE, []))
    return Report(
        scenario=scenario.name,
        summary=scenario.summary,
        unit=scenario.unit,
        at=datetime.now(UTC),
        machine=machine(),
        plan=plan,
        subjects=[summary_of(scenario.unit, n, grouped[n], baseline) for n in names],
        measurements=list(measurements),
        audit=audit,
    )


def own_cpu(name: str, measured: Sequence[Measurement]) -> float | None:
    """Median CPU per unit of the subject's own process group."""
    values = [m.cpu_us_per_unit[name] for m in measured if name in m.cpu_us_per_unit]
    return statistics.median(values) if values else None


def summary_of(
    unit: str, name: str, measured: Sequence[Measurement], baseline: float | None
) -> Summary:
    """One subject's medians."""
    own = own_cpu(name, measured)
    rates = [
        (m.result.requests if unit == "request" else m.result.chunks) / m.result.seconds
        for m in measured
    ]
    taken = [m.result.latency_ms if unit == "request" else m.result.chunk_age_ms for m in measured]
    known = [latencies for latencies in taken if latencies is not None]
    return Summary(
        subject=name,
        units_per_second=spread(rates),
        cpu_us_per_unit={
            group: spread([m.cpu_us_per_unit[group] for m in measured])
            for group in measured[0].cpu_us_per_unit
        },
        times_baseline=round(own / baseline, 2) if own and baseline else None,
        latency_p50_ms=spread([latencies.p50 for latencies in known]) if known else None,
        latency_p99_ms=spread([latencies.p99 for latencies in known]) if known else None,
        errors=sum(sum(m.result.errors.values()) for m in measured),
        figures={name: spread([m.figures[name] for m in measured]) for name in measured[0].figures},
    )


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3))


def figure(value: float) -> str:
    """A number with as many digits as it means."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(report: Report) -> str:
    """The report as a Markdown table with a line about how it was made."""
    plan, unit = report.plan, report.unit
    extra = list(
        dict.fromkeys(
            group
            for subject in report.subjects
            for group in subject.cpu_us_per_unit
            if group != subject.subject
        )
    )
    figures = list(dict.fromkeys(name for subject in report.subjects for name in subject.figures))
    what = "answer" if unit == "request" else "age of a chunk"
    titles = [
        "path",
        f"{unit}s/s",
        f"CPU µs/{unit}",
        f"× {BASELINE}",
        *(f"{group} µs" for group in extra),
        f"{what} p50 ms",
        "p99 ms",
        "errors",
        *figures,
    ]
    lines = [titles, ["---"] * len(titles)]
    lines += [row(subject, extra, figures) for subject in report.subjects]
    head = (
        f"{report.scenario}: {report.summary}; {plan.repetitions} × {plan.seconds:g} s, "
        f"median (min–max)\n{report.machine['processor']}, {report.machine['python']}\n"
    )
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return head + body + (f"\naudit: {report.audit}" if report.audit else "")


def row(subject: Summary, extra: Sequence[str], figures: Sequence[str]) -> list[str]:
    """One subject's cells."""
    cpu = subject.cpu_us_per_unit
    return [
        subject.subject,
        str(subject.units_per_second),
        str(cpu.get(subject.subject, "–")),
        "–" if subject.times_baseline is None else f"{subject.times_baseline:.2f}",
        *(figure(cpu[group].median) if group in cpu else "–" for group in extra),
        "–" if subject.latency_p50_ms is None else str(subject.latency_p50_ms),
        "–" if subject.latency_p99_ms is None else str(subject.latency_p99_ms),
        str(subject.errors),
        *(str(subject.figures.get(name, "–")) for name in figures),
    ]


class MicroReport(msgspec.Struct, frozen=True):
    """The hot steps of one run, in µs of CPU each."""

    at: datetime
    machine: dict[str, str]
    steps: list[Timed]
    scenario: str = "micro"


def micro_report(steps: list[Timed]) -> MicroReport:
    """The report of steps just timed."""
    return MicroReport(datetime.now(UTC), machine(), steps)


def save(report: Report | MicroReport, folder: Path, quoted: bool = False) -> Path:
    """Write the report as JSON into `folder`; gives the file.

    `quoted`: under the name that stands for the figures quoted in texts, over the last ones.
    """
    data = msgspec.json.format(msgspec.json.encode(report), indent=1)
    return write(folder, report.scenario, report.at, "json", data + b"\n", quoted)


def write(folder: Path, name: str, at: datetime, suffix: str, data: bytes, quoted: bool) -> Path:
    """A file of results."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"quoted-{name}" if quoted else f"{name}-{at:%Y%m%dT%H%M%SZ}"
    path = folder / f"{stem}.{suffix}"
    path.write_bytes(data)
    return path


def quoted(folder: Path, scenarios: Sequence[str]) -> str:
    """The quoted reports of `folder` as one Markdown table, for texts."""
    paths = [folder / f"quoted-{name}.json" for name in scenarios]
    reports = [
        msgspec.json.decode(path.read_bytes(), type=Report) for path in paths if path.exists()
    ]
    titles = ["scenario", "path", "per second", "CPU µs per unit", "× nginx", "Redis µs"]
    titles += ["p50 ms", "p99 ms", "more"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles))]
    lines += [quoted_row(report, one) for report in reports for one in report.subjects]
    return "\n".join(lines)


def quote_in(text: Path, made: str) -> None:
    """Put the table of quoted figures between its marks in a text."""
    before, _, rest = text.read_text().partition(QUOTE_MARK)
    _, _, after = rest.partition(QUOTE_MARK)
    text.write_text(f"{before}{QUOTE_MARK}\n{made}\n{QUOTE_MARK}{after}")


def quoted_row(report: Report, one: Summary) -> str:
    """One subject of one quoted report."""
    cpu = one.cpu_us_per_unit
    figures = [f"{name} {spread.median:,g}" for name, spread in one.figures.items()]
    cells = [
        f"{report.scenario} ({report.unit}s)",
        one.subject,
        str(one.units_per_second),
        str(cpu.get(one.subject, "–")),
        "–" if one.times_baseline is None else f"{one.times_baseline:.2f}",
        figure(cpu["redis"].median) if "redis" in cpu else "–",
        "–" if one.latency_p50_ms is None else figure(one.latency_p50_ms.median),
        "–" if one.latency_p99_ms is None else figure(one.latency_p99_ms.median),
        ", ".join(figures),
    ]
    return "| " + " | ".join(cells) + " |"


def machine() -> dict[str, str]:
    """What the figures depend on: processor, kernel, interpreter and its build, versions."""
    arguments = sysconfig.get_config_var("CONFIG_ARGS") or ""
    optimised = "optimised" if "--enable-optimizations" in arguments else "not declared optimised"
    form = "compiled" if compiled.environment(load().compiled) else "interpreted"
    nginx = nginx_path()
    return {
        "processor": processor(),
        "kernel": platform.release(),
        "python": f"CPython {platform.python_version()} ({optimised}), hot path {form}",
        "nginx": said_by([nginx, "-v"]) if nginx else "",
        "commit": said_by(["git", "rev-parse", "HEAD"]) if shutil.which("git") else "",
    }


def processor() -> str:
    """The processor's name and how many cores this machine has."""
    text = Path("/proc/cpuinfo").read_text()
    names = [
        li.partition(":")[2].strip() for li in text.splitlines() if li.startswith("model name")
    ]
    name = names[0] if names else platform.machine()
    return f"{name}, {text.count('processor')} cores"


def said_by(command: Sequence[str]) -> str:
    """The first line a command prints, on whichever stream; empty if it prints nothing."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return ((done.stdout or done.stderr).splitlines() or [""])[0]
