"""`python -m admin_api` as a process: one line when it cannot start, and an orderly stop."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import asyncpg
import pytest

from tests.admin_api.conftest import OPERATOR, Api
from tests.waiting import eventually, free_port

_WAITING = "select exists (select from pg_locks where not granted)"


def environment(**settings: str) -> dict[str, str]:
    """This process's, with these settings and no others."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")}
    return kept | {f"TOLLGATE_{name.upper()}": text for name, text in settings.items()}


def ended(**settings: str) -> tuple[int, str]:
    """Exit status and stderr of a start that has to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "admin_api"],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


@contextmanager
def started(**settings: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "admin_api"],
        env=environment(**settings),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def stores(redis_url: str, database_url: str, tmp_path: object) -> dict[str, str]:
    return {
        "redis_url": redis_url,
        "database_url": database_url,
        "data_dir": str(tmp_path),
        "redis_timeout_seconds": "5",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_asked_to_stop(stores: dict[str, str], number: int) -> None:
    port = free_port()
    with started(admin_listen=f"127.0.0.1:{port}", **stores) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        assert first["text"] == f"listening on 127.0.0.1, port {port}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert answer.status == 200
        process.send_signal(number)
        rest = [json.loads(line)["text"] for line in process.stderr]
        assert process.wait(30) == 0
        assert rest == ["stopping", "stopped"]
    token = os.path.join(stores["data_dir"], "operator_token")
    assert os.stat(token).st_mode & 0o777 == 0o600


async def test_an_answer_under_way_is_finished_first(stores: dict[str, str]) -> None:
    """A suspension waits for a row that somebody else has locked when the signal comes."""
    port = free_port()
    settings = stores | {"operator_token": OPERATOR, "admin_listen": f"127.0.0.1:{port}"}
    connection = await asyncpg.connect(stores["database_url"])
    with started(**settings) as process:
        assert process.stderr is not None
        process.stderr.readline()
        async with aiohttp.ClientSession() as session:
            api = Api(session, port)
            workspace_id = await api.new_workspace()
            lock = connection.transaction()
            await lock.start()
            await connection.fetch("select from workspaces for update")
            suspend = asyncio.create_task(
                api.operator("POST", f"/workspaces/{workspace_id}/suspend")
            )
            await eventually(lambda: connection.fetchval(_WAITING))
            process.send_signal(signal.SIGTERM)
            assert json.loads(process.stderr.readline())["text"] == "stopping"
            await lock.rollback()
            assert (await suspend).json["status"] == "suspended"
        assert await asyncio.to_thread(process.wait, 30) == 0
    await connection.close()


def test_a_port_in_use_is_one_line(stores: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        status, text = ended(admin_listen=where, **stores)
    assert status == 1
    assert text.startswith(f"tollgate admin_api: cannot listen on {where}: ")
    assert text.count("\n") == 1 and "in use" in text


def test_a_store_that_is_not_there_is_one_line(stores: dict[str, str]) -> None:
    where = f"127.0.0.1:{free_port()}"
    for changed, name in [
        ({"redis_url": f"redis://:hidden@{where}/0"}, f"Redis at {where}"),
        ({"database_url": f"postgresql://a:hidden@{where}/x"}, f"Postgres at {where}"),
    ]:
        status, text = ended(admin_listen="127.0.0.1:0", **(stores | changed))
        assert status == 1 and text.count("\n") == 1
        assert text.startswith(f"tollgate admin_api: cannot reach {name}: ")
        assert "hidden" not in text


def test_an_empty_database_is_one_line(stores: dict[str, str], empty_database_url: str) -> None:
    status, text = ended(
        admin_listen="127.0.0.1:0", **(stores | {"database_url": empty_database_url})
    )
    expected = "the database is empty: run `python -m accounting migrate`"
    assert (status, text) == (1, f"tollgate admin_api: {expected}\n")


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        ({"admin_listen": "nowhere"}, "TOLLGATE_ADMIN_LISTEN", 2),
        ({"bogus": "1"}, "TOLLGATE_BOGUS", 2),
        ({"operator_token": "two words"}, "TOLLGATE_OPERATOR_TOKEN", 2),
        ({"database_url": "nonsense"}, "TOLLGATE_DATABASE_URL", 2),
        ({"redis_url": "nonsense"}, "TOLLGATE_REDIS_URL", 2),
        ({"redis_url": ""}, "TOLLGATE_REDIS_URL", 1),
        ({"database_url": ""}, "TOLLGATE_DATABASE_URL", 1),
    ],
)
def test_a_bad_setting_is_one_line(
    stores: dict[str, str], changed: dict[str, str], name: str, expected: int
) -> None:
    status, text = ended(**(stores | {"admin_listen": "127.0.0.1:0"} | changed))
    assert status == expected and text.count("\n") == 1
    assert text.startswith("tollgate") and name in text
