"""The processes of a benchmark: started, pinned to cores, and their CPU counted.

Owns starting and stopping (stand-in, nginx, a gateway), the cores they may use, and CPU
seconds from the kernel's accounting. Leaves what is run on them to `scenarios`.

CPU of a process tree is user plus system time of every live process in it and of the
children they have reaped, in ticks of 10 ms, so a window should last seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 15.0
POLL_SECONDS = 0.02

NGINX_CONFIG = """\
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  client_max_body_size 64m;
  upstream provider {{
    server {upstream};
    keepalive 1024;
    keepalive_requests 1000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://provider;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


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
    command: Sequence[str], core: int | None, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Running]:
    """Run `command` on `core` until the block ends; SIGTERM, then SIGKILL after 15 s.

    `environment` is added to this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        output = Path(folder) / "output.log"
        with output.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        try:
            pin_tree([process.pid], core)
            yield Running(process, output)
        finally:
            await stop(process)


async def stop(process: asyncio.subprocess.Process) -> None:
    """End `process` and whatever is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
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


def has_nginx() -> bool:
    """Whether nginx is installed."""
    return nginx_path() is not None


def nginx_path() -> str | None:
    """Where nginx is; also where systems keep it off an ordinary user's path."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@contextlib.asynccontextmanager
async def start_nginx(upstream: str, core: int | None) -> AsyncIterator[tuple[Running, str]]:
    """nginx, one worker, as a plain keep-alive proxy to `upstream` (host:port).

    Gives the process and its base URL ending in /v1.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="benchmark-nginx-") as folder:
        config = write_nginx_config(Path(folder), upstream, port)
        command = [nginx_path() or "nginx", "-c", str(config), "-g", "daemon off;"]
        async with running(command, core) as started:
            await until_answering(started, f"http://127.0.0.1:{port}/v1/models", 10.0)
            pin_tree([started.pid], core)
            yield started, f"http://127.0.0.1:{port}/v1"


def write_nginx_config(folder: Path, upstream: str, port: int) -> Path:
    """The configuration file, in a folder that nginx's own user may enter."""
    config = folder / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=folder, upstream=upstream, port=port))
    folder.chmod(0o755)
    return config


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


def tree_of(roots: Collection[int], leave_out: Collection[int] = ()) -> set[int]:
    """Live processes from `roots` down, without the sub-trees that start in `leave_out`."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            parent = stat_fields(int(entry.name))
            if parent:
                children.setdefault(int(parent[1]), []).append(int(entry.name))
    found: set[int] = set()
    todo = [pid for pid in roots if pid not in leave_out]
    while todo:
        pid = todo.pop()
        if pid not in found and stat_fields(pid):
            found.add(pid)
            todo += [child for child in children.get(pid, []) if child not in leave_out]
    return found


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (state, parent, …); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def named_in_tree(roots: Collection[int], name: str) -> list[int]:
    """The top-most processes below `roots` whose command line contains `name`."""
    named = {pid for pid in tree_of(roots) - set(roots) if name in command_line(pid)}
    return sorted(pid for pid in named if int(stat_fields(pid)[1]) not in named)


def command_line(pid: int) -> str:
    """The command line of a process, words separated by spaces; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_seconds(roots: Collection[int], leave_out: Collection[int] = ()) -> float:
    """CPU spent so far by the trees of `roots`, reaped children included."""
    ticks = 0
    for pid in tree_of(roots, leave_out):
        fields = stat_fields(pid)
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / TICKS_PER_SECOND


def pin_tree(roots: Collection[int], core: int | None, leave_out: Collection[int] = ()) -> None:
    """Let every thread of the trees of `roots` run on `core` only; None changes nothing."""
    if core is None:
        return
    for pid in tree_of(roots, leave_out):
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), {core})
