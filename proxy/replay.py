"""What a dead worker left behind: settle its open exchanges, send its settles, free its leases.

Run by each worker at its start, for every journal whose owner no longer lives. Batches that
were sent before the crash go again under their numbers, so Redis takes each once; exchanges
still open are settled for what had been relayed, estimated.
"""

import msgspec
from msgspec import Struct

from accounting.contract import keyspace
from accounting.contract.pricing import Price, cost_ucr
from accounting.contract.scripts import SCRIPTS
from accounting.contract.settings import SHARDS
from accounting.contract.usage_event import TokenUsage, UsageEvent, encode_event
from proxy.journal import SETTLED, Entry, OrphanJournal
from proxy.provider_usage import estimate_output
from proxy.redis_pipe import RedisPipe
from proxy.settlement import Settle, batch_command, encode_settle, settle_decoder

_BATCH = 256


class Opening(Struct, array_like=True):
    """What the journal holds of an exchange from admission on: enough to settle it alone."""

    event: UsageEvent
    price: Price
    tokens_held: int
    input_bound: int
    output_bound: int
    input_estimate: int
    admitted_at_us: int


_encoder = msgspec.msgpack.Encoder()
_opening_decoder = msgspec.msgpack.Decoder(Opening)


def encode_opening(opening: Opening) -> bytes:
    return _encoder.encode(opening)


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


async def replay(journal: OrphanJournal, pipe: RedisPipe) -> int:
    """Settle everything in a dead worker's journal and retire its boot.

    Returns how many settles it held. Raises RedisDown or ReplyError; the journal then stays
    for later, and a second replay sends what is left of it under the same numbers. Raises
    msgspec.DecodeError, before anything is sent, for a journal this version cannot read.
    """
    batches: dict[tuple[int, int], list[tuple[int, Settle]]] = {}
    unsent: dict[int, list[tuple[int, Settle]]] = {}
    for entry in journal.entries():
        settle = _settle_of(entry)
        shard = keyspace.shard_of(settle.workspace_id)
        if entry.batch:
            batches.setdefault((shard, entry.batch), []).append((entry.slot, settle))
        else:
            unsent.setdefault(shard, []).append((entry.slot, settle))
    for shard, found in unsent.items():
        number = max([0] + [batch for at, batch in batches if at == shard])
        number = max(number, await _last_number(pipe, journal.boot, shard))
        for index, (slot, settle) in enumerate(found):
            batch = number + 1 + index // _BATCH
            journal.settle(slot, encode_settle(settle), batch)
            batches.setdefault((shard, batch), []).append((slot, settle))
    for (shard, number), found in sorted(batches.items()):
        settles = [settle for _, settle in found]
        await pipe.call(batch_command(shard, journal.boot, number, settles))
        for slot, _ in found:  # once the boot is retired, Redis no longer knows its numbers
            journal.free(slot)
    await retire(pipe, journal.boot)
    return sum(map(len, batches.values()))


def _settle_of(entry: Entry) -> Settle:
    if entry.state == SETTLED:
        return settle_decoder.decode(entry.settle)
    return settle_of_open(entry)


async def _last_number(pipe: RedisPipe, boot: str, shard: int) -> int:
    return int(await pipe.command("HGET", keyspace.boots_key(shard), boot) or 0)


async def retire(pipe: RedisPipe, boot: str) -> None:
    """Give back what the boot still leases and forget it."""
    for shard in range(SHARDS):
        key = keyspace.leases_key(shard, boot)
        for member in await pipe.command("SMEMBERS", key):
            workspace_id, _, key_id = member.decode().partition("|")
            await pipe.command(
                "EVALSHA",
                SCRIPTS["release"].digest,
                2,
                keyspace.workspace_key(workspace_id),
                key,
                boot,
                key_id,
                workspace_id,
            )
        await pipe.command("HDEL", keyspace.boots_key(shard), boot)
