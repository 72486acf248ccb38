"""The first quarter of an hour: start, paste what was printed, look at the balance, stop.

Real processes all the way; what is sent is what `tollgate up` printed, taken apart like a
shell would.
"""

import itertools
import json
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from tests.stack import ROOT, Stack
from tests.waiting import eventually_blocking

New = Callable[[], Stack]


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    body: str

    def events(self) -> list[str]:
        """The data of each event of a stream."""
        blocks = self.body.split("\n\n")
        return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


@pytest.fixture
def new_stack(tmp_path: Path) -> Iterator[New]:
    stacks: list[Stack] = []

    def new() -> Stack:
        stacks.append(Stack(tmp_path / "data"))
        return stacks[-1]

    yield new
    for stack in stacks:
        stack.close()


def printed(stack: Stack) -> list[list[str]]:
    """The printed commands, split into words."""
    text = stack.output.replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.lstrip().startswith("curl ")]


def pasted(words: list[str]) -> Answer:
    """Do what that curl would do."""
    url = urlsplit(next(word for word in words if word.startswith("http://")))
    options = dict(itertools.pairwise(words))
    headers = dict(
        value.split(": ", 1) for flag, value in itertools.pairwise(words) if flag == "-H"
    )
    body = options.get("-d")
    connection = HTTPConnection(str(url.hostname), url.port, timeout=30)
    try:
        connection.request("POST" if body else "GET", url.path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read().decode())
    finally:
        connection.close()


def balance(stack: Stack) -> Decimal:
    answer = pasted(printed(stack)[2])
    assert answer.status == 200, answer
    return Decimal(str(json.loads(answer.body)["balance_usd"]))


def audit(stack: Stack) -> str:
    """What the audit of the running system prints; it has to be clean."""
    urls = {}
    for part in stack.processes:
        if part.cmdline()[-2:] == ["accounting", "run"]:
            urls = part.environ()
    done = subprocess.run(
        [sys.executable, "-m", "accounting", "audit"],
        cwd=ROOT,
        env=urls,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_printed_commands_work_and_cost_what_they_say(new_stack: New) -> None:
    stack = new_stack().start("--sandbox").until_ready()
    streaming, plain, _balance = printed(stack)
    assert balance(stack) == 20

    streamed = pasted(streaming)
    assert streamed.status == 200
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *_chunks, last, done = streamed.events()
    assert done == "[DONE]"
    final: dict[str, Any] = json.loads(last, parse_float=Decimal)
    assert final["choices"] == []
    assert final["usage"]["completion_tokens"] > 0
    credits = Decimal(final["credits_used"])

    whole = pasted(plain)
    assert whole.status == 200
    assert json.loads(whole.body)["choices"][0]["message"]["content"]
    credits += Decimal(whole.headers["x-credits-used"])

    assert credits > 0
    eventually_blocking(lambda: balance(stack) == 20 - credits / 100)
    assert audit(stack)
    assert stack.signal(signal.SIGTERM).ended() == 0


def test_a_stop_leaves_no_process_and_a_second_start_keeps_data_and_key(new_stack: New) -> None:
    first = new_stack().start("--sandbox").until_ready()
    assert pasted(printed(first)[1]).status == 200
    eventually_blocking(lambda: balance(first) < 20)
    left = balance(first)
    key = json.loads((first.data_dir / "demo.json").read_text())["key_secret"]
    assert len(first.processes) >= 8  # two servers, sandbox, accounting, admin, proxy, 2 workers
    assert first.signal(signal.SIGINT).ended() == 0
    assert first.leftovers() == []
    stopped = [line for line in first.output.splitlines() if line.startswith("stopping ")]
    order = ["proxy", "admin_api", "accounting", "sandbox", "Postgres", "Redis"]
    assert stopped == [f"stopping {name} … done" for name in order]

    second = new_stack().start("--sandbox").until_ready()
    assert key in second.output
    assert balance(second) == left
    assert pasted(printed(second)[0]).status == 200
    assert second.signal(signal.SIGTERM).ended() == 0
    assert second.leftovers() == []


def test_nothing_outlives_a_kill_and_what_was_charged_stays_charged(new_stack: New) -> None:
    first = new_stack().start("--sandbox").until_ready()
    assert pasted(printed(first)[1]).status == 200
    eventually_blocking(lambda: balance(first) < 20)
    left = balance(first)
    assert first.signal(signal.SIGKILL).ended() == -signal.SIGKILL
    eventually_blocking(lambda: first.leftovers() == [], timeout_seconds=60)

    second = new_stack().start("--sandbox").until_ready()
    assert balance(second) == left
    assert audit(second)


def test_a_port_in_use_is_one_line(new_stack: New) -> None:
    stack = new_stack()
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        stack.env["TOLLGATE_LISTEN"] = f"127.0.0.1:{squatter.getsockname()[1]}"
        assert stack.start("--sandbox").ended() == 1
    assert stack.output.startswith("tollgate: TOLLGATE_LISTEN: cannot listen on 127.0.0.1:")
    assert stack.output.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("TOLLGATE_REDIS_URL", "redis://127.0.0.1:1/0"),
        ("TOLLGATE_DATABASE_URL", "postgresql://tollgate:secret-word@127.0.0.1:1/tollgate"),
    ],
)
def test_an_unreachable_store_is_one_line_without_its_password(
    new_stack: New, variable: str, url: str
) -> None:
    stack = new_stack()
    stack.env[variable] = url
    assert stack.start("--sandbox").ended() == 1
    complaints = [line for line in stack.output.splitlines() if line.startswith("tollgate: ")]
    assert len(complaints) == 1
    assert variable in complaints[0]
    assert "secret-word" not in stack.output
    assert "Traceback" not in stack.output


def test_it_runs_against_external_servers(
    new_stack: New, redis_url: str, redis_client: object, empty_database_url: str
) -> None:
    stack = new_stack()
    stack.env |= {"TOLLGATE_REDIS_URL": redis_url, "TOLLGATE_DATABASE_URL": empty_database_url}
    stack.start("--sandbox").until_ready()
    assert not (stack.data_dir / "redis").exists()
    assert not (stack.data_dir / "postgres").exists()
    assert pasted(printed(stack)[0]).status == 200
    assert stack.signal(signal.SIGTERM).ended() == 0
