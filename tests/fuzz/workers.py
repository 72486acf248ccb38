"""Workers under a test's hand: real leases, settles, journals and replays, on a real Redis.

Time is a number. What a worker sends arrives at Redis when the test says so, and what Redis
answers reaches the worker when the test says so, or never: so a worker can be slow, paused,
cut off or dead at any point between two commands. `History` writes down what really happened,
in the order in which it did.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hiredis
import msgspec

from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import KeyRecord, KeyRules
from accounting.contract.pricing import Price, Rates
from accounting.contract.scripts import SCRIPTS
from accounting.contract.usage_event import (
    SCHEMA,
    TokenUsage,
    UsageEvent,
    decode_event,
    encode_event,
    split_events,
)
from proxy.admission import Hold
from proxy.journal import Journal, find_orphans
from proxy.key_lease import Ask, KeyLease, Stale
from proxy.leases import Leases
from proxy.redis_pipe import RedisDown, pack
from proxy.replay import Opening, replay, retire
from proxy.settle_record import Settle, encode_settle
from proxy.settlement import Settlement, is_fenced
from tests.contract.store import Store

WS = next(ws for ws in map("ws_{}".format, range(1000)) if not keyspace.shard_of(ws))
SHARD = 0  # the only one that is looked through for what the dead have left
SLOTS = 256
_CLOCKED = "redis.call('TIME')", "redis.call('LRANGE', 'clock', 0, 1)"
_RATES = Rates(1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000)
_PRICE = Price(_RATES, 0, None, "v")


class Moment(NamedTuple):
    """When something happened, µs, and after how much else."""

    now_us: int
    order: int


class Request(NamedTuple):
    """One that was admitted."""

    id: str
    key: str
    credits: int
    tokens: int
    slot: int
    lease: KeyLease


class History:
    """What happened: admissions, settles as Redis took them, changes of rules."""

    def __init__(self) -> None:
        self.facts: list[tuple[Moment, str, Any]] = []

    def add(self, moment: Moment, kind: str, fact: Any) -> None:
        self.facts.append((moment, kind, fact))

    def in_order(self) -> list[tuple[Moment, str, Any]]:
        return sorted(self.facts, key=lambda fact: fact[0])


class Scene:
    """Redis, the time, and all workers there ever were."""

    def __init__(self, store: Store, url: str, folder: Path, loop: asyncio.AbstractEventLoop):
        self.store = store
        self.folder = folder
        self.loop = loop
        self.history = History()
        self.now_us = 20_000 * 86_400_000_000 + 43_200_000_000
        self.delivering: Moment | None = None
        self.workers: list[Worker] = []
        self._order = 0
        self._reader = hiredis.Reader()
        self._socket = _connected(url)
        self._digests: dict[bytes, bytes] = {}
        for script in SCRIPTS.values():
            with_clock = script.source.replace(*_CLOCKED)
            digest = self._ask(pack(("SCRIPT", "LOAD", with_clock)))
            self._digests[script.digest.encode()] = digest
        self.set_time(self.now_us)

    def close(self) -> None:
        for worker in self.workers:
            if not worker.dead:
                worker.journal.close(remove=True)
        self._socket.close()

    def set_time(self, now_us: int) -> None:
        self.now_us = now_us
        self.store.set_clock(now_us)

    def moment(self) -> Moment:
        self._order += 1
        return Moment(self.now_us, self._order)

    def _ask(self, packed: bytes) -> Any:
        self._socket.sendall(packed)
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 20))
        return reply

    def arrive(self, packed: bytes) -> tuple[Moment, Any]:
        """One command reaches Redis; every script in it reads the scene's time."""
        for digest, clocked in self._digests.items():
            packed = packed.replace(digest, clocked)
        reply, moment = self._ask(packed), self.moment()
        words = _words(packed)
        if words[0] == b"PUBLISH":
            for worker in self.workers:
                worker.recalls.append(words[2].decode())
        if words[1] == self._digests[SCRIPTS["settle"].digest.encode()] and reply:
            if isinstance(reply, Exception):
                assert is_fenced(reply), reply
                return moment, reply
            ((_, entry),) = self.store.client.xrange(keyspace.stream_key(SHARD), reply, reply)
            for event in split_events(entry[b"e"]):
                self.history.add(moment, "settled", decode_event(event))
        return moment, reply

    def wait(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def replay(self) -> None:
        """What dead workers left behind, as a living one does it."""
        for orphan in find_orphans(self.folder):
            self.wait(replay(orphan, _AtOnce(self)))  # type: ignore[arg-type]
            orphan.close(remove=True)

    def rules(self, key: str, rules: KeyRules) -> None:
        self.store.put_key(WS, key, rules)
        self.history.add(self.moment(), "rules", (key, rules))


class _AtOnce:
    """A pipe on which everything arrives and is answered at once."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    async def call(self, packed: bytes) -> Any:
        reply = self._scene.arrive(packed)[1]
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def command(self, *words: Any) -> Any:
        return await self.call(pack(words))


class Wire:
    """A worker's connection to Redis."""

    up = True

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.sent: deque[tuple[bytes, Callable[[Any], None]]] = deque()
        self.answered: deque[tuple[Moment, Any, Callable[[Any], None]]] = deque()

    def send(self, packed: bytes, on_reply: Callable[[Any], None]) -> None:
        self.sent.append((packed, on_reply))

    def arrive(self, count: int) -> None:
        for _ in range(min(count, len(self.sent))):
            packed, on_reply = self.sent.popleft()
            self.answered.append((*self._scene.arrive(packed), on_reply))

    def deliver(self, count: int) -> None:
        for _ in range(min(count, len(self.answered))):
            self._scene.delivering, reply, on_reply = self.answered.popleft()
            on_reply(reply)
        self._scene.delivering = None

    def lose(self) -> None:
        """It breaks: what has arrived stays done, and nobody is told of it."""
        unknown = [on_reply for _, _, on_reply in self.answered]
        unknown += [on_reply for _, on_reply in self.sent]
        self.answered.clear()
        self.sent.clear()
        for on_reply in unknown:
            on_reply(RedisDown())


class Worker:
    """One worker process."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.boot = f"boot_{len(scene.workers)}"
        self._started_us = scene.now_us - 1_000_003 * (1 + len(scene.workers))  # clocks differ
        self.wire = Wire(scene)
        self.journal = Journal(scene.folder / f"{self.boot}.journal", SLOTS)
        self.timers: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = []
        self.recalls: list[str] = []
        self.versions: dict[str, int] = {}
        self.open: list[Request] = []
        self.told: list[Any] = []
        self.paused = self.dead = False
        self.leases, self.settlement = scene.wait(self._parts())
        self.leases.may_lease_ahead = True
        scene.workers.append(self)

    async def _parts(self) -> tuple[Leases, Settlement]:
        leases = Leases(self.wire, self.boot, self._clock)  # type: ignore[arg-type]
        parts = self.wire, self.journal, self.boot, 0.02, 8, self.told.append
        settlement = Settlement(*parts)  # type: ignore[arg-type]
        leases._loop = settlement._loop = self  # type: ignore[assignment]
        return leases, settlement

    def __repr__(self) -> str:
        return f"Worker({self.boot}, open={len(self.open)}, {self.leases})"

    def _clock(self) -> float:
        return (self._scene.now_us - self._started_us) / 1e6

    def call_later(self, seconds: float, call: Callable[..., None], *words: Any) -> None:
        """As its event loop would; see `run_timers`."""
        self.timers.append((self._scene.now_us + round(seconds * 1e6), call, words))

    def run_timers(self) -> None:
        due = [timer for timer in self.timers if timer[0] <= self._scene.now_us]
        self.timers = [timer for timer in self.timers if timer[0] > self._scene.now_us]
        for _, call, words in due:
            call(*words)

    def flow(self) -> None:
        """All that is on its way in either direction gets there."""
        while self.wire.sent or self.wire.answered:
            self.wire.arrive(1)
            self.wire.deliver(1)

    def hear(self) -> None:
        """The recalls published since it last listened."""
        recalls, self.recalls = self.recalls, []
        for workspace_id in recalls:
            self.leases.recalled(workspace_id)

    def ask(self, key: str, credits: int, tokens: int) -> None:
        """One request comes in; without a slot for it in the journal it is not even asked for."""
        if self.journal.used == SLOTS:
            return
        slot = self.journal.reserve()
        version = self.versions.setdefault(key, 1)
        record = KeyRecord(version, key, WS, "test", [], [])

        def told(outcome: Any) -> None:
            self.told.append(outcome)
            if isinstance(outcome, Hold):
                moment = self._scene.delivering or self._scene.moment()
                self._admitted(key, credits, tokens, slot, outcome, moment)
                return
            self.journal.free(slot)
            if isinstance(outcome, Stale):
                self.versions[key] = self._scene.store.snapshot(WS).rules[key].version

        self.leases.admit(record, Ask(credits, tokens, 1, version, told))

    def _admitted(
        self, key: str, credits: int, tokens: int, slot: int, hold: Hold, moment: Moment
    ) -> None:
        request_id = new_id("req")
        begun = self._event(request_id, key, credits)
        opening = Opening(begun, _PRICE, tokens, tokens, tokens, tokens, hold.admitted_at_us)
        self.journal.open(slot, msgspec.msgpack.encode(opening))
        lease = self.leases.of(KeyRecord(1, key, WS, "test", [], []))
        request = Request(request_id, key, credits, tokens, slot, lease)
        self.open.append(request)
        self._scene.history.add(moment, "admitted", request)

    def end(self, request: Request, charge: int, used: int) -> None:
        """It is over: charged, or void where nothing was used."""
        self.open.remove(request)
        event = msgspec.structs.replace(
            self._event(request.id, request.key, request.credits),
            charge_ucr=charge,
            tokens=TokenUsage(used, 0),
            settlement="exact" if used else "void",
        )
        void_at_us = 0 if used else self._scene.now_us
        amounts = request.credits, charge, request.tokens, used, void_at_us
        settle = Settle(WS, request.key, *amounts, encode_event(event))
        self.journal.settle(request.slot, encode_settle(settle))
        self.settlement.submit(SHARD, settle, request.slot, request.lease)

    def _event(self, request_id: str, key: str, hold: int) -> UsageEvent:
        names = "/v1/chat/completions", "m", "p/m", "v"
        how = "void", "cut", 200, False, 0
        return UsageEvent(
            SCHEMA, request_id, WS, key, *names, 1, 0, hold, 0, *how, TokenUsage(), 1, 1, 1, 1, 1
        )

    def die(self) -> None:
        """SIGKILL: what it had sent may still arrive; its journal is all that it leaves."""
        self.dead = True
        self.journal.close(remove=False)

    def stop(self) -> None:
        """SIGTERM, in order: all its requests end, and are charged in full."""
        while self.open or self.wire.sent or self.wire.answered or self.timers:
            for one in list(self.open):
                self.end(one, one.credits, one.tokens)
            self._scene.set_time(max([self._scene.now_us] + [due for due, *_ in self.timers]))
            self.flow()
            self.run_timers()
        assert not self.settlement.unacknowledged and not self.journal.used
        self.leases.release_all()
        self.flow()
        self._scene.wait(retire(_AtOnce(self._scene), self.boot))  # type: ignore[arg-type]
        self.dead = True
        self.journal.close(remove=True)


def _words(packed: bytes) -> list[bytes]:
    reader = hiredis.Reader()
    reader.feed(packed)
    words: list[bytes] = reader.gets()
    return words


def _connected(url: str) -> socket.socket:
    found = urlsplit(url)
    connection = socket.create_connection((found.hostname or "127.0.0.1", found.port or 6379))
    if found.password:
        connection.sendall(pack(("AUTH", found.password)))
        assert connection.recv(100).startswith(b"+OK")
    return connection
