"""`python -m benchmarks <scenario>`: one run, direct, through nginx and through Tollgate.

Owns the command line and the order of a run. Every repetition measures all subjects in
turn, so that what the machine does meanwhile meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import uvloop

from benchmarks import catalogue, chart, kernel, micro, processes, report, subjects
from benchmarks.measures import Measurement, Plan, Scenario, Subject
from benchmarks.processes import Cores, ProcessFailure
from benchmarks.report import Report

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
MICRO, QUOTED = "micro", "quoted"


def main() -> None:
    """Run; exit status 1 with one line if something does not start, stands still or drifts."""
    options = parsed_options()
    if options.scenario == QUOTED:
        made = report.quoted(options.results, list(catalogue.SCENARIOS))
        print(made)
        report.quote_in(README, made)
        return
    try:
        clean = uvloop.run(run(options))
    except (ProcessFailure, TimeoutError, OSError, RuntimeError) as problem:
        sys.exit(f"benchmark failed: {problem}")
    except asyncio.CancelledError:
        sys.exit("stopped")
    if not clean:
        sys.exit("the audit found drift")


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("scenario", choices=[*catalogue.NAMES, MICRO, QUOTED])
    parser.add_argument("--repetitions", type=int, help="default: the scenario's own")
    parser.add_argument("--seconds", type=float, help="of each measured window")
    parser.add_argument("--warmup", type=float, help="seconds before each window")
    parser.add_argument("--concurrency", type=int, default=0, help="default: the scenario's own")
    parser.add_argument("--client", choices=["auto", "wrk", "own"], default="auto")
    parser.add_argument("--provider-listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--no-pin", action="store_true", help="let the kernel choose cores")
    parser.add_argument("--quote", action="store_true", help="save as the quoted figures")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    subjects.add_options(parser)
    options = parser.parse_args()
    subjects.check_options(parser, options)
    return options


async def run(options: argparse.Namespace) -> bool:
    """Start everything, measure, print, save; whether the books were clean."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    kernel.raise_open_files()
    cores = processes.choose_cores(pin=not options.no_pin)
    if cores.load is not None:
        os.sched_setaffinity(0, {cores.load})
    made = [] if options.scenario == MICRO else await run_scenarios(options, cores)
    if options.scenario in (MICRO, "all"):
        await run_micro(options)
    drawn = chart.draw(made)
    if drawn:
        at = made[0].at
        place = report.write(options.results, "cpu", at, "svg", drawn.encode(), options.quote)
        print(f"saved {place}")
    return all(one.audit in ("", "clean") for one in made)


async def run_scenarios(options: argparse.Namespace, cores: Cores) -> list[Report]:
    """Everything that is started, and each scenario in turn."""
    made = []
    async with contextlib.AsyncExitStack() as stack:
        provider, provider_url = await stack.enter_async_context(
            processes.start_provider(options.provider_listen, cores.load)
        )
        found = [
            subject async for subject in subjects.subjects_of(options, provider_url, cores, stack)
        ]
        for scenario in catalogue.named(options.scenario):
            ours = [subject for subject in found if scenario.takes(subject)]
            if ours:
                plan = plan_of(scenario, options, cores)
                made.append(await run_scenario(scenario, plan, ours, provider.pid))
                print(report.table(made[-1]))
                print(
                    f"saved {report.save(made[-1], options.results, options.quote)}\n", flush=True
                )
            else:
                print(f"{scenario.name}: nothing to measure with these options", file=sys.stderr)
    return made


async def run_scenario(
    scenario: Scenario, plan: Plan, found: list[Subject], provider: int
) -> Report:
    """Measure one scenario, then audit."""
    measured = await measure_all(scenario, plan, found, {"provider": [provider]})
    audits = [await subject.product.audit() for subject in found if subject.product is not None]
    return report.report_of(scenario, plan, measured, "; ".join(audits))


async def run_micro(options: argparse.Namespace) -> None:
    """The hot steps, one by one."""
    steps = await micro.run()
    print(micro.table(steps))
    saved = report.save(report.micro_report(steps), options.results, options.quote)
    print(f"saved {saved}\n", flush=True)


def plan_of(scenario: Scenario, options: argparse.Namespace, cores: Cores) -> Plan:
    """The command line's figures over the scenario's own."""

    def chosen(given: float | None, own: float) -> float:
        return own if given is None else given

    return Plan(
        int(chosen(options.repetitions, scenario.repetitions)),
        chosen(options.seconds, scenario.seconds),
        chosen(options.warmup, scenario.warmup_seconds),
        options.concurrency,
        options.client,
        cores.load,
        cores.subject,
    )


async def measure_all(
    scenario: Scenario, plan: Plan, found: list[Subject], others: dict[str, list[int]]
) -> list[Measurement]:
    """Every repetition of a scenario on every subject, in turn."""
    measured = []
    for repetition in range(plan.repetitions):
        for subject in found:
            said = f"{scenario.name} {repetition + 1}/{plan.repetitions} {subject.name}"
            print(said, file=sys.stderr, flush=True)
            measured.append(await scenario.measure(subject, plan, repetition, others))
    return measured


if __name__ == "__main__":
    main()
