"""wrk, the compiled load generator, for plain requests.

Owns its script, its command line and the reading of its figures.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from decimal import Decimal
from pathlib import Path

import msgspec

from benchmarks.load import LoadResult
from benchmarks.load_connection import Latencies
from benchmarks.load_request import Target

EXTRA_SECONDS = 30.0
FIGURES_MARK = "FIGURES "

SCRIPT = """\
wrk.method = "POST"
wrk.path = %(path)s
wrk.body = %(body)s
%(headers)s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    'FIGURES {"requests":%%d,"us":%%d,"bytes":%%d,"p50":%%d,"p90":%%d,"p99":%%d,"max":%%d,' ..
    '"connect":%%d,"read":%%d,"write":%%d,"status":%%d,"timeout":%%d}\\n',
    summary.requests, summary.duration, summary.bytes, latency:percentile(50),
    latency:percentile(90), latency:percentile(99), latency.max,
    e.connect, e.read, e.write, e.status, e.timeout))
end
"""


class Figures(msgspec.Struct):
    """What the script prints at the end; latencies and `us` in microseconds."""

    requests: int
    us: int
    bytes: int
    p50: int
    p90: int
    p99: int
    max: int
    connect: int
    read: int
    write: int
    status: int
    timeout: int


def is_installed() -> bool:
    """Whether wrk can be run."""
    return shutil.which("wrk") is not None


async def run(target: Target, concurrency: int, seconds: float, core: int | None) -> LoadResult:
    """Load `target` for `seconds` (whole seconds, at least one) from `core`.

    Raises RuntimeError with wrk's own words if it fails.
    """
    whole_seconds = max(1, round(seconds))
    with tempfile.TemporaryDirectory(prefix="benchmark-wrk-") as folder:
        script = write_script(Path(folder), target)
        process = await asyncio.create_subprocess_exec(
            "wrk",
            *("-t", "1", "-c", str(concurrency), "-d", str(whole_seconds), "-s", str(script)),
            f"http://{target.host}:{target.port}",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        try:
            async with asyncio.timeout(whole_seconds + EXTRA_SECONDS):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    return result_in(output.decode(errors="replace"))


def write_script(folder: Path, target: Target) -> Path:
    """wrk's Lua script for the request of `target`."""
    head, _, body = target.request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    kept = [pair for pair in pairs if pair[0].lower() not in ("host", "content-length")]
    script = folder / "request.lua"
    script.write_text(
        SCRIPT
        % {
            "path": quoted(first.split()[1]),
            "body": quoted(body.decode()),
            "headers": "\n".join(f"wrk.headers[{quoted(n)}] = {quoted(v)}" for n, v in kept),
        }
    )
    return script


def quoted(text: str) -> str:
    """`text` as a Lua string."""
    return '"' + "".join(f"\\{byte:03d}" for byte in text.encode()) + '"'


def result_in(output: str) -> LoadResult:
    """wrk's figures as a load result."""
    line = next((li for li in output.splitlines() if li.startswith(FIGURES_MARK)), None)
    if line is None:
        raise RuntimeError(f"wrk failed: {output}")
    figures = msgspec.json.decode(line.removeprefix(FIGURES_MARK), type=Figures)
    errors = {name: getattr(figures, name) for name in Figures.__struct_fields__[7:]}
    return LoadResult(
        seconds=figures.us / 1e6,
        requests=figures.requests - figures.status,
        chunks=0,
        bytes=figures.bytes,
        errors={name: number for name, number in errors.items() if number},
        latency_ms=Latencies(
            figures.requests,
            *(value / 1000 for value in (figures.p50, figures.p90, figures.p99, figures.max)),
        ),
        first_chunk_ms=None,
        chunk_age_ms=None,
        requests_total=figures.requests,
        credits_total=Decimal(0),
    )
