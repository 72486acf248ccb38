"""One part of `tollgate up`: how it is run, asked whether it is ready, and what it needs first.

Owns the commands of the parts, the settings they get in their environment, and the checks
that turn a foreseeable failure into one line before anything starts. The order of starting
and stopping is `up.py`'s.
"""

import asyncio
import http.client
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import asyncpg
import redis

from accounting.child import Child
from accounting.contract.settings import PREFIX, Address, Settings

_ROOT = Path(__file__).resolve().parents[1]  # where the packages are; parts run there
_PROBE_TIMEOUT_SECONDS = 2.0
_REDIS_TIMEOUT_SECONDS = 5.0
_DATABASE_TIMEOUT_SECONDS = 5.0
_OWN_NAME = re.compile(r"^tollgate( \w+)?: ")
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared with, not bound


class StartError(Exception):
    """The stack cannot run, or runs no longer; the text is one line for the terminal."""


class StopRequested(BaseException):
    """A signal asked for the end; not an Exception, so that no handler takes it for a failure."""


class Commands(NamedTuple):
    """What is run for each part; tests put small stand-ins here."""

    migrate: Sequence[str]
    sandbox: Sequence[str]
    accounting: Sequence[str]
    admin_api: Sequence[str]
    proxy: Sequence[str]


def _module(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


COMMANDS = Commands(
    migrate=_module("accounting", "migrate"),
    sandbox=_module("benchmarks.provider"),
    accounting=_module("accounting", "run"),
    admin_api=_module("admin_api"),
    proxy=_module("proxy"),
)


class Part:
    """A running part and how long it may take to stop."""

    reloads = False  # whether a SIGHUP is for it
    longest_stop_seconds = 3600.0  # tests are less patient

    def __init__(self, name: str, child: Child, stop_timeout_seconds: float) -> None:
        self.name = name
        self._child = child
        self._stop_timeout_seconds = stop_timeout_seconds

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        data_dir: Path,
        env: Mapping[str, str],
        stop_timeout_seconds: float,
    ) -> "Part":
        log = data_dir / "logs" / f"{name}.log"
        child = Child(name, command, log=log, cwd=_ROOT, env=env)
        return cls(name, child, stop_timeout_seconds)

    def __repr__(self) -> str:
        return f"<Part {self._child!r}>"

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    def alive(self) -> bool:
        return self._child.alive()

    def signal(self, number: int) -> None:
        os.kill(self._child.pid, number)

    def stop(self) -> bool:
        """Ask it to end; False when it had to be killed."""
        return self._child.stop(min(self._stop_timeout_seconds, self.longest_stop_seconds))

    def last_words(self) -> str:
        """One line: its own complaint if it made one, else what is known of its end."""
        last = _OWN_NAME.sub("", self._child.tail(1))
        how = "is running" if self.alive() else f"ended with status {self.exit_code}"
        return f"{self.name} {how}: {last or 'it said nothing'} ({self._child.log})"


def environment(settings: Settings, **chosen: str) -> dict[str, str]:
    """This process's environment with the chosen settings in place of their variables.

    Paths are made absolute, because parts run in another folder.
    """
    if settings.catalogue:
        chosen["catalogue"] = str(Path(settings.catalogue).absolute())
    ours = {PREFIX + name.upper(): value for name, value in chosen.items()}
    return {**os.environ, **ours, "PYTHONUNBUFFERED": "1"}


def free_address(what: str, address: Address) -> Address:
    """The address, proven free; port 0 becomes a free port that every part can be told.

    The proxy's workers share their port, so they would not notice a stranger on it. Raises
    StartError naming `what` when nobody could listen there now.
    """
    try:
        with _listener(address) as listener:
            return Address(address.host, int(listener.getsockname()[1]))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartError(f"{what}: cannot listen on {address}: {reason}") from error


def _listener(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family)


def connectable(address: Address) -> Address:
    """Where a client on this machine reaches a listener, also one on every address."""
    return Address(_EVERY_ADDRESS.get(address.host, address.host), address.port)


def check_redis(url: str) -> None:
    """Raises StartError when the given Redis does not answer."""
    try:
        with redis.Redis.from_url(
            url,
            socket_timeout=_REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=_REDIS_TIMEOUT_SECONDS,
        ) as client:
            client.ping()
    except (redis.RedisError, ValueError) as error:
        raise StartError(f"TOLLGATE_REDIS_URL: {error}") from error


def check_database(url: str) -> None:
    """Raises StartError when the given Postgres lets nobody in."""

    async def connect() -> None:
        connection = await asyncpg.connect(url, timeout=_DATABASE_TIMEOUT_SECONDS)
        await connection.close()

    try:
        asyncio.run(connect())
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        place = urlsplit(url).netloc.rpartition("@")[2]
        reason = str(error) or type(error).__name__
        raise StartError(f"TOLLGATE_DATABASE_URL: {place}: {reason}") from error


def answers(address: Address, path: str) -> bool:
    """Whether a GET is answered with 200."""
    target = connectable(address)
    connection = http.client.HTTPConnection(target.host, target.port, _PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
