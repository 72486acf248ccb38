"""`python -m benchmarks <scenario>`: one run, direct, through nginx and through gateways.

Owns the command line and the order of a run. Every repetition measures all subjects in
turn, so that what the machine does meanwhile meets all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from benchmarks import processes, report
from benchmarks.processes import Cores, ProcessFailure
from benchmarks.scenarios import SCENARIOS, Measurement, Plan, Subject

RESULTS = Path(__file__).parent / "results"
PROVIDER_PLACE = "{provider}"


def main() -> None:
    """Run; exit status 1 with one line if something does not start or stands still."""
    options = parsed_options()
    try:
        uvloop.run(run(options))
    except (ProcessFailure, TimeoutError, OSError, RuntimeError) as problem:
        sys.exit(f"benchmark failed: {problem}")
    except asyncio.CancelledError:
        sys.exit("stopped")


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("scenario", choices=[*SCENARIOS, "all"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measured window")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before each window")
    parser.add_argument("--concurrency", type=int, default=0, help="default: the scenario's own")
    parser.add_argument("--client", choices=["auto", "wrk", "own"], default="auto")
    parser.add_argument("--provider-listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--no-pin", action="store_true", help="let the kernel choose cores")
    parser.add_argument("--no-direct", action="store_true")
    parser.add_argument("--no-nginx", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    gateway = parser.add_argument_group("a gateway whose upstream is the stand-in provider")
    gateway.add_argument("--gateway-name", default="gateway")
    gateway.add_argument("--gateway-url", help="its base URL, ending in /v1")
    gateway.add_argument("--gateway-key", default="none")
    gateway.add_argument("--gateway-model", default="sandbox")
    gateway.add_argument("--gateway-pid", type=int, action="append", default=[])
    gateway.add_argument("--gateway-command", help="start it with this; {provider} is put in")
    gateway.add_argument("--gateway-environment", action="append", default=[], metavar="K=V")
    gateway.add_argument("--gateway-ready-url", help="answers when it is up; default URL/models")
    gateway.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=PID|WORD",
        help="count these processes apart: an id, or a word of a command line below the gateway",
    )
    options = parser.parse_args()
    if options.gateway_url and not (options.gateway_pid or options.gateway_command):
        parser.error("--gateway-url needs --gateway-pid or --gateway-command")
    if any("=" not in pair for pair in (*options.also, *options.gateway_environment)):
        parser.error("--also and --gateway-environment take NAME=VALUE")
    return options


async def run(options: argparse.Namespace) -> None:
    """Start everything, measure, print, save."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    cores = processes.choose_cores(pin=not options.no_pin)
    if cores.load is not None:
        os.sched_setaffinity(0, {cores.load})
    plan = Plan(
        options.repetitions,
        options.seconds,
        options.warmup,
        options.concurrency,
        options.client,
        cores.load,
    )
    async with contextlib.AsyncExitStack() as stack:
        provider, provider_url = await stack.enter_async_context(
            processes.start_provider(options.provider_listen, cores.load)
        )
        subjects = [subject async for subject in subjects_of(options, provider_url, cores, stack)]
        names = list(SCENARIOS) if options.scenario == "all" else [options.scenario]
        for name in names:
            measured = await measure_all(name, plan, subjects, {"provider": [provider.pid]})
            made = report.report_of(SCENARIOS[name], plan, measured)
            print(report.table(made))
            print(f"saved {report.save(made, options.results)}\n", flush=True)


async def measure_all(
    name: str, plan: Plan, subjects: list[Subject], others: dict[str, list[int]]
) -> list[Measurement]:
    """Every repetition of a scenario on every subject, in turn."""
    measured = []
    for repetition in range(plan.repetitions):
        for subject in subjects:
            print(f"{name} {repetition + 1}/{plan.repetitions} {subject.name}", file=sys.stderr)
            measured.append(await SCENARIOS[name].measure(subject, plan, repetition, others))
    return measured


async def subjects_of(
    options: argparse.Namespace,
    provider_url: str,
    cores: Cores,
    stack: contextlib.AsyncExitStack,
) -> AsyncIterator[Subject]:
    """The ways to measure, started as needed; what is started ends with `stack`."""
    if not options.no_direct:
        yield Subject("direct", provider_url)
    if not options.no_nginx and processes.nginx_path():
        nginx, url = await stack.enter_async_context(
            processes.start_nginx(urlsplit(provider_url).netloc, cores.subject)
        )
        yield Subject("nginx", url, groups={"nginx": [nginx.pid]})
    if options.gateway_url:
        yield await gateway_subject(options, provider_url, cores, stack)


async def gateway_subject(
    options: argparse.Namespace,
    provider_url: str,
    cores: Cores,
    stack: contextlib.AsyncExitStack,
) -> Subject:
    """The gateway of the command line: started if it has a command, pinned, its groups found."""
    pids = list(options.gateway_pid)
    if options.gateway_command:
        command = options.gateway_command.replace(PROVIDER_PLACE, provider_url)
        pairs = (pair.partition("=") for pair in options.gateway_environment)
        environment = {k: v.replace(PROVIDER_PLACE, provider_url) for k, _, v in pairs}
        started = await stack.enter_async_context(
            processes.start_gateway(
                shlex.split(command),
                environment,
                options.gateway_ready_url or f"{options.gateway_url}/models",
                cores.subject,
            )
        )
        pids.append(started.pid)
    groups = {options.gateway_name: pids} | extra_groups(options.also, pids)
    apart = {pid for name, roots in groups.items() if name != options.gateway_name for pid in roots}
    processes.pin_tree(pids, cores.subject, leave_out=apart)
    processes.pin_tree(apart, cores.load)
    return Subject(
        options.gateway_name,
        options.gateway_url,
        options.gateway_key,
        options.gateway_model,
        groups,
    )


def extra_groups(pairs: list[str], gateway: list[int]) -> dict[str, list[int]]:
    """The process groups of `--also`; raises `ProcessFailure` if a word finds none."""
    groups = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        roots = [int(value)] if value.isdigit() else processes.named_in_tree(gateway, value)
        if not roots:
            raise ProcessFailure(f"no process below the gateway is called {value!r}")
        groups[name] = roots
    return groups


if __name__ == "__main__":
    main()
