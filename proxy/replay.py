"""What a dead worker left behind: settle its open exchanges, send its settles, free its leases.

Run by each worker at its start, for every journal whose owner no longer lives. Batches that
were sent before the crash go again under their numbers, so Redis takes each once; exchanges
still open are settled for what had been relayed, estimated.

Batches that Redis can settle no more are told late, and accounting charges what is new to it:
those of a boot that was retired meanwhile, and those sent to a Redis that was another one, or
has been rolled back since. From the tail go those that it acknowledged and has lost.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import hiredis
import msgspec
from msgspec import Struct

from accounting.contract import keyspace
from accounting.contract.pricing import Price, cost_ucr
from accounting.contract.scripts import SCRIPTS
from accounting.contract.settings import SHARDS
from accounting.contract.usage_event import TokenUsage, UsageEvent, encode_event, join_events
from proxy.journal import SETTLED, Entry, OrphanJournal
from proxy.provider_usage import estimate_output
from proxy.redis_pipe import RedisPipe
from proxy.settle_record import Settle, encode_settle, settle_decoder
from proxy.settlement import batch_command, is_fenced, late_command
from proxy.tail import Record, left_behind

_BATCH = 256
_TOLD_AT_ONCE = 64
_FENCE_KEPT_MS = 3_600_000  # longer than a command of a dead worker can be on its way
_FENCE, _RETIRE, _DEPART = (SCRIPTS[name].digest for name in ("fence", "retire", "depart"))
_YOUNG_MS = 5_000  # longer than workers take to find that Redis was emptied
_UNKNOWN = -1  # the last batch of a boot that is fenced


class Opening(Struct, array_like=True):
    """What the journal holds of an exchange from admission on: enough to settle it alone."""

    event: UsageEvent
    price: Price
    tokens_held: int
    input_bound: int
    output_bound: int
    input_estimate: int
    admitted_at_us: int


_opening_decoder = msgspec.msgpack.Decoder(Opening)


def settle_of_open(entry: Entry) -> Settle:
    """An exchange cut by a crash: void if nothing was relayed, else an estimate."""
    opening = _opening_decoder.decode(entry.opening)
    event = opening.event
    tokens = TokenUsage()
    answered = entry.envelope > 0  # a chunk had passed; comments alone are no answer
    if answered:
        output = estimate_output(entry.relayed_bytes, entry.events, entry.envelope)
        tokens = TokenUsage(
            input=min(opening.input_estimate, opening.input_bound),
            output=min(output, opening.output_bound),
        )
    cost = cost_ucr(opening.price, tokens)
    charge = min(cost, event.hold_ucr)
    ended = msgspec.structs.replace(
        event,
        tokens=tokens,
        charge_ucr=charge,
        overrun_ucr=cost - charge,
        settlement="estimated" if answered else "void",
        outcome="cut",
        answer_bytes=entry.relayed_bytes,
    )
    return Settle(
        workspace_id=event.workspace_id,
        key_id=event.key_id,
        credits_ucr=event.hold_ucr,
        charge_ucr=charge,
        tokens_held=opening.tokens_held,
        tokens_used=tokens.input + tokens.output,
        void_at_us=0 if answered else opening.admitted_at_us,
        event=encode_event(ended),
    )


class _Batch(Struct):
    """Settles that go together, and where the journal has them; `era`: see `standing`."""

    shard: int
    number: int
    era: int
    slots: list[int]
    settles: list[Settle]


async def replay(journal: OrphanJournal, pipe: RedisPipe, era: int = 0) -> int:
    """Settle everything in a dead worker's journal and tail, and retire its boot.

    `era` is that of the Redis which `pipe` leads to. Returns how many settles the journal held.
    Raises RedisDown or ReplyError; the journal then stays for later, and a second replay sends
    what is left of it under the same numbers. Raises msgspec.DecodeError, before anything is
    sent, for a journal this version cannot read.
    """
    found = [(entry, _settle_of(entry)) for entry in journal.entries()]
    last = await last_numbers(pipe, journal.boot)
    batches = _batches(journal, found, last, era)
    for batch in batches:
        await _send(pipe, journal.boot, batch, last.get(batch.shard, 0), era)
        for slot in batch.slots:  # once the boot is retired, Redis no longer knows its numbers
            journal.free(slot)
    await _tell_lost(pipe, journal.boot, journal.path.with_suffix(".tail"), last)
    await retire(pipe, journal.boot, admitted=True)
    return len(found)


def _batches(
    journal: OrphanJournal, found: list[tuple[Entry, Settle]], last: dict[int, int], era: int
) -> list[_Batch]:
    """As they were sent; what was not goes into new ones, noted before they are sent."""
    sent: dict[tuple[int, int], _Batch] = {}
    unsent: dict[int, list[tuple[int, Settle]]] = {}
    for entry, settle in found:
        shard = keyspace.shard_of(settle.workspace_id)
        if entry.batch:
            batch = sent.setdefault(
                (shard, entry.batch), _Batch(shard, entry.batch, entry.era, [], [])
            )
            batch.slots.append(entry.slot)
            batch.settles.append(settle)
        else:
            unsent.setdefault(shard, []).append((entry.slot, settle))
    for shard, waiting in unsent.items():
        number = max([last.get(shard, 0), 0] + [batch for at, batch in sent if at == shard])
        for start in range(0, len(waiting), _BATCH):
            number += 1
            slots, settles = map(list, zip(*waiting[start : start + _BATCH], strict=True))
            for slot, settle in waiting[start : start + _BATCH]:
                journal.settle(slot, encode_settle(settle), number, era)
            sent[shard, number] = _Batch(shard, number, era, slots, settles)
    return [sent[name] for name in sorted(sent)]


async def _send(pipe: RedisPipe, boot: str, batch: _Batch, last: int, era: int) -> None:
    if last != _UNKNOWN and (batch.era in (0, era) or batch.number <= last):
        try:
            await pipe.call(batch_command(batch.shard, boot, batch.number, batch.settles))
            return
        except hiredis.ReplyError as error:
            if not is_fenced(error):
                raise
    events = join_events([settle.event for settle in batch.settles])
    await pipe.call(late_command(batch.shard, boot, batch.number, events))


async def replay_stray(path: Path, pipe: RedisPipe) -> None:
    """Tell what Redis has lost of a worker that was retired, if it has lost that, too.

    Raises RedisDown or ReplyError.
    """
    boot = path.stem
    last = await last_numbers(pipe, boot)
    if list(last.values()) != [_UNKNOWN] * SHARDS:
        await _tell_lost(pipe, boot, path, last)
        await retire(pipe, boot)


async def _tell_lost(pipe: RedisPipe, boot: str, tail: Path, last: dict[int, int]) -> None:
    """What Redis had acknowledged and does not know any more."""
    lost = await lost_of(pipe, left_behind(tail), last)
    for start in range(0, len(lost), _TOLD_AT_ONCE):
        commands = [
            late_command(one.shard, boot, one.number, one.events)
            for one in lost[start : start + _TOLD_AT_ONCE]
        ]
        await all_of([pipe.call(command) for command in commands])


async def lost_of(pipe: RedisPipe, told: list[Record], last: dict[int, int]) -> list[Record]:
    """Of what Redis had acknowledged, what it may not know any more; with a fence it knows all
    before. One that was emptied under its workers has taken batches since: so their numbers say
    nothing of those before, for as long as it is young."""
    if int(await pipe.command("HGET", keyspace.CLOCK, "ms") or 0) < _YOUNG_MS:
        return told
    return [one for one in told if _UNKNOWN < last.get(one.shard, 0) < one.number]


def _settle_of(entry: Entry) -> Settle:
    if entry.state == SETTLED:
        return settle_decoder.decode(entry.settle)
    return settle_of_open(entry)


async def last_numbers(pipe: RedisPipe, boot: str) -> dict[int, int]:
    """The last batch of the boot that Redis has settled, by shard; -1 in all that are fenced."""
    keys = [keyspace.boots_key(shard) for shard in range(SHARDS)]
    found = await all_of([pipe.command("HGET", key, boot) for key in keys])
    fence = keyspace.FENCE.encode()
    return {
        shard: _UNKNOWN if number == fence else int(number)
        for shard, number in enumerate(found)
        if number
    }


async def retire(pipe: RedisPipe, boot: str, admitted: bool = False) -> None:
    """Fence the boot, give back what it still leases, and forget it.

    `admitted`: what it had leased ahead may have been used without having been told, so it
    counts as requests made.
    """
    shards = range(SHARDS)
    leases = [keyspace.leases_key(shard, boot) for shard in shards]
    fences = [("EVALSHA", _FENCE, 2, keyspace.boots_key(one), leases[one], boot) for one in shards]
    found = await all_of([pipe.command(*words) for words in fences])
    gone = []
    for shard, members in enumerate(found):
        for member in members:
            workspace_id, _, key_id = member.decode().partition("|")
            keys = keyspace.workspace_key(workspace_id), leases[shard]
            gone.append((*keys, boot, key_id, workspace_id, int(admitted)))
    await all_of([pipe.command("EVALSHA", _RETIRE, 2, *words) for words in gone])
    keys = keyspace.HEARD, keyspace.FENCED
    await pipe.command("EVALSHA", _DEPART, 2, *keys, boot, _FENCE_KEPT_MS)


async def all_of(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """The replies to calls sent together; the first exception, once all have been answered."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found
