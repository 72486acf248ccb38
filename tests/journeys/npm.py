"""npm packages for journeys: installed once beside their lock file, and scripts run with them.

Installing is bounded and needs a network once; without npm or a network the journeys that
need it are skipped and say so. A lock file that does not install fails them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).with_name("node")
_INSTALL_SECONDS = 180
_SCRIPT_SECONDS = 60
_OLDEST_NODE = 20
_UNREACHABLE = (
    *("EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ENOTCACHED"),
    *("ENOTFOUND", "ERR_SOCKET_TIMEOUT", "ETIMEDOUT", "FETCH_ERROR"),
)


def installed() -> Path:
    """The folder with `node_modules` as its lock file says; skips the test without npm."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("needs node and npm, which are not installed")
    version = _run(["node", "--version"], {}, 10).stdout.strip()
    if int(version.removeprefix("v").split(".")[0]) < _OLDEST_NODE:
        pytest.skip(f"needs node {_OLDEST_NODE} or newer, found {version}")
    digest = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
    with (FOLDER / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one install at a time, whoever else runs tests here
        stamp = FOLDER / "node_modules" / ".installed"
        if not stamp.exists() or stamp.read_text() != digest:
            _install()
            stamp.write_text(digest)
    return FOLDER


def _install() -> None:
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    command += [
        "--fetch-retries=2",
        "--fetch-retry-mintimeout=500",
        "--fetch-retry-maxtimeout=2000",
    ]
    try:
        done = _run(command, {}, _INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"needs npm packages, which did not arrive within {_INSTALL_SECONDS} s")
    why = next((code for code in _UNREACHABLE if code in done.stderr), None)
    if done.returncode and why:
        pytest.skip(f"needs npm packages, and their registry is out of reach ({why})")
    assert done.returncode == 0, done.stdout + done.stderr


def script(name: str, env: Mapping[str, str], **given: Any) -> Any:
    """What a script of ours prints: one JSON document. `given` is its one argument, as JSON."""
    done = _run(["node", name, json.dumps(given)], env, _SCRIPT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def _run(
    command: list[str], env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=FOLDER,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
