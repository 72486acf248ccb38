"""`tollgate up`: the whole product on one machine, started, watched and stopped in order.

Reads like the order it works in: check what can be checked, start Redis and Postgres unless
their URLs are set, migrate, start the parts, wait until they answer, make the demo workspace,
say how to use it, watch, stop everything the other way round. A problem is one line on
stderr and a non-zero exit; whatever was started by then is stopped.

The parts are separate programs that share nothing with this one but settings in their
environment; each can be run without it. How one is run is in `up_parts.py`, what is printed
and made for a first request in `up_demo.py`.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accounting import up_demo
from accounting.contract import catalogue as catalogues
from accounting.contract.catalogue import Catalogue, CatalogueError
from accounting.contract.settings import Address, Settings, SettingsError, load
from accounting.embedded import start_postgres, start_redis
from accounting.embedded_files import EmbeddedError
from accounting.operator_token import operator_token
from accounting.up_parts import (
    COMMANDS,
    Commands,
    Part,
    StartError,
    StopRequested,
    answers,
    check_database,
    check_redis,
    connectable,
    environment,
    free_address,
)

_READY_TIMEOUT_SECONDS = 60.0
_MIGRATE_TIMEOUT_SECONDS = 120.0
_POLL_SECONDS = 0.05
_SANDBOX = "sandbox"  # the catalogue's name for the provider that --sandbox starts


def main(argv: Sequence[str] | None = None, commands: Commands = COMMANDS) -> int:
    """The console script. Exit status: 0 stopped when asked to, 1 a failure, 2 bad settings."""
    parser = argparse.ArgumentParser(prog="tollgate")
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start the whole product on this machine")
    up.add_argument("--sandbox", action="store_true", help="with a provider that needs no key")
    options = parser.parse_args(argv)
    try:
        settings = load(os.environ)
        sandbox = options.sandbox or settings.sandbox
        catalogue = catalogues.load(settings.catalogue, os.environ, sandbox)
    except (SettingsError, CatalogueError) as error:
        complain(str(error))
        return 2
    with Stack(settings, catalogue, sandbox, commands) as stack:
        return stack.run()


def complain(text: str) -> None:
    sys.stderr.write("tollgate: " + " ".join(text.split()) + "\n")


def say(text: str, end: str = "\n") -> None:
    """To the terminal, if it is still there."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of this process


class Stack:
    """Everything that runs. Parts are kept in the order of their start and stopped in reverse."""

    def __init__(
        self, settings: Settings, catalogue: Catalogue, sandbox: bool, commands: Commands
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._sandbox = sandbox
        self._commands = commands
        self._data_dir = Path(settings.data_dir).absolute()
        self._env: dict[str, str] = {}
        self._parts: list[Part] = []
        self._stop_requested = False

    def __enter__(self) -> "Stack":
        """From here on a signal is a request, looked at where it can be obeyed in order."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request_stop)
        hang_up = self._request_stop if sys.stdin and sys.stdin.isatty() else self._reload
        signal.signal(signal.SIGHUP, hang_up)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _request_stop(self, *_: object) -> None:
        self._stop_requested = True

    def _reload(self, *_: object) -> None:
        """Without a terminal, a hang-up means: roll the proxy's workers."""
        for part in self._parts:
            if part.reloads and part.alive():
                part.signal(signal.SIGHUP)

    def run(self) -> int:
        """Start, watch until asked to stop; the exit status."""
        try:
            self._check()
            self._start_servers()
            self._migrate()
            self._start_parts()
            self._introduce()
            while True:
                self._watch()
                time.sleep(_POLL_SECONDS)
        except StopRequested:
            say("")
            return 0
        except (StartError, SettingsError, EmbeddedError) as error:
            complain(str(error))
            return 1

    def _check(self) -> None:
        """Find out before anything is started what would make it fail."""
        settings = self._settings
        self._listen = free_address("TOLLGATE_LISTEN", settings.listen)
        self._admin = free_address("TOLLGATE_ADMIN_LISTEN", settings.admin_listen)
        self._private = free_address("TOLLGATE_PRIVATE_LISTEN", settings.private_listen)
        if self._sandbox:
            free_address("the catalogue's sandbox provider", self._sandbox_address())
        if settings.redis_url:
            check_redis(settings.redis_url.reveal())
        if settings.database_url:
            check_database(settings.database_url.reveal())
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._data_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StartError(f"TOLLGATE_DATA_DIR: {self._data_dir}: {error.strerror}") from error
        self._operator_token = operator_token(settings).reveal()

    def _sandbox_address(self) -> Address:
        provider = self._catalogue.providers.get(_SANDBOX)
        if provider is None:
            raise StartError(f"--sandbox: the catalogue has no provider named {_SANDBOX!r}")
        return Address(provider.host, provider.port)

    def _start_servers(self) -> None:
        """The URLs of Redis and Postgres: the given ones, else of servers started here."""
        redis_url = self._settings.redis_url.reveal()
        if not redis_url:
            redis_server = start_redis(self._data_dir)
            self._add(Part("Redis", redis_server.child, redis_server.stop_timeout_seconds))
            redis_url = redis_server.url
        database_url = self._settings.database_url.reveal()
        if not database_url:
            postgres_server = start_postgres(self._data_dir)
            self._add(Part("Postgres", postgres_server.child, postgres_server.stop_timeout_seconds))
            database_url = postgres_server.url
        self._env = environment(
            self._settings,
            redis_url=redis_url,
            database_url=database_url,
            operator_token=self._operator_token,
            data_dir=str(self._data_dir),
            sandbox="true" if self._sandbox else "false",
            listen=str(self._listen),
            admin_listen=str(self._admin),
            private_listen=str(self._private),
        )

    def _migrate(self) -> None:
        migration = Part.start("migrate", self._commands.migrate, self._data_dir, self._env, 5.0)
        self._parts.append(migration)
        deadline = time.monotonic() + _MIGRATE_TIMEOUT_SECONDS
        while migration.alive() and time.monotonic() < deadline:
            self._obey()
            time.sleep(_POLL_SECONDS)
        self._parts.remove(migration)
        migration.stop()
        if migration.exit_code != 0:
            raise StartError(migration.last_words())

    def _start_parts(self) -> None:
        """All at once, then wait for those that can be asked; each that dies is noticed."""
        drain = self._settings.drain_timeout_seconds
        if self._sandbox:
            listen = str(self._sandbox_address())
            self._start("sandbox", [*self._commands.sandbox, "--listen", listen], 5.0)
        self._start("accounting", self._commands.accounting, 30.0)
        self._start("admin_api", self._commands.admin_api, 10.0)
        self._start("proxy", self._commands.proxy, drain + 10.0, reloads=True)
        self._wait_until_answers("admin_api", self._admin, "/healthz")
        self._wait_until_answers("proxy", self._private, "/readyz")

    def _start(
        self, name: str, command: Sequence[str], stop_timeout_seconds: float, reloads: bool = False
    ) -> None:
        part = Part.start(name, command, self._data_dir, self._env, stop_timeout_seconds)
        part.reloads = reloads
        self._add(part)

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        say(f"started {part.name}")
        self._obey()

    def _wait_until_answers(self, name: str, address: Address, path: str) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
        while not answers(address, path):
            self._watch()
            if time.monotonic() > deadline:
                part = next(part for part in self._parts if part.name == name)
                raise StartError(
                    f"{name} did not answer {path} on {address} within"
                    f" {_READY_TIMEOUT_SECONDS:.0f} s; {part.last_words()}"
                )
            time.sleep(_POLL_SECONDS)

    def _introduce(self) -> None:
        demo = up_demo.prepare(
            connectable(self._admin),
            self._operator_token,
            self._data_dir / "demo.json",
            self._settings.trial_usd,
            self._watch,
        )
        say(
            up_demo.introduction(
                demo,
                model=up_demo.first_model(self._catalogue, _SANDBOX if self._sandbox else None),
                public=connectable(self._listen),
                admin=connectable(self._admin),
                private=connectable(self._private),
                data_dir=Path(self._settings.data_dir),
            )
        )

    def _watch(self) -> None:
        """Raises StopRequested when asked to stop, StartError when a part has died."""
        self._obey()
        for part in self._parts:
            if not part.alive():
                raise StartError(part.last_words())

    def _obey(self) -> None:
        if self._stop_requested:
            raise StopRequested

    def _stop(self) -> None:
        """The other way round: the proxy drains while all it needs is still there."""
        while self._parts:
            part = self._parts.pop()
            if part.alive():
                say(f"stopping {part.name} … ", end="")
                say("done" if part.stop() else "did not end in time, killed")
            else:
                part.stop()


def run_as_script() -> int:
    """`python -m accounting.up [--sandbox]`: the same, without the installed script."""
    return main(["up", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run_as_script())
