"""The product's real processes on one machine, restarted when they die, as an init system would.

Owns Redis and Postgres of its own, a stand-in provider, one proxy host with two workers, two
accounting processes and the admin API; their ports stay the same for the whole run. What is
done to them is `injector`'s.

Children die with the thread that started them, so one thread starts them all, and lives as long
as the site.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import psutil

from accounting.child import Child
from accounting.embedded import Server, start_postgres, start_redis
from accounting.embedded_files import write_private
from tests.chaos.wire import ask, request
from tests.proxy.host import quiet_port
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "operator-of-the-chaos"
WORKERS = 2
LOOK_SECONDS = 0.05
START_SECONDS = 60.0
AGAIN_SECONDS = 0.3  # between two starts of a part that does not stay

CATALOGUE = """
[providers.main]
base_url = "http://127.0.0.1:{port}/v1"

[providers.spare]
base_url = "http://localhost:{port}/v1"

[models.sandbox]
targets = ["main/sandbox", "spare/sandbox"]
context_tokens = 8000
max_output_tokens = 1000
price = {{ input = "15", cached_input = "7.5", output = "60" }}
"""


class Site:
    """See the module. `restarts` counts by part, those after a fault and by themselves alike."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "data"
        self.logs = folder / "logs"
        self.catalogue = folder / "catalogue.toml"
        self.port, self.private_port, self.admin_port = (quiet_port() for _ in range(3))
        self.provider_port = quiet_port()
        self.redis: Server
        self.postgres: Server
        self.restarts: Counter[str] = Counter()
        self.held: set[str] = set()  # parts that nobody may start now
        self._parts: dict[str, Child] = {}
        self._started_at: dict[str, float] = {}
        self._starts: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1)
        self._env: dict[str, str] = {}
        self._watching: asyncio.Task[None] | None = None
        self._provider: Child

    def __repr__(self) -> str:
        return f"<Site {self._parts}>"

    @property
    def redis_url(self) -> str:
        return self.redis.url

    @property
    def database_url(self) -> str:
        return self.postgres.url

    async def in_thread(self, call: Callable[[], Any]) -> Any:
        """In the thread that children are started from."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # Starting and ending

    async def open(self) -> Self:
        self.data_dir.mkdir(mode=0o700, parents=True)
        self.logs.mkdir()
        self.catalogue.write_text(CATALOGUE.format(port=self.provider_port))
        for name in ("redis", "postgres"):
            write_private(self.data_dir / f"{name}.port", str(quiet_port()))
        await self.in_thread(self._start_provider)
        await self.start_redis()
        await self.start_postgres()
        self._env = self._environment()
        migration = await self.in_thread(lambda: self._start("migrate", ["accounting", "migrate"]))
        await eventually(lambda: not migration.alive(), START_SECONDS)
        assert migration.exit_code == 0, migration.tail()
        for name in COMMANDS:
            await self.in_thread(lambda name=name: self._start_part(name))
        self._watching = asyncio.create_task(self._watch())
        await eventually(self.is_ready, START_SECONDS)
        return self

    def _environment(self) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")}
        return kept | {
            "PYTHONUNBUFFERED": "1",
            "TOLLGATE_REDIS_URL": self.redis_url,
            "TOLLGATE_DATABASE_URL": self.database_url,
            "TOLLGATE_DATA_DIR": str(self.data_dir),
            "TOLLGATE_CATALOGUE": str(self.catalogue),
            "TOLLGATE_OPERATOR_TOKEN": TOKEN,
            "TOLLGATE_WORKERS": str(WORKERS),
            "TOLLGATE_LISTEN": f"127.0.0.1:{self.port}",
            "TOLLGATE_PRIVATE_LISTEN": f"127.0.0.1:{self.private_port}",
            "TOLLGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TOLLGATE_ACCOUNTING_LISTEN": "127.0.0.1:0",
            "TOLLGATE_AUDIT_SECONDS": "0",
            "TOLLGATE_HEARTBEAT_SECONDS": "0.2",
            "TOLLGATE_REAP_SECONDS": "5",
            "TOLLGATE_DRAIN_TIMEOUT_SECONDS": "2",
            "TOLLGATE_DRAIN_IDLE_SECONDS": "0.2",
            "TOLLGATE_CHUNK_TIMEOUT_SECONDS": "2",
            "TOLLGATE_FIRST_BYTE_TIMEOUT_SECONDS": "4",
            "TOLLGATE_TOTAL_TIMEOUT_SECONDS": "30",
        }

    def _start(self, name: str, words: Sequence[str]) -> Child:
        self._starts[name] += 1
        log = self.logs / f"{name}.{self._starts[name]}.log"
        return Child(name, [sys.executable, "-m", *words], log=log, cwd=ROOT, env=self._env)

    def _start_provider(self) -> None:
        self._env = dict(os.environ)
        listen = f"127.0.0.1:{self.provider_port}"
        self._provider = self._start("provider", ["benchmarks.provider", "--listen", listen])

    def _start_part(self, name: str) -> None:
        self._started_at[name] = time.monotonic()
        self._parts[name] = self._start(name, COMMANDS[name])

    async def start_redis(self) -> None:
        self.redis = await self.in_thread(lambda: start_redis(self.data_dir))

    async def start_postgres(self) -> None:
        self.postgres = await self.in_thread(lambda: start_postgres(self.data_dir))

    async def _watch(self) -> None:
        """Start again what has ended."""
        while True:
            for name, part in list(self._parts.items()):
                young = time.monotonic() - self._started_at[name] < AGAIN_SECONDS
                if not part.alive() and not young and name not in self.held:
                    self.restarts[name] += 1
                    await self.in_thread(lambda name=name: self._start_part(name))
            await asyncio.sleep(LOOK_SECONDS)

    async def close(self) -> None:
        """End everything, for certain; what is left of earlier starts, too."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for one in self.processes():
            one.send_signal(signal.SIGCONT)
        for part in [*self._parts.values(), self._provider]:
            await self.in_thread(lambda part=part: part.stop(10.0))
        for one in self.processes():
            one.kill()
        for server in ("redis", "postgres"):
            if hasattr(self, server):
                await self.in_thread(getattr(self, server).stop)
        self._thread.shutdown()

    # Its processes

    def processes(self) -> list[psutil.Process]:
        """All that run for this site, but the stores; of earlier starts, too."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.environ().get("TOLLGATE_DATA_DIR") == str(self.data_dir):
                    found.append(one)
        return found

    def part(self, name: str) -> psutil.Process:
        return psutil.Process(self._parts[name].pid)

    def workers(self) -> list[psutil.Process]:
        """Of the supervisor there is now."""
        try:
            found = self.part("proxy").children()
        except psutil.Error:
            return []
        return [one for one in found if one.is_running() and "proxy.worker" in words_of(one)]

    def postgres_processes(self) -> list[psutil.Process]:
        try:
            head = psutil.Process(self.postgres.pid)
            return [head, *head.children(recursive=True)]
        except psutil.Error:
            return []

    # What it says of itself

    async def is_ready(self) -> bool:
        """Every worker serves and may admit."""
        return (await self._private("/readyz"))[0] == 200

    async def _private(self, path: str) -> tuple[int, str]:
        try:
            answer = await ask(self.private_port, request("GET", path, "none"), 1.0)
        except OSError:
            return 0, ""
        return answer.status, answer.body.decode()

    async def gauge(self, name: str) -> float | None:
        """One of the proxy's figures; None while it cannot be asked."""
        status, text = await self._private("/metrics")
        found = re.search(rf"^{name} (\S+)$", text, re.M)
        return float(found[1]) if status == 200 and found else None

    def log_lines(self) -> Iterable[str]:
        """Everything its parts have said, the stores apart."""
        for path in sorted(self.logs.glob("*.log")):
            for line in path.read_text(errors="replace").splitlines():
                yield f"{path.stem}: {line}"


COMMANDS = {
    "proxy": ["proxy"],
    "accounting-1": ["accounting", "run"],
    "accounting-2": ["accounting", "run"],
    "admin_api": ["admin_api"],
}


def words_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
