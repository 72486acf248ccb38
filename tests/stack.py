"""`tollgate up` as a process for tests: on free ports, with a data directory of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from tests.waiting import free_port

ROOT = Path(__file__).resolve().parents[1]
TOLLGATE = (sys.executable, "-m", "accounting.up")
_STARTED = "Ctrl-C stops everything"
_END_TIMEOUT_SECONDS = 60

_CATALOGUE = """
[providers.sandbox]
base_url = "http://127.0.0.1:{sandbox_port}/v1"
sandbox = true

[providers.other]
base_url = "http://127.0.0.1:1/v1"

[models.real]
targets = ["other/real"]
context_tokens = 8000
max_output_tokens = 1000
price = {{ input = "1", output = "1" }}

[models.sandbox-small]
targets = ["sandbox/sandbox-small"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "15", cached_input = "7.5", output = "60" }}
"""


class Stack:
    """One `tollgate up`. Set what you need in `env`, `start`, wait `until_ready`, `close`."""

    def __init__(self, data_dir: Path, command: Sequence[str] = TOLLGATE) -> None:
        self.data_dir = data_dir
        self.output = ""
        self.processes: list[psutil.Process] = []
        self.sandbox_port = free_port()
        catalogue = data_dir.with_name("catalogue.toml")
        catalogue.write_text(_CATALOGUE.format(sandbox_port=self.sandbox_port))
        self.env = {
            **{name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")},
            "TOLLGATE_DATA_DIR": str(data_dir),
            "TOLLGATE_LISTEN": "127.0.0.1:0",
            "TOLLGATE_ADMIN_LISTEN": "127.0.0.1:0",
            "TOLLGATE_PRIVATE_LISTEN": "127.0.0.1:0",
            "TOLLGATE_ACCOUNTING_LISTEN": "127.0.0.1:0",
            "TOLLGATE_WORKERS": "2",
            "TOLLGATE_CATALOGUE": str(catalogue),
        }
        self._command = command
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "not started"
        return self._process

    def start(self, *options: str) -> Self:
        self._process = subprocess.Popen(
            [*self._command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=self.env,
        )
        return self

    def until_ready(self) -> Self:
        return self.until(_STARTED)

    def until(self, words: str) -> Self:
        """Read its output up to a line with these words, and take stock of its processes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if words in line:
                self.processes = psutil.Process(self.process.pid).children(recursive=True)
                return self
        raise AssertionError(f"it never said {words!r}, but:\n{self.output}")

    def signal(self, number: int) -> Self:
        self.process.send_signal(number)
        return self

    def ended(self) -> int:
        """Its exit status; what it said until then is in `output`."""
        self.output += self.process.communicate(timeout=_END_TIMEOUT_SECONDS)[0]
        return self.process.returncode

    def leftovers(self) -> list[str]:
        """Its processes of the last stock-taking that still run."""
        return [str(process) for process in self.processes if is_alive(process)]

    def close(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
            self._process.communicate(timeout=_END_TIMEOUT_SECONDS)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one may end, and be reaped, while it is being asked."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
