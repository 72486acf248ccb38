"""The processes of a benchmark: started on their cores, waited for, ended.

Owns starting and stopping (stand-in, any gateway) and the choice of cores. Leaves nginx to
`nginx`, Tollgate itself to `product`, CPU and memory to `kernel`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernel import pin_tree

STOP_SECONDS = 15.0
POLL_SECONDS = 0.02


class Cores(NamedTuple):
    """Which core the subject runs on and which the load and the stand-in share."""

    subject: int | None
    load: int | None


def choose_cores(pin: bool = True) -> Cores:
    """The first two cores this process may use; no pinning with fewer than two."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[1]) if pin and len(usable) > 1 else Cores(None, None)


class ProcessFailure(RuntimeError):
    """A process did not start, or ended early; the text ends with its last output."""


class Running:
    """A started process with its output in a file."""

    def __init__(self, process: asyncio.subprocess.Process, output: Path) -> None:
        self.process, self.output = process, output

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def last_output(self) -> str:
        """The end of what it printed."""
        return self.output.read_text(errors="replace")[-2000:]


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str],
    core: int | None,
    environment: Mapping[str, str] | None = None,
    stop_seconds: float = STOP_SECONDS,
) -> AsyncIterator[Running]:
    """Run `command` on `core` until the block ends; SIGTERM, then SIGKILL after `stop_seconds`.

    `environment` is added to this process's own, without that of a Tollgate.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        output = Path(folder) / "output.log"
        with output.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**own_environment(), **(environment or {})},
                start_new_session=True,
            )
        try:
            pin_tree([process.pid], core)
            yield Running(process, output)
        finally:
            await stop(process, stop_seconds)


def own_environment() -> dict[str, str]:
    """This process's environment; nothing of it may lead to somebody's stores."""
    return {name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")}


async def stop(process: asyncio.subprocess.Process, seconds: float) -> None:
    """End `process` and whatever is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def first_line(started: Running, timeout_seconds: float = 15.0) -> str:
    """The first line a process prints; raises `ProcessFailure`."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        line, newline, _ = started.output.read_text(errors="replace").partition("\n")
        if newline:
            return line
        if started.process.returncode is not None:
            break
        await asyncio.sleep(POLL_SECONDS)
    raise ProcessFailure(f"nothing was started: {started.last_output()}")


async def until_answering(started: Running, url: str, timeout_seconds: float) -> None:
    """Wait until `url` answers anything below 500; raises `ProcessFailure`."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and started.process.returncode is None:
        if await asyncio.to_thread(is_answering, url):
            return
        await asyncio.sleep(POLL_SECONDS)
    raise ProcessFailure(f"{url} does not answer: {started.last_output()}")


def is_answering(url: str) -> bool:
    """Whether an HTTP server answers `url` with a status below 500."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as refusal:
        return refusal.code < 500
    except OSError:
        return False


@contextlib.asynccontextmanager
async def start_provider(
    listen: str, core: int | None, extra: Sequence[str] = ()
) -> AsyncIterator[tuple[Running, str]]:
    """The stand-in provider on `core`; gives the process and its base URL ending in /v1."""
    command = [sys.executable, "-m", "benchmarks.provider", "--listen", listen, *extra]
    async with running(command, core) as started:
        line = await first_line(started)
        if not line.startswith("listening on "):
            raise ProcessFailure(started.last_output())
        yield started, line.removeprefix("listening on ") + "/v1"


@contextlib.asynccontextmanager
async def start_gateway(
    command: Sequence[str],
    environment: Mapping[str, str],
    ready_url: str,
    core: int | None,
    timeout_seconds: float = 60.0,
) -> AsyncIterator[Running]:
    """Any gateway: run `command`, wait until `ready_url` answers, pin its tree to `core`."""
    async with running(command, core, environment) as started:
        await until_answering(started, ready_url, timeout_seconds)
        yield started


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
