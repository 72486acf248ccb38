"""A real proxy worker in the test's own event loop, between real Redis and stand-in providers.

`start(**settings)` builds everything once per test: the worker of `python -m proxy.worker` on
a free port, its catalogue, two stand-in providers and one whose bytes the test writes. When a
test ends, the `Oracle` looks at what it left in Redis: every hold gone, and the balance down
by exactly the charges of the events in the stream.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis import Redis

from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import KeyCounters, KeyRecord, KeyRules
from accounting.contract.money import parse_credits
from accounting.contract.settings import Address, Secret, Settings
from accounting.contract.usage_event import UsageEvent, decode_event, split_events
from benchmarks.provider import StandInProvider
from proxy import metrics, worker
from proxy.supervisor import listen
from proxy.worker import Worker
from tests.contract.store import Store
from tests.proxy.ends import Answer, Client, Provider, request
from tests.waiting import eventually, free_port

PROVIDER_KEY = "sk-provider-secret-0123456789"
INPUT_UCR, CACHED_UCR, OUTPUT_UCR = 15, 7.5, 60  # per token
BALANCE_UCR = 2_000_000_000
_STOP_SECONDS = 20.0

CATALOGUE = """
[providers.main]
base_url = "http://127.0.0.1:{main}/v1"
api_key_env = "TEST_PROVIDER_KEY"
[providers.spare]
base_url = "http://127.0.0.1:{spare}/v1"
api_key_env = "TEST_PROVIDER_KEY"
[providers.raw]
base_url = "http://127.0.0.1:{raw}/v1"
api_key_env = "TEST_PROVIDER_KEY"
[providers.dead]
base_url = "http://127.0.0.1:{dead}/v1"
"""
MODELS = {
    "small": ["main/small-there"],
    "other": ["main/other"],
    "pair": ["main/pair-main", "spare/pair-spare"],
    "dead": ["dead/gone"],
    "dead-pair": ["dead/gone", "spare/pair-spare"],
    "raw": ["raw/raw-there"],
    "raw-pair": ["raw/raw-there", "spare/pair-spare"],
    "vast": ["main/vast"],
    "raw-vast": ["raw/raw-there"],
}
MODEL = """
[models."{name}"]
targets = {targets}
context_tokens = 8000
max_output_tokens = {output}
price = {{ input = "15", cached_input = "7.5", output = "60" }}
"""


def described(models: dict[str, list[str]]) -> str:
    """Models for the catalogue; those whose name says so may answer without end, nearly."""
    return "".join(
        MODEL.format(name=name, targets=targets, output=10**6 if "vast" in name else 1000)
        for name, targets in models.items()
    )


_TEST_SETTINGS: dict[str, Any] = {
    "journal_slots": 4096,
    "settle_interval_seconds": 0.001,
    "redis_timeout_seconds": 5.0,
    "drain_timeout_seconds": 0.1,
    "admin_listen": Address("127.0.0.1", 1),
}


@dataclass(frozen=True)
class Key:
    """A seeded workspace with one key."""

    secret: str
    key_id: str
    workspace_id: str
    balance_ucr: int

    @property
    def digest(self) -> str:
        return keyspace.digest_of(self.secret)


class Seeds:
    """Puts workspaces, credit and keys straight into Redis, as accounting would."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.keys: list[Key] = []
        store.client.set(keyspace.EPOCH, "1")

    def key(
        self,
        balance_ucr: int = BALANCE_UCR,
        allowed_models: tuple[str, ...] = (),
        state: int = keyspace.ACTIVE,
        **rules: Any,
    ) -> Key:
        """A workspace with a balance and a key, limited by `rules` (fields of KeyRules)."""
        number = len(self.keys)
        key = Key(f"inf_{number:043d}", new_id("key"), new_id("ws"), balance_ucr)
        self.store.fund(key.workspace_id, balance_ucr, key.key_id, **rules)
        self.store.put_workspace(key.workspace_id, state)
        self.record(key, allowed_models=allowed_models)
        self.keys.append(key)
        return key

    def record(self, key: Key, version: int = 1, allowed_models: tuple[str, ...] = ()) -> None:
        """What the key's secret stands for."""
        record = KeyRecord(version, key.key_id, key.workspace_id, "test", [], list(allowed_models))
        packed = msgspec.msgpack.encode(record)
        self.store.client.set(keyspace.digest_key(key.digest), packed)

    def rules(self, key: Key, version: int, state: int = keyspace.LIVE, **rules: Any) -> None:
        """New rules of a key, as accounting publishes them."""
        found = KeyRules(version, state, **rules)
        self.store.put_key(key.workspace_id, key.key_id, found)

    def counters(self, key: Key) -> KeyCounters:
        found = self.store.snapshot(key.workspace_id).counters
        return found.get(key.key_id, KeyCounters())

    def events(self, key: Key) -> list[UsageEvent]:
        """The usage events of the key in the stream, in order."""
        found = []
        for _, fields in self.store.stream(key.workspace_id):
            found += map(decode_event, split_events(fields[b"e"]))
        return [event for event in found if event.key_id == key.key_id]

    def bytes(self) -> dict[bytes, bytes]:
        """Every key of Redis with its DUMP, but for the workers' heartbeats."""
        found = self.store.everything()
        return {name: dump for name, dump in found.items() if not name.startswith(b"{workers}:")}


class Oracle:
    """What must hold in Redis once nothing is under way any more."""

    def __init__(self, seeds: Seeds) -> None:
        self._seeds = seeds

    def check(self) -> None:
        for key in self._seeds.keys:
            self._check(key)

    def _check(self, key: Key) -> None:
        events = self._seeds.events(key)
        charged = sum(event.charge_ucr for event in events)
        snapshot = self._seeds.store.snapshot(key.workspace_id)
        assert snapshot.wallet is not None
        assert snapshot.wallet.held == 0, snapshot
        assert snapshot.wallet.balance == key.balance_ucr - charged, (snapshot, events)
        for lease in snapshot.leases.values():
            assert (lease.credits_ucr, lease.tokens, lease.slots) == (0, 0, 0), snapshot
        counters = snapshot.counters.get(key.key_id, KeyCounters())
        assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0), counters
        assert counters.spent_ucr == charged, counters
        used = sum(event.tokens.input + event.tokens.output for event in events)
        today = int(time.time() // 86_400)
        assert counters.day_tokens == used or counters.day != today or not events
        self._check_events(events)

    def _check_events(self, events: list[UsageEvent]) -> None:
        assert len({event.request_id for event in events}) == len(events)
        for event in events:
            assert 0 <= event.charge_ucr <= event.hold_ucr
            if event.settlement == "void":
                assert event.charge_ucr == 0 and event.tokens.output == event.tokens.input == 0


class Proxy:
    """One worker and everything around it."""

    def __init__(self, started: Worker, port: int, task: "asyncio.Task[None]") -> None:
        self.worker = started
        self.services = started.services
        self.port = port
        self._task = task

    async def stop(self) -> None:
        """As SIGTERM does."""
        self.worker._stopping.set()
        async with asyncio.timeout(_STOP_SECONDS):
            await self._task


class Scene:
    """The whole of a test: `proxy` (more by `another`), providers, Redis, clients."""

    def __init__(self, stack: AsyncExitStack, seeds: Seeds, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._clients: list[Client] = []
        self.proxies: list[Proxy] = []
        self.seeds = seeds
        self.main = StandInProvider(api_key=PROVIDER_KEY)
        self.spare = StandInProvider(api_key=PROVIDER_KEY)
        self.raw = Provider()
        self.settings: Settings

    async def open(self, settings: dict[str, Any], redis_url: str) -> None:
        await self._stack.enter_async_context(self.main)
        await self._stack.enter_async_context(self.spare)
        await self.raw.start()
        self._stack.push_async_callback(self.raw.stop)
        path = self._folder / "catalogue.toml"
        path.write_text(self.catalogue())
        self.settings = Settings(
            **_TEST_SETTINGS
            | {"redis_url": Secret(redis_url), "catalogue": str(path)}
            | {"data_dir": str(self._folder)}
            | settings
        )
        await self.another()

    def catalogue(self) -> str:
        ports = {"main": self.main.port, "spare": self.spare.port, "raw": self.raw.port}
        return CATALOGUE.format(dead=free_port(), **ports) + described(MODELS)

    @property
    def services(self) -> Any:
        return self.proxies[0].services

    async def another(self) -> Proxy:
        """One more worker, with a boot of its own."""
        path = self._folder / f"metrics-{len(self.proxies)}"
        metrics.create(path, 1)
        listener = listen(Address("127.0.0.1", 0), 1)[0]
        started = Worker(self.settings, 0, path)
        task = asyncio.create_task(started.run(listener))
        await eventually(lambda: task.done() or started.services.gate_open)
        if task.done():
            await task
        proxy = Proxy(started, listener.getsockname()[1], task)
        self.proxies.append(proxy)
        self._stack.push_async_callback(proxy.stop)
        return proxy

    # Clients

    async def client(self, proxy: Proxy | None = None) -> Client:
        """A new connection to the proxy."""
        port = (proxy or self.proxies[0]).port
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        self._clients.append(client)
        return client

    async def ask(
        self, key: Key | str, body: object = None, proxy: Proxy | None = None, **more: str
    ) -> Answer:
        """One request on a connection of its own, read to its end."""
        client = await self.client(proxy)
        secret = key if isinstance(key, str) else key.secret
        client >> request(secret, body, **more)
        answer = await client.answer()
        client.close()
        return answer

    # What is left

    async def quiet(self, timeout_seconds: float = 5.0) -> None:
        """Wait until every exchange has ended and Redis has acknowledged every settle."""
        await eventually(lambda: not any(map(_busy, self.proxies)), timeout_seconds)

    async def given_back(self) -> None:
        """The same, and nothing is held in Redis any more: neither for a request nor ahead."""
        await self.quiet()
        wallet = self.seeds.store.wallet
        keys = self.seeds.keys
        await eventually(lambda: not any(wallet(key.workspace_id).held for key in keys), 2.0)

    async def events(self, key: Key) -> list[UsageEvent]:
        """The key's usage events, once all are in the stream."""
        await self.quiet()
        return self.seeds.events(key)

    @asynccontextmanager
    async def no_trace(self) -> AsyncIterator[None]:
        """What happens within changes not one byte of Redis."""
        await self.given_back()
        before = self.seeds.bytes()
        yield
        await self.given_back()
        assert self.seeds.bytes() == before

    @asynccontextmanager
    async def no_trace_while_busy(self) -> AsyncIterator[None]:
        """The same while other exchanges are open and stay so."""
        before = self.seeds.bytes()
        yield
        assert self.seeds.bytes() == before

    async def close(self) -> None:
        for client in self._clients:
            client.leave()
        await self.given_back()


def _busy(proxy: Proxy) -> bool:
    services = proxy.services
    return bool(services.exchanges or services.settlement.unacknowledged or services.journal.used)


Start = Callable[..., Awaitable[Scene]]


@pytest.fixture
async def start(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Start]:
    """`await start(**settings)`: the scene of a test, closed and audited at its end."""
    monkeypatch.setenv("TEST_PROVIDER_KEY", PROVIDER_KEY)
    monkeypatch.setattr(worker, "_SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(worker, "_UNUSED_SECONDS", 0.02, raising=False)
    thresholds = gc.get_threshold()
    with Redis.from_url(redis_url) as client:
        client.flushall()
        seeds = Seeds(Store(client))
        async with AsyncExitStack() as stack:
            scenes: list[Scene] = []

            async def begin(**settings: Any) -> Scene:
                scene = Scene(stack, seeds, tmp_path)
                scenes.append(scene)
                await scene.open(settings, redis_url)
                return scene

            yield begin
            for scene in scenes:
                await scene.close()
            Oracle(seeds).check()
    gc.set_threshold(*thresholds)


@pytest.fixture
async def proxy(start: Start) -> Scene:
    """A scene with the settings of the tests."""
    return await start()


def credits_of(answer: Answer) -> int:
    """What the client was told that it paid, in µcr."""
    if "x-credits-used" in answer.headers:
        return parse_credits(answer.headers["x-credits-used"])
    last = answer.events[-2] if answer.events[-1] == "[DONE]" else answer.events[-1]
    return parse_credits(last["credits_used"])
