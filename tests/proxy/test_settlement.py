"""Settlement against the real script: batches per shard, retries under one number, leases."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hiredis
import msgspec
import pytest

from accounting.contract import keyspace
from accounting.contract.usage_event import (
    SCHEMA,
    TokenUsage,
    UsageEvent,
    decode_event,
    encode_event,
    split_events,
)
from proxy.admission import Hold
from proxy.journal import Journal
from proxy.key_lease import Ask, KeyLease
from proxy.leases import Leases
from proxy.redis_pipe import RedisPipe
from proxy.replay import retire
from proxy.settle_record import Settle, encode_settle, settle_decoder
from proxy.settlement import Settlement
from proxy.tail import Tail
from tests.contract.store import Store, same_shard
from tests.proxy.redis_scene import Between, empty_store, open_pipe, record
from tests.waiting import eventually

WS, KEY, BOOT = "ws_1", "key_1", "boot_1"
SHARD = keyspace.shard_of(WS)
BATCH = 4


def event(number: int, charge: int, hold: int, workspace: str = WS) -> UsageEvent:
    return UsageEvent(
        schema=SCHEMA,
        request_id=f"req_{number:026d}",
        workspace_id=workspace,
        key_id=KEY,
        route="/v1/chat/completions",
        model="m",
        served_by="p/m",
        price_version="v",
        started_at_us=1,
        charge_ucr=charge,
        hold_ucr=hold,
        overrun_ucr=0,
        settlement="exact",
        outcome="completed",
        status=200,
        streamed=False,
        fallback_depth=0,
        tokens=TokenUsage(1, 2),
        total_us=1,
        provider_us=1,
        first_byte_us=1,
        request_bytes=1,
        answer_bytes=1,
    )


def settle(
    number: int, charge: int = 6, hold: int = 10, workspace: str = WS, **more: Any
) -> Settle:
    return Settle(
        workspace_id=workspace,
        key_id=KEY,
        credits_ucr=hold,
        charge_ucr=charge,
        tokens_held=5,
        tokens_used=3,
        void_at_us=more.get("void_at_us", 0),
        event=encode_event(event(number, charge, hold, workspace)),
    )


class Till:
    """One worker's settlement, with its journal and leases."""

    def __init__(self, pipe: RedisPipe, folder: Path, tail: Tail | None = None) -> None:
        self.pipe = pipe
        self.journal = Journal(folder / f"{BOOT}.journal", 64)
        self.trouble: list[str] = []
        self.leases = Leases(pipe, BOOT, lambda: 0.0)
        self.settlement = Settlement(
            pipe, self.journal, BOOT, 0.001, BATCH, self.trouble.append, tail, self.leases.tell
        )
        self._number = 0

    async def hold(self, credits: int = 10, workspace: str = WS) -> tuple[KeyLease, object]:
        """Ask for a hold; the lease, and what was answered."""
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        ask = Ask(credits, 5, 1, 1, answer.set_result)
        lease = self.leases.admit(record(workspace), ask)
        return lease, await answer

    def submit(
        self, charge: int = 6, hold: int = 10, workspace: str = WS, lease: KeyLease | None = None
    ) -> int:
        """The end of a hold, as an exchange brings it; its number."""
        self._number += 1
        ended = settle(self._number, charge, hold, workspace)
        slot = self.journal.reserve()
        self.journal.settle(slot, encode_settle(ended))
        self.settlement.submit(keyspace.shard_of(workspace), ended, slot, lease)
        return self._number

    async def drained(self) -> None:
        async with asyncio.timeout(5):
            await self.settlement.drained()
        assert (self.settlement.unacknowledged, self.journal.used) == (0, 0)


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with empty_store(redis_url) as store:
        yield store


@pytest.fixture
async def between(store: Store, redis_url: str) -> AsyncIterator[Between]:
    async with Between(redis_url) as between:
        yield between


@pytest.fixture
async def till(between: Between, tmp_path: Path) -> AsyncIterator[Till]:
    async with open_pipe(between.url, timeout_seconds=0.2) as pipe:
        yield (till := Till(pipe, tmp_path))
        till.journal.close(remove=True)


def batches(store: Store, workspace: str = WS) -> list[tuple[int, list[int]]]:
    """The stream of a shard: batch number, and the numbers of its settles."""
    found = []
    for _, fields in store.stream(workspace):
        assert fields[b"b"] == BOOT.encode()
        events = [decode_event(one) for one in split_events(fields[b"e"])]
        found.append((int(fields[b"n"]), [int(one.request_id[4:]) for one in events]))
    return found


async def test_a_settle_charges_and_frees_its_slot(store: Store, till: Till) -> None:
    store.fund(WS, 100)
    lease, held = await till.hold(10)
    assert isinstance(held, Hold)
    till.submit(6, 10, lease=lease)
    assert (till.settlement.unacknowledged, till.journal.used) == (1, 1)
    await till.drained()
    wallet = store.wallet(WS)
    assert (wallet.balance, wallet.held) == (94, 0)
    assert (lease.credits, lease.tokens, lease.slots) == (0, 0, 0)
    assert batches(store) == [(1, [1])]
    counters = store.counters(WS)
    assert (counters.spent_ucr, counters.open, counters.held_tokens) == (6, 0, 0)


async def test_nothing_to_settle_is_drained_at_once(till: Till) -> None:
    await till.drained()


async def test_batches_are_bounded_numbered_and_in_order(store: Store, till: Till) -> None:
    store.fund(WS, 1000)
    numbers = [till.submit() for _ in range(10)]
    await till.drained()
    assert [number for number, _ in batches(store)] == [1, 2, 3]
    assert [len(settles) for _, settles in batches(store)] == [4, 4, 2]
    assert [one for _, settles in batches(store) for one in settles] == numbers
    assert store.wallet(WS).balance == 1000 - 60


async def test_each_shard_has_batches_of_its_own(store: Store, till: Till) -> None:
    neighbour = same_shard(2, WS)[1]
    elsewhere = next(ws for ws in map(str, range(99)) if keyspace.shard_of(ws) != SHARD)
    for workspace in (WS, neighbour, elsewhere):
        store.fund(workspace, 100)
    for workspace in (WS, elsewhere, neighbour, WS):
        till.submit(workspace=workspace)
    await till.drained()
    assert batches(store) == [(1, [1, 3, 4])]
    assert batches(store, elsewhere) == [(1, [2])]
    balances = [store.wallet(workspace).balance for workspace in (WS, neighbour, elsewhere)]
    assert balances == [88, 94, 94]


async def test_a_lost_reply_is_settled_once_under_its_number(
    store: Store, between: Between, till: Till
) -> None:
    store.fund(WS, 100)
    between.silent = True
    till.submit()
    await eventually(lambda: store.wallet(WS).balance == 94)  # taken, and nobody knows
    till.submit()
    await eventually(lambda: not till.pipe.up)
    assert till.settlement.unacknowledged == 2
    between.silent = False
    between.cut()
    await till.drained()
    assert store.wallet(WS).balance == 88
    assert batches(store) == [(1, [1]), (2, [2])]


async def test_what_never_reached_redis_is_sent_again(
    store: Store, between: Between, till: Till
) -> None:
    store.fund(WS, 100)
    between.closed = True
    between.cut()
    await eventually(lambda: not till.pipe.up)
    for _ in range(6):
        till.submit()
    assert till.journal.used == 6
    between.closed = False
    await till.drained()
    assert store.wallet(WS).balance == 64
    assert [one for _, settles in batches(store) for one in settles] == [1, 2, 3, 4, 5, 6]


async def test_scripts_lost_by_redis_lose_no_settle(store: Store, till: Till) -> None:
    store.fund(WS, 100)
    store.client.script_flush()
    till.submit()
    await till.drained()
    assert batches(store) == [(1, [1])]
    assert till.trouble and "NOSCRIPT" in till.trouble[0]


async def test_a_refused_batch_is_told_and_kept(store: Store, till: Till) -> None:
    store.fund(WS, 100)
    store.client.set(keyspace.boots_key(SHARD), "not a hash")
    till.submit()
    await eventually(lambda: till.trouble)
    assert "WRONGTYPE" in till.trouble[0] and f"shard {SHARD}" in till.trouble[0]
    assert till.journal.used == 1
    store.client.delete(keyspace.boots_key(SHARD))
    await till.drained()
    assert store.wallet(WS).balance == 94


async def test_a_void_gives_its_request_back(store: Store, till: Till) -> None:
    store.fund(WS, 100, requests_per_minute=1)
    lease, held = await till.hold()
    assert isinstance(held, Hold)
    ended = settle(1, charge=0, void_at_us=held.admitted_at_us)
    slot = till.journal.reserve()
    till.settlement.submit(SHARD, ended, slot, lease)
    await till.drained()
    assert isinstance((await till.hold())[1], Hold)


# A hold stays part of its lease until its settle is on its way


async def test_a_hold_is_not_given_back_before_its_charge(store: Store, till: Till) -> None:
    """Between the end of an exchange and its settle, another may ask: it must not be admitted
    on credits that are about to be charged."""
    store.fund(WS, 200)
    lease, _ = await till.hold(100)
    await till.hold(100)
    till.submit(100, 100, lease=lease)  # ended; its settle waits for its batch
    _, third = await till.hold(100)
    assert not isinstance(third, Hold)
    await till.drained()
    till.submit(100, 100, lease=lease)
    await till.drained()
    wallet = store.wallet(WS)
    assert (wallet.balance, wallet.held) == (0, 0)


async def test_a_lease_asked_after_the_settle_was_sent_finds_it_applied(
    store: Store, till: Till
) -> None:
    store.fund(WS, 200)
    lease, _ = await till.hold(100)
    till.submit(0, 100, lease=lease)
    await eventually(lambda: lease.slots == 0)  # sent, perhaps not acknowledged
    assert isinstance((await till.hold(200))[1], Hold)
    assert store.wallet(WS).held == 200


async def test_a_settle_whose_reply_was_lost_stays_part_of_the_lease(
    store: Store, between: Between, till: Till
) -> None:
    store.fund(WS, 100)
    lease, _ = await till.hold(60)
    between.closed = True
    between.cut()
    await eventually(lambda: not till.pipe.up)
    till.submit(60, 60, lease=lease)
    await eventually(lambda: till.settlement.unacknowledged == 1 and lease.credits == 60)
    between.closed = False
    await till.drained()
    assert (lease.credits, lease.slots) == (0, 0)
    assert isinstance((await till.hold(40))[1], Hold)
    wallet = store.wallet(WS)
    assert (wallet.balance, wallet.held) == (40, 40)


@pytest.mark.parametrize("seed", range(3))
async def test_under_random_traffic_no_wallet_goes_negative(
    store: Store, between: Between, till: Till, seed: int
) -> None:
    """Requests come and go at random, the connection is cut now and then."""
    print("seed", seed)
    chance = random.Random(seed)
    store.fund(WS, balance := 2000)
    charged = 0

    async def exchange() -> None:
        nonlocal charged
        hold = chance.randrange(1, 400)
        lease, held = await till.hold(hold)
        if isinstance(held, Hold):
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0.001)
            charge = chance.choice([0, hold // 2, hold])
            charged += charge
            till.submit(charge, hold, lease=lease)

    for round_number in range(60):
        await asyncio.gather(*(exchange() for _ in range(chance.randrange(1, 5))))
        if round_number % 20 == 19:
            between.cut()
        wallet = store.wallet(WS)
        assert 0 <= wallet.held <= wallet.balance
    await till.drained()
    await eventually(lambda: till.pipe.up)
    await till.hold(0)  # whatever a lost reply left is corrected
    wallet = store.wallet(WS)
    assert (wallet.balance, wallet.held) == (balance - charged, 0)
    assert charged <= balance


def test_a_settle_survives_its_encoding() -> None:
    one = settle(7, void_at_us=123)
    assert settle_decoder.decode(encode_settle(one)) == one
    with pytest.raises(msgspec.DecodeError):
        settle_decoder.decode(b"")


# What cannot be settled goes to accounting as it is


def late(store: Store) -> list[int]:
    found = []
    for _, fields in store.stream(WS):
        if b"l" in fields:
            found += [decode_event(one).request_id for one in split_events(fields[b"e"])]
    return [int(name[4:]) for name in found]


async def test_a_batch_refused_for_good_does_not_block_its_shard(store: Store, till: Till) -> None:
    store.fund(WS, 100)
    broken = msgspec.structs.replace(settle(77, 1, 1), credits_ucr=-1)
    slot = till.journal.reserve()
    till.journal.settle(slot, encode_settle(broken))
    till.settlement.submit(SHARD, broken, slot)
    await eventually(lambda: till.trouble)
    till.submit()
    await till.drained()
    assert late(store) == [77]
    assert till.settlement.late == 1
    assert store.wallet(WS).balance == 94
    assert len(till.trouble) == 5 and "expected a whole number" in till.trouble[0]


async def test_a_redis_without_memory_is_waited_for(store: Store, till: Till) -> None:
    """OOM passes: however often it refuses, nothing is handed over."""
    store.fund(WS, 100)
    till.submit()
    await eventually(lambda: till.settlement.unacknowledged)
    [queue] = till.settlement._shards.values()
    for _ in range(20):
        till.settlement._refused(queue, hiredis.ReplyError("OOM command not allowed"))
    await till.drained()
    assert (late(store), till.settlement.late) == ([], 0)
    assert store.wallet(WS).balance == 94


async def test_the_settles_of_a_retired_boot_are_told_late(store: Store, till: Till) -> None:
    store.fund(WS, 100)
    lease, _ = await till.hold(10)
    await retire(till.pipe, BOOT)
    for _ in range(3):
        till.submit(6, 10, lease=lease)
    await till.drained()
    assert late(store) == [1, 2, 3]
    assert store.wallet(WS).balance == 100


async def test_a_batch_that_was_broken_off_within_is_told_late(store: Store, till: Till) -> None:
    """Refused once, and taken for settled since: its number was noted, its events may not be."""
    store.fund(WS, 100)
    key = keyspace.workspace_key(WS)
    wallet = store.client.dump(key)
    store.client.delete(key)
    store.client.set(key, "not a hash")
    till.submit()
    await eventually(lambda: till.trouble)
    store.client.delete(key)
    store.client.restore(key, 0, wallet)
    await till.drained()
    assert late(store) == [1]
    assert store.wallet(WS).balance == 100


async def test_nothing_is_sent_while_it_is_not_known_which_redis_this_is(
    store: Store, between: Between, till: Till
) -> None:
    store.fund(WS, 100)
    till.settlement.suspend()
    till.submit()
    between.commands_seen = b""
    await till.pipe.command("PING")
    await eventually(lambda: not till.settlement._planned)
    await till.pipe.command("PING")
    assert b"usage" not in between.commands_seen
    till.settlement.resume()
    await till.drained()
    assert batches(store) == [(1, [1])]


@pytest.mark.parametrize("settled", [False, True])
async def test_a_batch_sent_to_another_redis_is_told_late_unless_this_one_knows_it(
    store: Store, between: Between, till: Till, settled: bool
) -> None:
    store.fund(WS, 100)
    between.silent = True
    till.submit()
    await eventually(lambda: till.settlement.unacknowledged and not till.pipe.up)
    till.settlement.suspend()
    between.silent = False
    await eventually(lambda: till.pipe.up)
    till.settlement.hand_over({SHARD: 1} if settled else {})
    till.settlement.resume()
    await till.drained()
    assert late(store) == ([] if settled else [1])
    assert store.wallet(WS).balance == 94


async def test_a_hold_whose_charge_is_told_late_is_given_back_at_once(
    store: Store, between: Between, till: Till
) -> None:
    """Nobody may ask under its key for long: the worker tells unasked."""
    store.fund(WS, 100)
    lease, hold = await till.hold()
    assert isinstance(hold, Hold) and store.wallet(WS).held == 10
    between.silent = True
    till.submit(lease=lease)
    await eventually(lambda: not till.pipe.up)
    till.settlement.suspend()
    between.silent = False
    await eventually(lambda: till.pipe.up)
    till.settlement.hand_over({})
    till.settlement.resume()
    await till.drained()
    await eventually(lambda: store.wallet(WS).held == 0)


async def test_a_hold_declared_again_after_its_settle_is_given_back(
    store: Store, between: Between, till: Till
) -> None:
    """The reply was lost, so the worker takes it for held, and says so in its next call."""
    store.fund(WS, 100)
    lease, _ = await till.hold()
    between.silent = True
    till.submit(lease=lease)
    await eventually(lambda: store.wallet(WS).balance == 94)
    await eventually(lambda: not till.pipe.up and lease.credits == 10)
    till.settlement.suspend()
    between.silent = False
    await eventually(lambda: till.pipe.up)
    await till.hold(20)
    assert store.wallet(WS).held == 30
    till.settlement.resume()
    await till.drained()
    await eventually(lambda: store.wallet(WS).held == 20)
    assert store.wallet(WS).balance == 94


async def test_what_is_acknowledged_is_in_the_tail(
    store: Store, between: Between, tmp_path: Path
) -> None:
    store.fund(WS, 100)
    tail = Tail(tmp_path / "boot.tail", 65536)
    async with open_pipe(between.url) as pipe:
        till = Till(pipe, tmp_path, tail)
        for _ in range(6):
            till.submit()
        await till.drained()
        till.journal.close(remove=True)
    told = [decode_event(one) for record in tail.records() for one in split_events(record.events)]
    assert [int(one.request_id[4:]) for one in told] == [1, 2, 3, 4, 5, 6]
    assert {(record.shard, record.number) for record in tail.records()} == {(SHARD, 1), (SHARD, 2)}
    tail.close(remove=True)
