"""`tollgate up` with stand-ins for its parts and real servers: order, failures, nothing left."""

import json
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.stack import Stack
from tests.waiting import eventually_blocking

pytestmark = pytest.mark.processes
PART = Path(__file__).with_name("stand_in_part.py")
PROGRAM = """
import json, sys
from accounting import embedded_files, up, up_parts
embedded_files._LOCK_TIMEOUT_SECONDS = 1.0
up._READY_TIMEOUT_SECONDS = 10.0
up_parts.Part.longest_stop_seconds = 1.0
commands = {r: [sys.executable, sys.argv[1], r] for r in up_parts.Commands._fields}
for role, behaviour in json.loads(sys.argv[2]).items():
    commands[role].append(behaviour)
sys.exit(up.main(["up", *sys.argv[3:]], up_parts.Commands(**commands)))
"""


class StackOfStandIns(Stack):
    """With stand-ins for the parts, which note what happens to them in the data directory."""

    def start(self, *options: str, **behaviours: str) -> Self:
        self._command = (sys.executable, "-c", PROGRAM, str(PART), json.dumps(behaviours))
        super().start(*options)
        return self

    def stops(self) -> list[str]:
        return (self.data_dir / "stops").read_text().split()

    def calls(self) -> list[list[object]]:
        return [json.loads(line) for line in (self.data_dir / "calls").read_text().splitlines()]


New = Callable[[], StackOfStandIns]


@pytest.fixture
def new_stack(tmp_path: Path) -> Iterator[New]:
    stacks: list[StackOfStandIns] = []

    def new() -> StackOfStandIns:
        stacks.append(StackOfStandIns(tmp_path / "data"))
        return stacks[-1]

    yield new
    for stack in stacks:
        stack.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_everything_starts_and_stops_in_order(new_stack: New, number: signal.Signals) -> None:
    stack = new_stack().start("--sandbox").until_ready()
    assert len(stack.processes) >= 6
    assert stack.signal(number).ended() == 0
    assert stack.stops() == ["proxy", "admin_api", "accounting", "sandbox"]
    lines = [line for line in stack.output.splitlines() if line.startswith("stopping ")]
    order = ["proxy", "admin_api", "accounting", "sandbox", "Postgres", "Redis"]
    assert lines == [f"stopping {name} … done" for name in order]
    assert stack.leftovers() == []


def test_without_a_sandbox_none_is_started(new_stack: New) -> None:
    stack = new_stack().start().until_ready()
    assert "started sandbox" not in stack.output
    assert '"model": "real"' in stack.output
    assert stack.signal(signal.SIGTERM).ended() == 0
    assert stack.stops() == ["proxy", "admin_api", "accounting"]


def test_a_second_start_keeps_workspace_and_key(new_stack: New) -> None:
    first = new_stack().start("--sandbox").until_ready()
    assert first.signal(signal.SIGTERM).ended() == 0
    demo = json.loads((first.data_dir / "demo.json").read_text())
    assert demo["key_secret"] in first.output
    assert [call[:2] for call in first.calls()] == [
        ["POST", "/v1/admin/workspaces"],
        ["POST", "/v1/admin/workspaces/ws_1/grants"],
        ["POST", "/v1/admin/workspaces/ws_1/keys"],
        ["GET", "/v1/account/balance"],
    ]
    assert first.calls()[1][2] == {"kind": "trial", "amount_usd": "20"}

    second = new_stack().start("--sandbox").until_ready()
    assert second.signal(signal.SIGTERM).ended() == 0
    assert demo["key_secret"] in second.output
    assert json.loads((first.data_dir / "demo.json").read_text()) == demo
    assert [call[0] for call in second.calls()[4:]] == ["GET", "GET", "GET"]


def test_a_revoked_demo_key_is_replaced_and_nothing_granted_again(
    new_stack: New,
) -> None:
    stack = new_stack()
    stack.data_dir.mkdir()
    remembered = {"workspace_id": "ws_1", "granted": True, "key_secret": "inf_revoked"}
    (stack.data_dir / "demo.json").write_text(json.dumps(remembered))
    stack.start("--sandbox").until_ready()
    assert [call[1] for call in stack.calls() if call[0] == "POST"] == [
        "/v1/admin/workspaces/ws_1/keys"
    ]
    assert "inf_revoked" not in stack.output


def test_secrets_and_logs_are_private(new_stack: New) -> None:
    stack = new_stack().start("--sandbox").until_ready()
    files = [path for path in stack.data_dir.iterdir() if path.is_file()]
    secret = {path.name for path in files if stat.S_IMODE(path.stat().st_mode) == 0o600}
    assert {"operator_token", "demo.json", "redis.password", "postgres.password"} <= secret
    assert stat.S_IMODE(stack.data_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((stack.data_dir / "logs" / "proxy.log").stat().st_mode) == 0o600


@pytest.mark.parametrize("role", ["migrate", "sandbox", "accounting", "admin_api", "proxy"])
def test_a_part_that_cannot_start_is_named_with_its_reason(new_stack: New, role: str) -> None:
    stack = new_stack().start("--sandbox", **{role: "fails"})
    assert stack.ended() == 1
    complaints = [line for line in stack.output.splitlines() if line.startswith("tollgate: ")]
    assert len(complaints) == 1
    assert f"{role} ended with status 1: {role} cannot work like this" in complaints[0]
    assert "Traceback" not in stack.output
    assert "stopping Redis … done" in stack.output


def test_a_part_that_dies_later_ends_everything(new_stack: New) -> None:
    stack = new_stack().start("--sandbox", accounting="dies").until_ready()
    (stack.data_dir / "die").touch()
    assert stack.ended() == 1
    assert "tollgate: accounting ended with status 4: something broke" in stack.output
    assert stack.stops() == ["proxy", "admin_api", "sandbox"]
    assert stack.leftovers() == []


def test_a_part_that_will_not_stop_is_killed_and_the_rest_stops_in_order(
    new_stack: New,
) -> None:
    stack = new_stack().start("--sandbox", admin_api="stubborn").until_ready()
    assert stack.signal(signal.SIGTERM).ended() == 0
    assert "stopping admin_api … did not end in time, killed" in stack.output
    assert stack.stops() == ["proxy", "accounting", "sandbox"]
    assert stack.leftovers() == []


def test_a_stop_during_the_start_is_obeyed(new_stack: New) -> None:
    stack = new_stack().start("--sandbox").until("started Redis").signal(signal.SIGTERM)
    assert stack.ended() == 0
    assert "stopping Redis … done" in stack.output
    assert "is ready" not in stack.output


def test_nothing_outlives_a_kill(new_stack: New) -> None:
    stack = new_stack().start("--sandbox").until_ready()
    assert stack.signal(signal.SIGKILL).ended() == -signal.SIGKILL
    eventually_blocking(lambda: stack.leftovers() == [], timeout_seconds=15)
    assert new_stack().start("--sandbox").until_ready()


@pytest.mark.parametrize("variable", ["LISTEN", "ADMIN_LISTEN", "PRIVATE_LISTEN"])
def test_a_port_in_use_is_named(new_stack: New, variable: str) -> None:
    stack = new_stack()
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        address = f"127.0.0.1:{squatter.getsockname()[1]}"
        stack.env[f"TOLLGATE_{variable}"] = address
        assert stack.start().ended() == 1
    reason = f"cannot listen on {address}: Address already in use"
    assert stack.output == f"tollgate: TOLLGATE_{variable}: {reason}\n"


def test_the_sandbox_port_in_use_is_named(new_stack: New) -> None:
    stack = new_stack()
    with socket.create_server(("127.0.0.1", stack.sandbox_port)):
        assert stack.start("--sandbox").ended() == 1
    assert stack.output.startswith("tollgate: the catalogue's sandbox provider: cannot listen on")


def test_a_second_stack_on_the_same_data_is_refused(new_stack: New) -> None:
    first = new_stack().start("--sandbox").until_ready()
    second = new_stack().start()
    assert second.ended() == 1
    assert "redis is in use: is another tollgate running there?" in second.output
    assert first.leftovers() != []


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("TOLLGATE_BOGUS", "1", "TOLLGATE_BOGUS: unknown setting"),
        ("TOLLGATE_LISTEN", "nowhere", "TOLLGATE_LISTEN: expected "),
        ("TOLLGATE_CATALOGUE", "/nonexistent.toml", "catalogue /nonexistent.toml"),
        ("TOLLGATE_REDIS_URL", "redis://127.0.0.1:1/0", "TOLLGATE_REDIS_URL: Error 111"),
        ("TOLLGATE_REDIS_URL", "nonsense", "TOLLGATE_REDIS_URL: "),
        ("TOLLGATE_DATABASE_URL", "nonsense", "TOLLGATE_DATABASE_URL: "),
        ("TOLLGATE_DATA_DIR", "/proc/nowhere", "TOLLGATE_DATA_DIR: /proc/nowhere"),
        ("TOLLGATE_LISTEN", "192.0.2.1:80", "TOLLGATE_LISTEN: cannot listen on 192.0.2.1:80"),
    ],
)
def test_a_bad_setting_is_one_line(
    new_stack: New, variable: str, value: str, complaint: str
) -> None:
    stack = new_stack()
    stack.env[variable] = value
    assert stack.start().ended() in (1, 2)
    assert stack.output.startswith(f"tollgate: {complaint}")
    assert stack.output.count("\n") == 1
