"""All of one host: its listening sockets, a seat for each, its catalogue, its probes.

Owns the sockets, one per worker (SO_REUSEPORT), and keeps them open across a worker's death,
so a connection made meanwhile waits for the replacement. SIGHUP rolls the workers, one after
the other; SIGTERM and SIGINT drain them all.

Theory of operation: a roll begins with proving the catalogue; what cannot be used changes
nothing. Workers read a copy of the catalogue that was proved, so they all read the same one,
and one that is replaced between two rolls is not surprised by a file half edited.
"""

import asyncio
import os
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

from accounting.contract import catalogue as catalogues
from accounting.contract.catalogue import Catalogue, CatalogueError
from accounting.contract.settings import Address, Settings
from proxy import metrics
from proxy.fleet import Fleet, StartError
from proxy.probes import Probes
from proxy.redis_pipe import RedisPipe
from proxy.seat import Seat
from proxy.upstream_tls import context_of
from proxy.worker import say

_BACKLOG = 4096


class Supervisor:
    """Runs the workers of one host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._count = settings.workers or len(os.sched_getaffinity(0))
        self._asked_to_stop = asyncio.Event()
        self._asked_to_roll = asyncio.Event()
        self._seats: list[Seat] = []
        self._run = Path(settings.data_dir) / "run"
        self._name = f"proxy-{os.getpid()}"
        self._copies = 0

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError."""
        try:
            text, _ = self._proved_catalogue()
        except CatalogueError as error:
            raise StartError(str(error)) from None
        await _reach_redis(self._settings)
        listeners = listen(self._settings.listen, self._count)
        self._run.mkdir(parents=True, exist_ok=True, mode=0o700)
        metrics_path = self._run / f"{self._name}.metrics"
        rows = self._count + 1
        metrics.create(metrics_path, rows)
        fleet = Fleet(self._settings, metrics_path, rows)
        self._seats = [Seat(fleet, *numbered) for numbered in enumerate(listeners)]
        probes = Probes(metrics.HostMetrics(metrics_path, rows), self._count)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._asked_to_roll.set)
        try:
            fleet.catalogue = self._copy(text)
            await probes.start(self._settings.private_listen)
            await self._serve(fleet)
        finally:
            await probes.stop()
            for seat in self._seats:
                seat.close()
            for path in (metrics_path, *self._run.glob(f"{self._name}-*.toml")):
                path.unlink(missing_ok=True)

    async def _serve(self, fleet: Fleet) -> None:
        keepers = [asyncio.create_task(seat.keep()) for seat in self._seats]
        stop = asyncio.create_task(self._asked_to_stop.wait())
        roller = asyncio.create_task(self._roll_when_asked(fleet))
        await asyncio.wait([stop, roller, *keepers], return_when=asyncio.FIRST_COMPLETED)
        fleet.stopping.set()
        for seat in self._seats:  # before the workers: then a worker's close is the last one
            seat.close()
        stop.cancel()
        roller.cancel()
        await fleet.stop()
        await asyncio.wait([roller, *keepers])
        failures = [one.exception() for one in (roller, *keepers) if not one.cancelled()]
        for failure in filter(None, failures):
            raise failure

    # Rolling

    async def _roll_when_asked(self, fleet: Fleet) -> None:
        """One roll at a time; whoever asks meanwhile gets one more, however many ask."""
        while True:
            await self._asked_to_roll.wait()
            self._asked_to_roll.clear()
            try:
                text, found = self._proved_catalogue()
                copy = self._copy(text)
            except CatalogueError as error:
                say("catalogue refused", why=str(error))
                continue
            except OSError as error:
                say("roll refused", why=str(error))
                continue
            before = fleet.catalogue
            if await self._roll(fleet, copy):
                say("rolled", workers=self._count, models=len(found.models))
            _forget(before if fleet.catalogue == copy else copy)

    async def _roll(self, fleet: Fleet, catalogue: str) -> bool:
        """Worker after worker; the first that gets no successor ends it."""
        for number, seat in enumerate(self._seats):
            if not await seat.roll(catalogue):
                say("roll stopped", row=number, why="the successor did not get ready")
                return False
            fleet.catalogue = catalogue
        return True

    def _proved_catalogue(self) -> tuple[str, Catalogue]:
        """The catalogue's text and what it says. Raises CatalogueError."""
        settings = self._settings
        if settings.catalogue:
            try:
                text = Path(settings.catalogue).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CatalogueError(f"catalogue {settings.catalogue}: {error}") from None
            found = catalogues.parse(text, os.environ, settings.sandbox)
        else:
            text, found = "", catalogues.load("", os.environ, settings.sandbox)
        for provider in found.providers.values():
            if provider.tls and provider.ca_file:
                context_of(provider)
        return text, found

    def _copy(self, text: str) -> str:
        """Where workers find this catalogue; nowhere for the starter catalogue."""
        if not text:
            return ""
        self._copies += 1
        path = self._run / f"{self._name}-{self._copies}.toml"
        path.write_text(text, "utf-8")
        return str(path)


def _forget(copy: str) -> None:
    if copy:
        Path(copy).unlink(missing_ok=True)


async def _reach_redis(settings: Settings) -> None:
    """Say it once, before each worker does. Raises StartError."""
    url = settings.redis_url.reveal()
    pipe = RedisPipe(url, settings.redis_timeout_seconds, settings.redis_pending, lambda up: None)
    try:
        await pipe.start()
    except (OSError, TimeoutError) as error:
        where = urlsplit(url)
        address = f"{where.hostname}:{where.port or 6379}" if where.hostname else where.path
        why = str(error) or "no answer in time"
        raise StartError(f"cannot reach Redis at {address}: {why}") from None
    await pipe.stop()


def listen(address: Address, count: int) -> list[socket.socket]:
    """`count` sockets on one address. Raises StartError when it cannot be had.

    The first is bound without SO_REUSEPORT for a moment, so that another server on the same
    port is noticed instead of shared with.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            where = (where[0], probe.getsockname()[1], *where[2:])
        return [_listener(family, kind, where) for _ in range(count)]
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror or error}") from None


def _listener(family: int, kind: int, where: object) -> socket.socket:
    one = socket.socket(family, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind(where)  # type: ignore[arg-type]
    one.listen(_BACKLOG)
    one.setblocking(False)
    return one
