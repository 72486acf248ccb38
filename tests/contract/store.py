"""The Lua scripts as the proxy and accounting call them, on a real Redis, for tests.

`Store` wraps each script with its keys and encodings. A store `with_clock` runs the very same
script text, but takes the time from a Redis list instead of TIME: what depends on the hour
can then be tested to the microsecond.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
from redis import Redis

from accounting.contract import keyspace
from accounting.contract.figures import pack_figures, unpack_figures
from accounting.contract.keyspace import KeyCounters, KeyRules, LeaseRecord, Wallet
from accounting.contract.scripts import SCRIPTS

ADMITTED, KEY_ENDED, SUSPENDED, MODEL, REQUESTS, TOKENS, DAILY, CONCURRENCY, TOO_LARGE = range(9)
CAP, BALANCE = 9, 10

MINUTE = 60_000_000
DAY = 86_400_000_000
MAX = 9_000_000_000_000_000

CLOCK = "clock"
_TIME = "redis.call('TIME')"
_CLOCK = f"redis.call('LRANGE', '{CLOCK}', 0, 1)"

pack = msgspec.msgpack.encode


class Ask(NamedTuple):
    credits: int = 0
    tokens: int = 0
    model_allowed: int = 1


class Row(NamedTuple):
    """What a settle says of one workspace and key."""

    workspace: str
    key: str = "key_1"
    credits: int = 0
    charge: int = 0
    tokens: int = 0
    used: int = 0
    slots: int = 1
    voids: tuple[int, ...] = ()


def pair_of(workspace: int, row: Row) -> tuple[str, bytes]:
    """A row as settle.lua takes it."""
    return row.key, pack_figures(workspace, *row[2:7], *row.voids)


class Verdict(NamedTuple):
    verdict: int
    detail_1: int
    detail_2: int
    requests_tat: int
    tokens_tat: int


class Leased(NamedTuple):
    code: int
    now: int
    balance: int
    held: int
    rpm: int
    tpm: int
    verdicts: list[Verdict]

    @property
    def outcomes(self) -> list[int]:
        return [verdict.verdict for verdict in self.verdicts]


@dataclass
class Snapshot:
    stream_id: bytes
    wallet: Wallet | None = None
    rules: dict[str, KeyRules] = field(default_factory=dict)
    counters: dict[str, KeyCounters] = field(default_factory=dict)
    leases: dict[str, LeaseRecord] = field(default_factory=dict)


def read_snapshot(reply: list[bytes]) -> Snapshot:
    """A reply of snapshot.lua, decoded as strictly as the product decodes it."""
    found = Snapshot(reply[0])
    for name, packed in zip(reply[1::2], reply[2::2], strict=True):
        kind, _, rest = name.decode().partition(":")
        if kind == "w":
            found.wallet = msgspec.msgpack.decode(packed, type=Wallet)
        elif kind == "k":
            found.rules[rest] = msgspec.msgpack.decode(packed, type=KeyRules)
        elif kind == "c":
            found.counters[rest] = msgspec.msgpack.decode(packed, type=KeyCounters)
        else:
            assert kind == "l", name
            found.leases[rest] = msgspec.msgpack.decode(packed, type=LeaseRecord)
    return found


def read_lease(reply: int | bytes) -> Leased:
    """A reply of lease.lua."""
    if isinstance(reply, int):
        return Leased(reply, 0, 0, 0, 0, 0, [])
    found = unpack_figures(reply)
    figures = found[5:-5]
    assert len(figures) % 5 == 0
    verdicts = [Verdict(*figures[n : n + 5]) for n in range(0, len(figures), 5)]
    return Leased(0, *found[:5], verdicts)


def same_shard(number: int, like: str = "ws_1") -> list[str]:
    """`number` workspace ids of one shard, `like` first."""
    found, count = [like], 0
    while len(found) < number:
        count += 1
        name = f"{like}_{count}"
        if keyspace.shard_of(name) == keyspace.shard_of(like):
            found.append(name)
    return found


def lease_call(
    workspace: str,
    asks: list[Ask],
    key: str = "key_1",
    boot: str = "boot_1",
    mine: tuple[int, ...] = (0, 0, 0),
    version: int = 1,
    ahead: tuple[int, int, int] = (0, 0, 0),
) -> tuple[list[str], list[Any]]:
    """KEYS and ARGV of a lease; the last four figures of `mine` may be left out."""
    shard = keyspace.shard_of(workspace)
    keys = [keyspace.workspace_key(workspace), keyspace.leases_key(shard, boot)]
    mine = mine if len(mine) == 7 else (*mine, 0, 0, 0, 0)
    figures = [version, *mine, *ahead, *(figure for ask in asks for figure in ask)]
    return keys, [boot, key, workspace, pack_figures(*figures)]


class Store:
    """One Redis and the scripts in it; every method is one script call."""

    def __init__(self, client: "Redis[bytes]", with_clock: bool = False) -> None:  # type: ignore[type-arg]
        self.client = client
        self.sources = {name: script.source for name, script in SCRIPTS.items()}
        if with_clock:
            for name in ("lease", "settle", "ahead"):
                assert self.sources[name].count(_TIME) == 1
                self.sources[name] = self.sources[name].replace(_TIME, _CLOCK)
            others = ("silent", "depart", "retire")  # about workers, or what a dead one left
            assert not any(_TIME in self.sources[name] for name in {*self.sources} - {*others})

    def run(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        return self.client.eval(self.sources[name], len(keys), *keys, *arguments)

    def set_clock(self, now_us: int) -> None:
        seconds, rest = divmod(now_us, 1_000_000)
        self.client.delete(CLOCK)
        self.client.rpush(CLOCK, seconds, rest)

    def now(self) -> int:
        seconds, rest = self.client.time()
        return int(seconds) * 1_000_000 + int(rest)

    def put_workspace(self, workspace: str, state: int = keyspace.ACTIVE) -> int:
        return int(self.run("put_workspace", [keyspace.workspace_key(workspace)], [state]))

    def put_key(self, workspace: str, key: str, rules: KeyRules) -> int:
        return int(self.run("put_key", [keyspace.workspace_key(workspace)], [key, pack(rules)]))

    def credit(self, workspace: str, delta: int, amount: int, *spent: Any) -> list[int]:
        """`spent`: a key, and by how much it has spent more."""
        keys = [keyspace.workspace_key(workspace)]
        reply: list[int] = self.run("credit", keys, [delta, amount, *spent])
        return reply

    def lease(self, workspace: str, *asks: Ask, **more: Any) -> Leased:
        keys, arguments = lease_call(workspace, list(asks), **more)
        return read_lease(self.run("lease", keys, arguments))

    def settle(
        self, number: int, *rows: Row, boot: str = "boot_1", events: bytes = b"\x90"
    ) -> bytes:
        workspaces = list(dict.fromkeys(row.workspace for row in rows))
        pairs = [pair_of(workspaces.index(row.workspace) + 1, row) for row in rows]
        words = [word for pair in pairs for word in pair]
        return self.settle_raw(workspaces, [boot, number, events, *words])

    def settle_raw(self, workspaces: list[str], arguments: list[Any]) -> bytes:
        shard = keyspace.shard_of(workspaces[0])
        keys = [keyspace.stream_key(shard), keyspace.boots_key(shard)]
        keys += [keyspace.workspace_key(workspace) for workspace in workspaces]
        return bytes(self.run("settle", keys, arguments))

    def release(self, workspace: str, key: str = "key_1", boot: str = "boot_1") -> list[int]:
        shard = keyspace.shard_of(workspace)
        keys = [keyspace.workspace_key(workspace), keyspace.leases_key(shard, boot)]
        return list(unpack_figures(self.run("release", keys, [boot, key, workspace])))

    def snapshot(self, workspace: str) -> Snapshot:
        shard = keyspace.shard_of(workspace)
        keys = [keyspace.workspace_key(workspace), keyspace.stream_key(shard)]
        return read_snapshot(self.run("snapshot", keys, []))

    def wallet(self, workspace: str) -> Wallet:
        wallet = self.snapshot(workspace).wallet
        assert wallet is not None
        return wallet

    def counters(self, workspace: str, key: str = "key_1") -> KeyCounters:
        return self.snapshot(workspace).counters[key]

    def write_counters(self, workspace: str, counters: KeyCounters, key: str = "key_1") -> None:
        """Put a key in a chosen past: what only time could bring about otherwise."""
        self.client.hset(keyspace.workspace_key(workspace), f"c:{key}", pack(counters))

    def leased_by(self, workspace: str, boot: str = "boot_1") -> set[bytes]:
        return set(self.client.smembers(keyspace.leases_key(keyspace.shard_of(workspace), boot)))

    def stream(self, workspace: str) -> list[Any]:
        return list(self.client.xrange(keyspace.stream_key(keyspace.shard_of(workspace))))

    def everything(self) -> dict[bytes, bytes]:
        """Every key with its DUMP: equal before and after when nothing was written."""
        return {key: self.client.dump(key) for key in sorted(self.client.scan_iter(count=1000))}

    def fund(self, workspace: str, amount: int = 0, key: str = "key_1", **rules: Any) -> None:
        """An active workspace with a balance and one live key."""
        self.put_workspace(workspace)
        if amount:
            self.credit(workspace, 1, amount)
        self.put_key(workspace, key, KeyRules(rules.pop("version", 1), keyspace.LIVE, **rules))
