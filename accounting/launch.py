"""The child's side of starting a process: become the right user, die with the parent, exec.

Run as a file (`python -I -S launch.py …`) between fork and the real program, because the two
things it does cannot be done elsewhere: the death signal is forgotten when the user changes,
so it must be asked for after that and before `exec`, and Python run in a forked child of a
threaded parent may deadlock. Imports stay few: this runs once per child, before its start-up.

Knows nothing of what it starts; `child.py` is the parent's side.

Arguments: parent's process id, death signal, user id, group id (-1: stay), then the command.
"""

import ctypes
import os
import sys

KEEP = -1
_PR_SET_PDEATHSIG = 1  # prctl(2)
_EXIT_CANNOT_RUN = 127  # the shell's convention for a command that could not be started


def main(arguments: list[str]) -> int:
    parent_pid, death_signal, user_id, group_id = (int(value) for value in arguments[:4])
    command = arguments[4:]
    try:
        if user_id != KEEP:
            become(user_id, group_id)
        die_with_parent(parent_pid, death_signal)
        os.execv(command[0], command)  # noqa: S606 - never returns; there is no shell to pass
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]} as user {os.geteuid()}: {error.strerror}\n")
    return _EXIT_CANNOT_RUN


def become(user_id: int, group_id: int) -> None:
    """Give up root for good: groups first, because afterwards it is not allowed any more."""
    os.setgroups([])
    os.setgid(group_id)
    os.setuid(user_id)


def die_with_parent(parent_pid: int, death_signal: int) -> None:
    """Have the kernel send `death_signal` when the parent ends, however it ends (Linux only).

    The parent may have gone before the request was made: then end here.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(_EXIT_CANNOT_RUN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
