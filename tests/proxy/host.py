"""A real `python -m proxy` under the test's hand: its processes, ports, log and catalogue."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from redis import Redis

from benchmarks.provider import StandInProvider
from tests.contract.store import Store
from tests.proxy.ends import STREAM_HEAD, Answer, Client, Provider, chat, delta, request, sse
from tests.proxy.harness import CATALOGUE, MODELS, PROVIDER_KEY, Oracle, Seeds, described
from tests.stack import is_alive
from tests.waiting import eventually, free_port

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 30.0


def quiet_port() -> int:
    """A free port below those that connections take for themselves meanwhile."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port


class Host:
    """One `python -m proxy` on free ports, and all it has said on stderr."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self.port, self.private_port = quiet_port(), quiet_port()
        self.folder = folder
        self.catalogue = folder / "catalogue.toml"
        self.said = ""
        self.main = StandInProvider(api_key=PROVIDER_KEY)
        self.raw = Provider()
        self.env = {
            **{name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")},
            "TEST_PROVIDER_KEY": PROVIDER_KEY,
            "TOLLGATE_LISTEN": f"127.0.0.1:{self.port}",
            "TOLLGATE_PRIVATE_LISTEN": f"127.0.0.1:{self.private_port}",
            "TOLLGATE_WORKERS": "1",
            "TOLLGATE_REDIS_URL": redis_url,
            "TOLLGATE_CATALOGUE": str(self.catalogue),
            "TOLLGATE_DATA_DIR": str(folder / "data"),
            "TOLLGATE_HEARTBEAT_SECONDS": "0.2",
            "TOLLGATE_DRAIN_TIMEOUT_SECONDS": "5",
            "TOLLGATE_DRAIN_IDLE_SECONDS": "0.2",
            "TOLLGATE_REDIS_TIMEOUT_SECONDS": "5",
        }
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._clients: list[Client] = []

    async def open(self) -> Self:
        await self.main.start()
        await self.raw.start()
        self.write_catalogue(MODELS)
        return self

    def write_catalogue(self, models: dict[str, list[str]]) -> None:
        ports = {"main": self.main.port, "spare": self.main.port, "raw": self.raw.port}
        self.catalogue.write_text(CATALOGUE.format(dead=free_port(), **ports) + described(models))

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def start(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "proxy", cwd=ROOT, env=self.env, stderr=subprocess.PIPE
        )
        self._listening = asyncio.create_task(self._listen())
        return self

    async def _listen(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.said += line.decode()

    async def until_ready(self) -> Self:
        await eventually(self._is_ready, END_SECONDS)
        return self

    async def _is_ready(self) -> bool:
        if self.process.returncode is not None:
            await self.ended()
            raise AssertionError((self.process.returncode, self.said))
        try:
            return (await self.get("/readyz")).status == 200
        except OSError:
            return False

    async def get(self, path: str) -> Answer:
        """From the private port."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.private_port))
        client >> request("", method="GET", path=path, Connection="close")
        answer = await client.answer()
        client.close()
        return answer

    async def ended(self) -> int:
        """Its exit status, once it has one."""
        async with asyncio.timeout(END_SECONDS):
            status = await self.process.wait()
            assert self._listening is not None
            await self._listening
        return status

    def workers(self) -> list[psutil.Process]:
        return [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if is_alive(one)
        ]

    def log(self, event: str) -> list[dict[str, Any]]:
        """What it logged of an event."""
        lines = [json.loads(line) for line in self.said.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def ask(self, secret: str, body: object, **more: str) -> Answer:
        client = await self.client()
        client >> request(secret, body, **more)
        answer = await client.answer()
        client.close()
        return answer

    async def close(self) -> None:
        for client in self._clients:
            client.leave()
        if self._process is not None:
            if self._process.returncode is None:
                self._process.terminate()
            await self.ended()
        await self.raw.stop()
        await self.main.stop()


@pytest.fixture
def seeds(redis_url: str) -> Iterator[Seeds]:
    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield Seeds(Store(client))


@pytest.fixture
async def host(tmp_path: Path, redis_url: str, seeds: Seeds) -> AsyncIterator[Host]:
    """Not started yet. In the end it is stopped, and the oracle looks at what is left."""
    found = await Host(tmp_path, redis_url).open()
    yield found
    await found.close()
    Oracle(seeds).check()


async def stream_begun(host: Host, secret: str) -> tuple[Client, Any]:
    """A stream of which two chunks have passed."""
    client = await host.client()
    client >> request(secret, chat(model="raw", stream=True))
    upstream = await host.raw.call()
    await upstream.hears()
    upstream >> STREAM_HEAD + sse(delta("")) + sse(delta("Hello, world"))
    assert (await client.status())[0] == 200
    await client.event()
    assert await client.event() == delta("Hello, world")
    return client, upstream
