"""One child process, from the parent's side: started in a session of its own, never outliving us.

Owns the three promises every child of `tollgate up` needs: a Ctrl-C in the terminal does not
reach it (its own session, so the parent decides the order of stopping), it ends when the
parent is gone, however that happened (`launch.py` asks the kernel), and its output is in a
file whose last lines can be shown. What is run, and in which order, is the caller's business.

Start children from the main thread: the kernel's promise is tied to the starting *thread*.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from accounting import launch

_TAIL_BYTES = 8192


class UserIds(NamedTuple):
    """The user and group a child runs as."""

    user_id: int
    group_id: int


class Child:
    """A running program. `stop` it exactly once; a stopped one may be asked for its exit code."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        run_as: UserIds | None = None,
        stop_signal: int = signal.SIGTERM,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start `command`, its output going to `log`; the log of the run before is kept beside it.

        `stop_signal` asks for an orderly end; it is also what the child gets when we die.
        """
        self.name = name
        self.log = log
        self._stop_signal = stop_signal
        if log.exists():
            log.replace(log.with_name(log.name + ".previous"))
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output:
            self._process = subprocess.Popen(
                launch_command(command, run_as=run_as, death_signal=stop_signal),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=env,
                start_new_session=True,
                pass_fds=pass_fds,
            )

    def __repr__(self) -> str:
        state = "alive" if self.alive() else f"ended {self.exit_code}"
        return f"<Child {self.name} pid={self.pid} {state}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, timeout_seconds: float) -> bool:
        """Ask it to end, insist after the time-out; False when insisting was needed.

        Whatever it started in its session is killed with it: nothing is left behind.
        """
        orderly = True
        if self.alive():
            self._process.send_signal(self._stop_signal)
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                orderly = False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # the group is usually gone: the good case
        self._process.wait()
        return orderly

    def tail(self, lines: int = 3) -> str:
        """The last lines of its output on one line; empty when it said nothing."""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(said[-lines:])


def launch_command(
    command: Sequence[str], *, run_as: UserIds | None = None, death_signal: int = signal.SIGKILL
) -> list[str]:
    """`command` wrapped so that it runs as the given user and ends when this process does."""
    user_id, group_id = run_as or (launch.KEEP, launch.KEEP)
    ids = [str(number) for number in (os.getpid(), int(death_signal), user_id, group_id)]
    return [sys.executable, "-I", "-S", launch.__file__, *ids, *command]
