"""[8] Settle: holds become charges, in batches off the response path, each exactly once.

Owns the queue of settles per shard. At most one batch per shard is under way, numbered from
1 in the order sent; a batch whose reply was lost is sent again under its number, and Redis
takes each number once. Settles wait in the journal until acknowledged, so neither a crash
nor an outage loses one. A hold leaves its lease at the moment its settle is sent, and comes
back should the reply be lost: a lease never says less than what Redis may still hold.
"""

import asyncio
from collections.abc import Callable

import hiredis
import msgspec
from msgspec import Struct

from accounting.contract import keyspace
from accounting.contract.figures import pack_figures
from accounting.contract.scripts import SCRIPTS
from accounting.contract.usage_event import join_events
from proxy.journal import Journal
from proxy.key_lease import KeyLease
from proxy.redis_pipe import RedisPipe, pack

_encode = msgspec.msgpack.Encoder().encode
_SETTLE = SCRIPTS["settle"].digest
_RETRY_SECONDS = 0.1


class Settle(Struct, array_like=True):
    """What ends one hold. Amounts in µcr; `void_at_us` is the admission time of a void, or 0."""

    workspace_id: str
    key_id: str
    credits_ucr: int
    charge_ucr: int
    tokens_held: int
    tokens_used: int
    void_at_us: int
    event: bytes


settle_decoder = msgspec.msgpack.Decoder(Settle)


def encode_settle(settle: Settle) -> bytes:
    return _encode(settle)


def batch_command(shard: int, boot: str, number: int, settles: list[Settle]) -> bytes:
    """The packed call of `settle.lua` for one batch: one row per workspace and key."""
    workspaces: dict[str, int] = {}
    rows: dict[tuple[int, str], list[int]] = {}
    for one in settles:
        index = workspaces.setdefault(one.workspace_id, len(workspaces) + 1)
        row = rows.get((index, one.key_id))
        if row is None:
            row = rows[index, one.key_id] = [index, 0, 0, 0, 0, 0]
        row[1] += one.credits_ucr
        row[2] += one.charge_ucr
        row[3] += one.tokens_held
        row[4] += one.tokens_used
        row[5] += 1
        if one.void_at_us:
            row.append(one.void_at_us)
    keys = [keyspace.stream_key(shard), keyspace.boots_key(shard)]
    keys += [keyspace.workspace_key(workspace_id) for workspace_id in workspaces]
    events = join_events([one.event for one in settles])
    words: list[str | bytes] = []
    for (_, key_id), row in rows.items():
        words += (key_id, pack_figures(*row))
    return pack(("EVALSHA", _SETTLE, len(keys), *keys, boot, number, events, *words))


class _Waiting(Struct, frozen=True):
    """A settle on its way: where the journal has it, and the lease its hold is part of."""

    settle: Settle
    slot: int
    lease: KeyLease | None


class _Shard:
    """One shard's queue: what waits, and the batch under way."""

    __slots__ = ("batch", "command", "number", "shard", "waiting")

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.waiting: list[_Waiting] = []
        self.batch: list[_Waiting] = []
        self.command = b""
        self.number = 0


class Settlement:
    """All settles of this worker."""

    def __init__(
        self,
        pipe: RedisPipe,
        journal: Journal,
        boot: str,
        interval_seconds: float,
        batch_limit: int,
        on_trouble: Callable[[str], None],
    ) -> None:
        self._pipe = pipe
        self._journal = journal
        self._boot = boot
        self._interval = interval_seconds
        self._batch_limit = batch_limit
        self._on_trouble = on_trouble
        self._loop = asyncio.get_running_loop()
        self._shards: dict[int, _Shard] = {}
        self._planned = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.unacknowledged = 0

    def __repr__(self) -> str:
        return f"Settlement(unacknowledged={self.unacknowledged})"

    def submit(self, shard: int, settle: Settle, slot: int, lease: KeyLease | None = None) -> None:
        """Take over the end of a hold: drop it from `lease` when its settle is sent, free its
        journal slot once Redis has it."""
        queue = self._shards.get(shard)
        if queue is None:
            queue = self._shards[shard] = _Shard(shard)
        queue.waiting.append(_Waiting(settle, slot, lease))
        self.unacknowledged += 1
        if not self._planned:
            self._plan(self._interval)

    async def drained(self) -> None:
        """Wait until Redis has acknowledged everything."""
        while self.unacknowledged:
            self._idle.clear()
            await self._idle.wait()

    def _plan(self, seconds: float) -> None:
        self._planned = True
        self._loop.call_later(seconds, self._flush)

    def _flush(self) -> None:
        self._planned = False
        for queue in self._shards.values():
            if queue.batch and not queue.command:
                self._send(queue, queue.batch)
            elif queue.waiting and not queue.batch:
                batch = queue.waiting[: self._batch_limit]
                del queue.waiting[: self._batch_limit]
                queue.number += 1
                for one in batch:
                    self._journal.batched(one.slot, queue.number)
                self._send(queue, batch)

    def _send(self, queue: _Shard, batch: list[_Waiting]) -> None:
        queue.batch = batch
        settles = [one.settle for one in batch]
        for one in batch:
            if one.lease is not None:
                one.lease.drop(one.settle.credits_ucr, one.settle.tokens_held)
        queue.command = batch_command(queue.shard, self._boot, queue.number, settles)
        self._pipe.send(queue.command, lambda reply: self._acknowledged(queue, reply))

    def _acknowledged(self, queue: _Shard, reply: object) -> None:
        queue.command = b""
        if isinstance(reply, Exception):
            for one in queue.batch:
                if one.lease is not None:
                    one.lease.take(one.settle.credits_ucr, one.settle.tokens_held)
            if isinstance(reply, hiredis.ReplyError):
                self._on_trouble(f"settle of shard {queue.shard} refused: {reply}")
            if not self._planned:
                self._plan(_RETRY_SECONDS)
            return
        batch, queue.batch = queue.batch, []
        for one in batch:
            self._journal.free(one.slot)
        self.unacknowledged -= len(batch)
        if not self.unacknowledged:
            self._idle.set()
        if queue.waiting and not self._planned:
            self._plan(0 if len(queue.waiting) >= self._batch_limit else self._interval)
