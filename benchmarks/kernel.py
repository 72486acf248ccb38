"""What the kernel knows of processes: trees, CPU, memory, cores, how many files they may open.

Owns the reading of /proc. CPU of a process tree is the run time of every live thread in it,
in nanoseconds where the kernel keeps `schedstat`, else user plus system time in ticks of
10 ms; what live processes have reaped is counted in ticks.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Collection
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
WANTED_FILES = 65_536  # for 10,000 streams through one process, two sockets each
OWN_FILES = 200  # beside the sockets of the load: logs, libraries, stores, listeners


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
    spent = 0.0
    for pid in tree_of(roots, leave_out):
        own, system, reaped, reaped_system = (int(n) for n in (stat_fields(pid) or "0" * 15)[11:15])
        spent += max((own + system) / TICKS_PER_SECOND, scheduled_seconds(pid))
        spent += (reaped + reaped_system) / TICKS_PER_SECOND
    return spent


def scheduled_seconds(pid: int) -> float:
    """Run time of a process's live threads; 0 where the kernel does not tell."""
    nanoseconds = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                text = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text()
                nanoseconds += int(text.split()[0])
    return nanoseconds / 1e9


def proportional_kb(pid: int) -> int:
    """Memory of a process in KiB, pages shared with n processes counted as one n-th (PSS)."""
    return field_kb(f"/proc/{pid}/smaps_rollup", "Pss:")


def resident_peak_kb(pid: int) -> int:
    """The most memory a process has had since `forget_peak`, in KiB (VmHWM)."""
    return field_kb(f"/proc/{pid}/status", "VmHWM:")


def resident_kb(pid: int) -> int:
    """The memory a process has now, in KiB (VmRSS)."""
    return field_kb(f"/proc/{pid}/status", "VmRSS:")


def forget_peak(pid: int) -> None:
    """Let `resident_peak_kb` begin anew from what the process has now (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def field_kb(path: str, name: str) -> int:
    """The number of a `Name:   123 kB` line; 0 if the process is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    return 0


def raise_open_files() -> int:
    """Let this process and its children open as many files as they may; gives how many.

    The hard limit is raised too, where that is allowed (CAP_SYS_RESOURCE).
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        wanted = max(most, WANTED_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def pin_tree(roots: Collection[int], core: int | None, leave_out: Collection[int] = ()) -> None:
    """Let every thread of the trees of `roots` run on `core` only; None changes nothing."""
    if core is None:
        return
    for pid in tree_of(roots, leave_out):
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), {core})
