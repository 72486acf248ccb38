"""What is measured: direct, nginx, Tollgate itself, any other gateway; started and pinned.

Owns the meaning of the command line's options about subjects. What is started ends with the
stack it was given.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from benchmarks import kernel, nginx, processes, product
from benchmarks.measures import DIRECT, NGINX, TOLLGATE, Subject
from benchmarks.processes import Cores, ProcessFailure

PROVIDER_PLACE = "{provider}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options about subjects."""
    parser.add_argument("--workers", type=int, default=1, help="of nginx and of Tollgate")
    parser.add_argument("--no-direct", action="store_true")
    parser.add_argument("--no-nginx", action="store_true")
    parser.add_argument("--no-tollgate", action="store_true")
    gateway = parser.add_argument_group("another gateway whose upstream is the stand-in provider")
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


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with a usage message if the options contradict each other."""
    if options.gateway_url and not (options.gateway_pid or options.gateway_command):
        parser.error("--gateway-url needs --gateway-pid or --gateway-command")
    if any("=" not in pair for pair in (*options.also, *options.gateway_environment)):
        parser.error("--also and --gateway-environment take NAME=VALUE")


async def subjects_of(
    options: argparse.Namespace,
    provider_url: str,
    cores: Cores,
    stack: contextlib.AsyncExitStack,
) -> AsyncIterator[Subject]:
    """The ways to measure, started as needed; what is started ends with `stack`."""
    if not options.no_direct:
        yield Subject(DIRECT, provider_url)
    if not options.no_nginx and nginx.nginx_path():
        started, url = await stack.enter_async_context(
            nginx.start_nginx(urlsplit(provider_url).netloc, cores.subject, options.workers)
        )
        serving = sorted(kernel.tree_of([started.pid]) - {started.pid})
        yield Subject(NGINX, url, groups={NGINX: [started.pid]}, serving=serving)
    if not options.no_tollgate:
        ours = await stack.enter_async_context(
            product.start_tollgate(provider_url, cores, options.workers)
        )
        yield Subject(
            TOLLGATE, ours.base_url, ours.key, product.MODEL, ours.groups, ours.worker, ours
        )
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
    kernel.pin_tree(pids, cores.subject, leave_out=apart)
    kernel.pin_tree(apart, cores.load)
    return Subject(
        options.gateway_name,
        options.gateway_url,
        options.gateway_key,
        options.gateway_model,
        groups,
        sorted(kernel.tree_of(pids, leave_out=apart)),
    )


def extra_groups(pairs: list[str], gateway: list[int]) -> dict[str, list[int]]:
    """The process groups of `--also`; raises `ProcessFailure` if a word finds none."""
    groups = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        roots = [int(value)] if value.isdigit() else kernel.named_in_tree(gateway, value)
        if not roots:
            raise ProcessFailure(f"no process below the gateway is called {value!r}")
        groups[name] = roots
    return groups
