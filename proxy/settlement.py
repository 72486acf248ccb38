"""[8] Settle: holds become charges, in batches off the response path, each exactly once.

Owns the queue of settles per shard. At most one batch per shard is under way, numbered from
1 in the order sent; a batch whose reply was lost is sent again under its number, and Redis
takes each number once. Settles wait in the journal until acknowledged, so neither a crash
nor an outage loses one. A hold leaves its lease at the moment its settle is sent, and comes
back should the reply be lost: a lease never says less than what Redis may still hold.

A batch that Redis cannot settle any more goes on the stream *late*: accounting, which knows what
it has posted, charges what is new. So goes a batch that is refused for good, one of a boot that
was retired, and one sent to a Redis that has lost what it was told since.
"""

import asyncio
from collections.abc import Callable, Mapping

import hiredis

from accounting.contract import keyspace
from accounting.contract.figures import pack_figures
from accounting.contract.scripts import SCRIPTS
from accounting.contract.usage_event import join_events
from proxy.journal import Journal
from proxy.key_lease import KeyLease
from proxy.redis_pipe import RedisDown, RedisPipe, pack
from proxy.settle_record import Settle
from proxy.tail import Tail

_SETTLE = SCRIPTS["settle"].digest
_RETRY_SECONDS = 0.1
_REFUSALS = 5  # of one batch, before it goes to accounting as it is
_FENCED = "FENCED"
_PASSING = (
    "ASK", "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "MOVED", "NOAUTH",
    "NOPERM", "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY", "TRYAGAIN", "WRONGPASS",
)  # fmt: skip


def late_command(shard: int, boot: str, number: int, events: bytes) -> bytes:
    """The packed XADD of events whose charges accounting has to take, if they are new to it."""
    fields = {
        keyspace.STREAM_FIELD_BOOT: boot,
        keyspace.STREAM_FIELD_SEQUENCE: number,
        keyspace.STREAM_FIELD_LATE: 1,
        keyspace.STREAM_FIELD_EVENTS: events,
    }
    words = [word for field in fields.items() for word in field]
    return pack(("XADD", keyspace.stream_key(shard), "*", *words))


def is_fenced(error: Exception) -> bool:
    """The boot was retired: nothing of it is leased or settled any more."""
    return str(error).startswith(_FENCED)


def batch_command(
    shard: int, boot: str, number: int, settles: list[Settle], events: bytes = b""
) -> bytes:
    """The packed call of `settle.lua` for one batch: one row per workspace and key.

    `events` are those of the settles, joined, where that has been done already.
    """
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
    events = events or join_events([one.event for one in settles])
    words: list[str | bytes] = []
    for (_, key_id), row in rows.items():
        words += (key_id, pack_figures(*row))
    return pack(("EVALSHA", _SETTLE, len(keys), *keys, boot, number, events, *words))


class _Waiting:
    """A settle on its way: where the journal has it, and the lease its hold is part of."""

    __slots__ = ("lease", "settle", "slot")

    def __init__(self, settle: Settle, slot: int, lease: KeyLease | None) -> None:
        self.settle = settle
        self.slot = slot
        self.lease = lease


class _Shard:
    """One shard's queue: what waits, and the batch under way."""

    __slots__ = ("batch", "events", "late", "number", "refusals", "sent", "shard", "waiting")

    def __init__(self, shard: int) -> None:
        self.shard = shard
        self.waiting: list[_Waiting] = []
        self.batch: list[_Waiting] = []
        self.events = b""
        self.sent = False  # and not answered yet
        self.number = 0
        self.refusals = 0
        self.late = False


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
        tail: Tail | None = None,
        on_doubt: Callable[[KeyLease], None] | None = None,
    ) -> None:
        """`on_doubt` gets each lease in which Redis may still have holds that have ended: they
        were settled before their settle was repeated, or their charge was told late."""
        self._pipe = pipe
        self._journal = journal
        self._boot = boot
        self._interval = interval_seconds
        self._batch_limit = batch_limit
        self._on_trouble = on_trouble
        self._tail = tail
        self._on_doubt = on_doubt
        self._suspended = False
        self._loop = asyncio.get_running_loop()
        self._shards: dict[int, _Shard] = {}
        self._planned = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.unacknowledged = 0
        self.late = 0  # settles that went to accounting as they were

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

    def suspend(self) -> None:
        """Send nothing: it is not known which Redis this is."""
        self._suspended = True

    def resume(self) -> None:
        if self._suspended:
            self._suspended = False
            if self.unacknowledged and not self._planned:
                self._plan(0)

    def hand_over(self, last_numbers: Mapping[int, int]) -> None:
        """Batches above these numbers, by shard, may have been settled and lost: tell them late."""
        for queue in self._shards.values():
            if queue.batch and not queue.sent and queue.number > last_numbers.get(queue.shard, 0):
                queue.late = True

    def _plan(self, seconds: float) -> None:
        self._planned = True
        self._loop.call_later(seconds, self._flush)

    def _flush(self) -> None:
        self._planned = False
        if self._suspended:
            return
        for queue in self._shards.values():
            if queue.batch and not queue.sent:
                self._send(queue, queue.batch)
            elif queue.waiting and not queue.batch:
                batch = queue.waiting[: self._batch_limit]
                del queue.waiting[: self._batch_limit]
                queue.number += 1
                for one in batch:
                    self._journal.batched(one.slot, queue.number)
                queue.events = join_events([one.settle.event for one in batch])
                self._send(queue, batch)

    def _send(self, queue: _Shard, batch: list[_Waiting]) -> None:
        queue.batch, queue.sent = batch, True
        for one in batch:
            if one.lease is not None:
                one.lease.drop(one.settle.credits_ucr, one.settle.tokens_held)
        name = queue.shard, self._boot, queue.number
        if queue.late:
            command = late_command(*name, queue.events)
        else:
            command = batch_command(*name, [one.settle for one in batch], queue.events)
        self._pipe.send(command, lambda reply: self._answered(queue, reply))

    def _answered(self, queue: _Shard, reply: object) -> None:
        queue.sent = False
        if not reply and queue.refusals:  # settled, or broken off within: accounting will tell
            queue.late = True
            reply = RedisDown()
        if isinstance(reply, Exception):
            for one in queue.batch:
                if one.lease is not None:
                    one.lease.take(one.settle.credits_ucr, one.settle.tokens_held)
            if isinstance(reply, hiredis.ReplyError):
                self._refused(queue, reply)
            if not self._planned:
                self._plan(_RETRY_SECONDS)
            return
        if queue.late or not reply:  # its holds may have been declared again meanwhile
            self._tell_holders(queue.batch)
        self._acknowledged(queue)

    def _refused(self, queue: _Shard, error: hiredis.ReplyError) -> None:
        """By now or for good: what is for good must not block its shard."""
        passing = str(error).startswith(_PASSING)
        where = "" if passing else f"shard {queue.shard}: "  # what passes, all shards will tell
        self._on_trouble(f"{where}{error}")
        if queue.late or passing:
            return
        queue.refusals += 1
        queue.late = is_fenced(error) or queue.refusals >= _REFUSALS

    def _tell_holders(self, batch: list[_Waiting]) -> None:
        if self._on_doubt is not None:
            for lease in {one.lease for one in batch}:
                if lease is not None:
                    self._on_doubt(lease)

    def _acknowledged(self, queue: _Shard) -> None:
        batch, queue.batch = queue.batch, []
        if queue.late:
            self.late += len(batch)
        if self._tail is not None:
            self._tail.add(queue.shard, queue.number, queue.events)
        queue.late, queue.refusals = False, 0
        for one in batch:
            self._journal.free(one.slot)
        self.unacknowledged -= len(batch)
        if not self.unacknowledged:
            self._idle.set()
        if queue.waiting and not self._planned:
            self._plan(0 if len(queue.waiting) >= self._batch_limit else self._interval)
