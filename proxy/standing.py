"""What Redis says of this worker: whether it may admit, whether it is still known, and whether
this is the Redis it was.

Owns the gate, the heartbeat, and the answer to a Redis that has lost something.

Theory of operation. The gate is open while Redis has an epoch of its present run: a Redis that
was started anew may lack its last seconds, or be another one, so its epoch is taken away, and
accounting looks through it first. Until it is known which Redis answers, no settle is sent. If
it is not the one there was, its last batch number of this boot is compared with what it had
acknowledged: what it has lost goes to accounting late, from the tail. Before accounting opens
the gate it calls a muster: each worker tells anew what it holds, so that nobody is admitted on
credits behind requests in flight. A boot that was taken to be lost is told so by its heartbeat:
it can only leave, and a worker with a new boot takes its place.
"""

import asyncio
import zlib
from collections.abc import Callable

import hiredis

from accounting.contract import keyspace
from accounting.contract.scripts import SCRIPTS
from accounting.contract.settings import SHARDS
from proxy.redis_pipe import RedisDown, RedisPipe, pack
from proxy.replay import all_of, last_numbers, lost_of
from proxy.services import Services
from proxy.settlement import late_command
from proxy.tail import Tail

_BEAT = SCRIPTS["beat"].digest
_RELEASE = SCRIPTS["release"].digest
_OPEN_SECONDS = 1.0  # between two looks at the gate
_CLOSED_SECONDS = 0.05
_AT_ONCE = 64
_FORGET = "return redis.call('GET', KEYS[1]) == ARGV[1] and redis.call('DEL', KEYS[1]) or 0"
_DECLARED_SECONDS = 2.0
_LOOK_SECONDS = 0.005


class Standing:
    """See the module. `on_gate(open)` and `on_fenced()` are called at each change."""

    def __init__(
        self,
        pipe: RedisPipe,
        boot: str,
        services: Services,
        tail: Tail,
        on_gate: Callable[[bool], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self._pipe = pipe
        self._boot = boot
        self._services = services
        self._tail = tail
        self._on_gate = on_gate
        self._on_fenced = on_fenced
        self._changed = asyncio.Event()
        self._connections = 0
        self._run = ""  # of the Redis this connection leads to; empty: not asked yet
        self._seen: tuple[str, str | None] | None = None  # the run and epoch there were
        self._mustered = ""
        self._told_late = 0
        self._undeclared = False  # Redis may not know what is held for requests in flight
        self.fenced = False
        self.orphans_settled = False  # what dead workers left here was looked through once

    def __repr__(self) -> str:
        return f"Standing(run={self._run!r}, seen={self._seen!r}, fenced={self.fenced})"

    def connected(self) -> None:
        """There is a new connection, perhaps to another Redis: at once, before any command."""
        self._connections += 1
        self._run = ""
        self._services.settlement.suspend()
        self._tell(False)
        self._changed.set()

    async def watch(self) -> None:
        """Look at the gate for as long as the worker runs."""
        while True:
            found = await self.look()
            try:
                async with asyncio.timeout(_OPEN_SECONDS if found else _CLOSED_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def look(self) -> bool:
        """Whether the gate is open."""
        self._changed.clear()
        try:
            found = await self._look()
        except (RedisDown, hiredis.ReplyError):
            found = False
        found = found and not self.fenced
        self._tell(found)
        return found

    def _tell(self, found: bool) -> None:
        if found != self._services.gate_open:
            self._services.gate_open = found
            self._on_gate(found)

    async def _look(self) -> bool:
        connection = self._connections
        run = self._run or await self._run_id()
        words = await self._pipe.command("MGET", keyspace.EPOCH, keyspace.MUSTER)
        epoch, muster = (word and word.decode() for word in words)
        if epoch and not keyspace.is_filled(epoch, run):
            await self._pipe.command("EVAL", _FORGET, 1, keyspace.EPOCH, epoch)
        if self._is_another(run, epoch):
            await self._tell_again()
            self._undeclared = True
        if connection != self._connections:
            return False
        self._run, self._seen = run, (run, epoch)
        services = self._services
        services.journal.era = era_of(run, epoch)
        services.settlement.resume()
        if not services.gate_open:
            await self.beat()
        if muster and muster != self._mustered and self.orphans_settled:
            await self._declare()
            await self._answer(muster)
        filled = keyspace.is_filled(epoch, run)
        if filled and self._undeclared:
            await self._declare()
        return filled

    async def _run_id(self) -> str:
        return run_id(await self._pipe.command("INFO", "server"))

    def _is_another(self, run: str, epoch: str | None) -> bool:
        """It may lack something that this worker was told to be done."""
        if self._seen is None:
            return False
        run_before, epoch_before = self._seen
        return run != run_before or (epoch_before is not None and epoch != epoch_before)

    # What Redis has lost

    async def _tell_again(self) -> None:
        """Hand what was settled and is gone to accounting; told twice, it is posted once."""
        settlement = self._services.settlement
        settlement.suspend()
        last = await last_numbers(self._pipe, self._boot)
        settlement.hand_over(last)
        lost = await lost_of(self._pipe, self._tail.records(), last)
        for start in range(0, len(lost), _AT_ONCE):
            calls = [
                self._pipe.call(late_command(one.shard, self._boot, one.number, one.events))
                for one in lost[start : start + _AT_ONCE]
            ]
            await all_of(calls)
        self._told_late += len(lost)

    async def _declare(self) -> None:
        """Say anew what is held."""
        await self._release_unknown()
        self._services.leases.declare()
        deadline = self._services.now() + _DECLARED_SECONDS
        while self._services.leases.calling and self._services.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_SECONDS)
        self._undeclared = False

    async def _answer(self, epoch: str) -> None:
        """To the muster: all has been said."""
        key = keyspace.mustered_key(epoch)
        await self._pipe.command("HSET", key, self._boot, self._told_late)
        await self._pipe.command("EXPIRE", key, 60)
        self._mustered, self._told_late = epoch, 0

    async def _release_unknown(self) -> None:
        """Give back leases that this worker has forgotten, and Redis has remembered anew."""
        keys = [keyspace.leases_key(shard, self._boot) for shard in range(SHARDS)]
        found = await all_of([self._pipe.command("SMEMBERS", key) for key in keys])
        for key, members in zip(keys, found, strict=True):
            for member in members:
                workspace_id, _, key_id = member.decode().partition("|")
                if key_id and not self._services.leases.holds(key_id):
                    where = keyspace.workspace_key(workspace_id), key
                    words = self._boot, key_id, workspace_id
                    await self._pipe.call(pack(("EVALSHA", _RELEASE, 2, *where, *words)))

    # That this boot lives

    async def beat(self) -> None:
        """Say so once. Raises RedisDown or hiredis.ReplyError."""
        keys = keyspace.HEARD, keyspace.FENCED, keyspace.CLOCK
        heard = await self._pipe.command("EVALSHA", _BEAT, 3, *keys, self._boot)
        if not heard and not self.fenced:
            self.fenced = True
            self._tell(False)
            self._on_fenced()

    async def keep_beating(self, seconds: float) -> None:
        while True:
            try:
                await self.beat()
                await asyncio.sleep(seconds)
            except (RedisDown, hiredis.ReplyError):
                await asyncio.sleep(seconds / 2)


def era_of(run: str, epoch: str | None) -> int:
    """A short name of one Redis between two losses, for the journal; never 0."""
    return zlib.crc32(f"{run} {epoch}".encode()) % 65535 + 1


def run_id(info: bytes) -> str:
    """From the reply to INFO."""
    for line in info.decode().splitlines():
        name, _, value = line.partition(":")
        if name == "run_id":
            return value
    return "unknown"
