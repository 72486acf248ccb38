"""The stand-in as a process: its command line, several workers, its end."""

import os
import signal
import sys
import urllib.request

import pytest

from benchmarks import kernel, processes
from tests.waiting import eventually

COMMAND = [sys.executable, "-m", "benchmarks.provider", "--listen"]


async def started_url(started: processes.Running) -> str:
    return (await processes.first_line(started)).removeprefix("listening on ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_stop_it_cleanly(number):
    async with processes.running([*COMMAND, "127.0.0.1:0"], None) as started:
        url = await started_url(started)
        assert processes.is_answering(f"{url}/v1/models")
        started.process.send_signal(number)
        assert await started.process.wait() == 0
        assert started.last_output() == f"listening on {url}\n"


async def test_workers_share_a_port_and_leave_with_their_parent():
    command = [*COMMAND, "127.0.0.1:0", "--workers", "2", "--api-key", "k", "--script", "id=null"]
    async with processes.running(command, None) as started:
        url = await started_url(started)
        await eventually(lambda: len(kernel.tree_of([started.pid])) == 3)
        workers = kernel.tree_of([started.pid]) - {started.pid}
        asked = urllib.request.Request(
            f"{url}/v1/chat/completions",
            b'{"model":"m","messages":[]}',
            {"authorization": "Bearer k"},
        )
        await eventually(lambda: processes.is_answering(f"{url}/v1/models"))
        with urllib.request.urlopen(asked, timeout=5) as answer:  # noqa: ASYNC210
            assert answer.read().startswith(b'{"id":null')
        os.kill(started.pid, signal.SIGKILL)
        await started.process.wait()
        await eventually(lambda: not processes.is_answering(f"{url}/v1/models"))
        await eventually(lambda: all(gone(worker) for worker in workers))


def gone(pid: int) -> bool:
    fields = kernel.stat_fields(pid)
    return not fields or fields[0] == "Z"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1:0", "--script", "bogus=1"], "bogus"),
        (["nonsense"], "HOST:PORT"),
        (["192.0.2.1:1"], "cannot listen on 192.0.2.1:1"),
    ],
)
async def test_wrong_starts_say_why(arguments, words):
    async with processes.running([*COMMAND, *arguments], None) as started:
        assert await started.process.wait() != 0
        assert words in started.last_output()
        assert "Traceback" not in started.last_output()
