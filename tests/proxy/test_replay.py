"""Replay on a real Redis: whatever a dead worker left is charged once, and no hold stays."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hiredis
import msgspec
import pytest

from accounting.contract import keyspace
from accounting.contract.errors import Unavailable
from accounting.contract.figures import pack_figures, unpack_figures
from accounting.contract.keyspace import KeyRules
from accounting.contract.pricing import Price, Rates
from accounting.contract.scripts import SCRIPTS
from accounting.contract.settings import SHARDS
from accounting.contract.usage_event import (
    TokenUsage,
    UsageEvent,
    decode_event,
    join_events,
    split_events,
)
from proxy.admission import Hold
from proxy.journal import Journal, OrphanJournal, find_orphans
from proxy.key_lease import Ask
from proxy.leases import Leases
from proxy.redis_pipe import RedisDown, RedisPipe
from proxy.replay import (
    Opening,
    replay,
    replay_stray,
    retire,
    settle_of_open,
)
from proxy.settle_record import encode_settle
from proxy.settlement import batch_command
from proxy.tail import Tail, is_old, strays
from tests.contract.store import Store, same_shard
from tests.proxy.redis_scene import FailingCalls, empty_store, open_pipe, record
from tests.proxy.test_settlement import BOOT, WS, event, settle
from tests.waiting import eventually

NEIGHBOUR = same_shard(2, WS)[1]
ELSEWHERE = next(ws for ws in map(str, range(99)) if keyspace.shard_of(ws) != keyspace.shard_of(WS))
RATES = Rates(1_000_000, 2_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000)  # 1 and 2 µcr
PRICE = Price(RATES, 0, None, "v")
BALANCE = 10_000


def opening(number: int, hold: int = 100, workspace: str = WS, admitted_at_us: int = 1) -> Opening:
    """An exchange as admitted: at most 40 tokens in and 30 out."""
    begun = msgspec.structs.replace(
        event(number, 0, hold, workspace), tokens=TokenUsage(), settlement="void", outcome="cut"
    )
    return Opening(begun, PRICE, 70, 40, 30, 10, admitted_at_us)


class DeadWorker:
    """A worker's holds and journal as a kill leaves them."""

    def __init__(self, pipe: RedisPipe, folder: Path) -> None:
        self.pipe = pipe
        self.journal = Journal(folder / f"{BOOT}.journal", 64)
        self.leases = Leases(pipe, BOOT, lambda: 0.0)
        self.held: list[object] = []
        self.number = 0
        self.charges: dict[str, int] = {}

    async def admitted(self, workspace: str = WS, hold: int = 100) -> int:
        """An exchange from admission on; its slot."""
        self.number += 1
        before = len(self.held)
        self.leases.admit(record(workspace), Ask(hold, 70, 1, 1, self.held.append))
        await eventually(lambda: len(self.held) > before)
        held = self.held[-1]
        assert isinstance(held, Hold)
        slot = self.journal.reserve()
        begun = opening(self.number, hold, workspace, held.admitted_at_us)
        self.journal.open(slot, msgspec.msgpack.encode(begun))
        return slot

    async def relaying(self, workspace: str = WS) -> None:
        """10 tokens in and 4 out, so far: 18 µcr."""
        slot = await self.admitted(workspace)
        self.journal.progress(slot, 5 * 200 + 16, 5, 200)
        self._owes(workspace, 18)

    async def ended(self, workspace: str = WS, charge: int = 30, batch: int = 0) -> int:
        """Settled, and not yet known to have reached Redis; its slot."""
        slot = await self.admitted(workspace)
        ended = msgspec.structs.replace(settle(self.number, charge, 100, workspace), tokens_held=70)
        self.journal.settle(slot, encode_settle(ended))
        if batch:
            self.journal.batched(slot, batch)
        self._owes(workspace, charge)
        return slot

    async def sent(self, batch: int, workspace: str = WS, charge: int = 30) -> None:
        """Settled, sent and taken by Redis, whose reply never came."""
        await self.ended(workspace, charge, batch)
        ended = msgspec.structs.replace(settle(self.number, charge, 100, workspace), tokens_held=70)
        await self.pipe.call(batch_command(keyspace.shard_of(workspace), BOOT, batch, [ended]))

    def _owes(self, workspace: str, charge: int) -> None:
        self.charges[workspace] = self.charges.get(workspace, 0) + charge

    async def dies(self) -> None:
        """A mixture of everything, over two shards; then the file is all there is."""
        await self.sent(1)
        await self.ended(batch=2)
        await self.ended(NEIGHBOUR, batch=2)
        await self.ended()
        await self.relaying()
        await self.relaying(NEIGHBOUR)
        await self.admitted()  # nothing relayed: void
        await self.ended(ELSEWHERE, 99)
        await self.relaying(ELSEWHERE)
        self.leases.admit(record(), Ask(7, 7, 1, 1, self.held.append))  # admitted, not yet noted
        before = len(self.held)
        await eventually(lambda: len(self.held) > before)
        self.journal.close(remove=False)


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with empty_store(redis_url) as store:
        store.client.hset(keyspace.CLOCK, "ms", 3_600_000)  # it has been there for a while
        for workspace in (WS, NEIGHBOUR, ELSEWHERE):
            store.fund(workspace, BALANCE)
        yield store


@pytest.fixture
async def pipe(store: Store, redis_url: str) -> AsyncIterator[RedisPipe]:
    async with open_pipe(redis_url) as pipe:
        yield pipe


@pytest.fixture
async def dead(pipe: RedisPipe, tmp_path: Path) -> DeadWorker:
    worker = DeadWorker(pipe, tmp_path)
    await worker.dies()
    return worker


def orphan(worker: DeadWorker) -> OrphanJournal:
    [found] = find_orphans(worker.journal.path.parent)
    return found


def events(store: Store) -> list[UsageEvent]:
    entries = [fields for ws in (WS, ELSEWHERE) for _, fields in store.stream(ws)]
    return [decode_event(one) for fields in entries for one in split_events(fields[b"e"])]


def assert_all_is_settled(store: Store, worker: DeadWorker) -> None:
    for workspace in (WS, NEIGHBOUR, ELSEWHERE):
        wallet, counters = store.wallet(workspace), store.counters(workspace)
        assert (wallet.balance, wallet.held) == (BALANCE - worker.charges[workspace], 0)
        assert counters.spent_ucr == worker.charges[workspace]
        assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)
        assert not store.snapshot(workspace).leases
        assert store.leased_by(workspace, BOOT) == {b"fenced"}
        boots = keyspace.boots_key(keyspace.shard_of(workspace))
        assert store.client.hget(boots, BOOT) == b"fenced"
    found = events(store)
    assert len({one.request_id for one in found}) == len(found) == worker.number
    assert sum(one.charge_ucr for one in found) == sum(worker.charges.values())


async def test_everything_is_settled_once(store: Store, pipe: RedisPipe, dead: DeadWorker) -> None:
    journal = orphan(dead)
    assert await replay(journal, pipe) == dead.number
    journal.close(remove=True)
    assert_all_is_settled(store, dead)


async def test_a_second_replay_of_the_same_journal_changes_nothing(
    store: Store, pipe: RedisPipe, dead: DeadWorker
) -> None:
    """The first was killed after its work and before it removed the file."""
    for _ in range(3):
        journal = orphan(dead)
        await replay(journal, pipe)
        journal.close(remove=False)
        assert_all_is_settled(store, dead)


@pytest.mark.parametrize("after", [False, True], ids=["before Redis", "after Redis"])
async def test_a_replay_lost_at_any_call_is_finished_by_the_next(
    store: Store, pipe: RedisPipe, tmp_path: Path, after: bool
) -> None:
    """Calls are lost from the n-th on, before Redis takes it or after."""
    begun, retired = SHARDS, 2 * SHARDS  # it asks each shard first, and last fences each
    ends = range(retired, retired + 7)
    for lost_at in (1, *range(begun, begun + 8), *range(begun + 8, retired, 9), *ends):
        store.client.flushall()
        for script in store.sources.values():
            store.client.script_load(script)
        for workspace in (WS, NEIGHBOUR, ELSEWHERE):
            store.fund(workspace, BALANCE)
        worker = DeadWorker(pipe, tmp_path)
        await worker.dies()
        journal = orphan(worker)
        calls = FailingCalls(pipe, lost_at, after, RedisDown())
        try:
            await replay(journal, calls)  # type: ignore[arg-type]
        except RedisDown:
            journal.close(remove=False)
            journal = orphan(worker)
            await replay(journal, pipe)
            journal.close(remove=True)
            assert_all_is_settled(store, worker)
        else:
            raise AssertionError(f"only {calls.calls} calls")


async def test_a_journal_of_another_version_is_not_touched(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    worker = DeadWorker(pipe, tmp_path)
    await worker.relaying()
    slot = worker.journal.reserve()
    worker.journal.open(slot, b"\x93 something else")
    worker.journal.close(remove=False)
    before, redis_before = worker.journal.path.read_bytes(), store.everything()
    journal = orphan(worker)
    with pytest.raises(msgspec.DecodeError):
        await replay(journal, pipe)
    journal.close(remove=False)
    assert worker.journal.path.read_bytes() == before
    assert store.everything() == redis_before


async def test_an_open_exchange_is_billed_for_what_was_relayed(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    worker = DeadWorker(pipe, tmp_path)
    await worker.relaying()
    await worker.admitted()
    worker.journal.close(remove=False)
    journal = orphan(worker)
    relayed, silent = (settle_of_open(entry) for entry in journal.entries())
    journal.close(remove=True)
    billed, void = decode_event(relayed.event), decode_event(silent.event)
    assert (relayed.charge_ucr, relayed.tokens_used, relayed.void_at_us) == (18, 14, 0)
    assert (billed.settlement, billed.outcome, billed.tokens) == (
        "estimated",
        "cut",
        TokenUsage(10, 4),
    )
    assert (billed.charge_ucr, billed.overrun_ucr, billed.answer_bytes) == (18, 0, 1016)
    assert (silent.charge_ucr, silent.tokens_used) == (0, 0)
    assert silent.void_at_us > 1
    assert (void.settlement, void.tokens, void.charge_ucr) == ("void", TokenUsage(), 0)


async def test_an_estimate_stays_within_hold_and_bounds(pipe: RedisPipe, tmp_path: Path) -> None:
    worker = DeadWorker(pipe, tmp_path)
    slot = worker.journal.reserve()
    worker.journal.open(slot, msgspec.msgpack.encode(opening(1, hold=50)))
    worker.journal.progress(slot, 2**40, 2**31, 1)
    worker.journal.close(remove=False)
    journal = orphan(worker)
    [entry] = journal.entries()
    ended = decode_event(settle_of_open(entry).event)
    journal.close(remove=True)
    assert ended.tokens == TokenUsage(10, 30)
    assert (ended.charge_ucr, ended.overrun_ucr) == (50, 20)


async def test_a_stream_of_comments_alone_costs_nothing(pipe: RedisPipe, tmp_path: Path) -> None:
    worker = DeadWorker(pipe, tmp_path)
    slot = worker.journal.reserve()
    worker.journal.open(slot, msgspec.msgpack.encode(opening(1, hold=50)))
    worker.journal.progress(slot, 40, 4, 0)
    worker.journal.close(remove=False)
    journal = orphan(worker)
    [entry] = journal.entries()
    ended = decode_event(settle_of_open(entry).event)
    journal.close(remove=True)
    assert (ended.settlement, ended.charge_ucr) == ("void", 0)


async def test_many_settles_go_in_batches(store: Store, pipe: RedisPipe, tmp_path: Path) -> None:
    journal = Journal(tmp_path / f"{BOOT}.journal", 600)
    for number in range(600):
        slot = journal.reserve()
        journal.settle(slot, encode_settle(settle(number, 1, 1)))
    journal.close(remove=False)
    [found] = find_orphans(tmp_path)
    assert await replay(found, pipe) == 600
    found.close(remove=True)
    assert [len(split_events(fields[b"e"])) for _, fields in store.stream(WS)] == [256, 256, 88]
    assert store.wallet(WS).balance == BALANCE - 600


async def test_an_empty_journal_still_retires_its_boot(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    """The worker died between an admission and its note: the hold is given back."""
    worker = DeadWorker(pipe, tmp_path)
    worker.leases.admit(record(), Ask(70, 7, 1, 1, worker.held.append))
    await eventually(lambda: worker.held)
    assert store.wallet(WS).held == 70
    worker.journal.close(remove=False)
    journal = orphan(worker)
    assert await replay(journal, pipe) == 0
    journal.close(remove=True)
    assert store.wallet(WS).held == 0
    await retire(pipe, BOOT)  # and once more does nothing
    assert store.wallet(WS).balance == BALANCE


# What can be settled no more is told late


def late_numbers(store: Store, workspace: str = WS) -> list[int]:
    """The exchanges on the stream whose charges nobody has taken."""
    found = []
    for _, fields in store.stream(workspace):
        if b"l" in fields:
            found += [decode_event(one).request_id for one in split_events(fields[b"e"])]
    return [int(name[4:]) for name in found]


async def replayed(worker: DeadWorker, pipe: RedisPipe, era: int = 0) -> int:
    journal = orphan(worker)
    count = await replay(journal, pipe, era)
    journal.close(remove=True)
    return count


async def test_the_journal_of_a_boot_taken_to_be_lost_is_told_late(
    store: Store, pipe: RedisPipe, dead: DeadWorker
) -> None:
    await retire(pipe, BOOT)
    before = {workspace: store.wallet(workspace) for workspace in (WS, NEIGHBOUR, ELSEWHERE)}
    assert await replayed(dead, pipe) == dead.number
    for workspace, wallet in before.items():
        assert store.wallet(workspace) == wallet
        assert wallet.held == 0
    told = sorted(late_numbers(store) + late_numbers(store, ELSEWHERE))
    assert told == list(range(1, dead.number + 1))  # the one that was settled, too


async def test_what_was_sent_to_another_redis_is_told_late(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    worker = DeadWorker(pipe, tmp_path)
    worker.journal.era = 7
    await worker.sent(1)  # settled, and kept
    await worker.ended(batch=2)  # settled, posted, and lost again? nobody can say
    worker.journal.era = 8
    await worker.ended(batch=3)
    await worker.ended()
    worker.journal.close(remove=False)
    assert await replayed(worker, pipe, era=8) == 4
    assert late_numbers(store) == [2]
    assert store.wallet(WS).balance == BALANCE - 90
    assert store.wallet(WS).held == 0


@pytest.mark.parametrize("how", ["rolled back", "emptied", "emptied before the last"])
async def test_what_redis_had_acknowledged_and_lost_is_told_late(
    store: Store, pipe: RedisPipe, tmp_path: Path, how: str
) -> None:
    worker = DeadWorker(pipe, tmp_path)
    tail = Tail(worker.journal.path.with_suffix(".tail"), 65536)
    for number in (1, 2, 3):
        slot = await worker.ended(batch=number)
        ended = settle(number, 30, 100)
        await pipe.call(batch_command(keyspace.shard_of(WS), BOOT, number, [ended]))
        tail.add(keyspace.shard_of(WS), number, join_events([ended.event]))
        worker.journal.free(slot)
    worker.journal.close(remove=False)
    tail.close(remove=False)
    boots = keyspace.boots_key(keyspace.shard_of(WS))
    if how != "rolled back":
        store.client.flushall()
    if how != "emptied":
        store.client.hset(boots, BOOT, 1 if how == "rolled back" else 3)
    assert await replayed(worker, pipe) == 0
    assert late_numbers(store) == ([2, 3] if how == "rolled back" else [1, 2, 3])


async def test_a_lease_command_that_comes_after_the_replay_leaks_nothing(
    store: Store, pipe: RedisPipe, dead: DeadWorker
) -> None:
    await replayed(dead, pipe)
    late: list[object] = []
    Leases(pipe, BOOT, lambda: 0.0).admit(record(), Ask(7, 7, 1, 1, late.append))
    await eventually(lambda: late)
    assert isinstance(late[0], Unavailable)
    assert store.wallet(WS).held == 0 and not store.snapshot(WS).leases


async def test_a_settle_command_that_comes_after_the_replay_charges_nothing(
    store: Store, pipe: RedisPipe, dead: DeadWorker
) -> None:
    await replayed(dead, pipe)
    before = store.wallet(WS)
    with pytest.raises(hiredis.ReplyError, match="FENCED"):
        await pipe.call(batch_command(keyspace.shard_of(WS), BOOT, 2, [settle(2, 30, 100)]))
    assert store.wallet(WS) == before


async def test_what_was_leased_ahead_counts_as_requests_made(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    """The worker may have used it without having told."""
    store.put_key(WS, "key_1", KeyRules(1, keyspace.LIVE, requests_per_minute=60))
    worker = DeadWorker(pipe, tmp_path)
    message = pack_figures(1, *[0] * 7, 5, 1, 1)
    words = keyspace.workspace_key(WS), keyspace.leases_key(keyspace.shard_of(WS), BOOT)
    reply = await pipe.command(
        "EVALSHA", SCRIPTS["lease"].digest, 2, *words, BOOT, "key_1", WS, message
    )
    assert unpack_figures(reply)[-5] == 5
    worker.journal.close(remove=False)
    await replayed(worker, pipe)
    counters = store.counters(WS)
    assert counters.held_requests == 0
    assert counters.requests_tat > store.now() + 4_000_000


async def test_a_worker_that_retires_itself_has_told_of_everything(
    store: Store, pipe: RedisPipe, tmp_path: Path
) -> None:
    store.put_key(WS, "key_1", KeyRules(1, keyspace.LIVE, requests_per_minute=60))
    worker = DeadWorker(pipe, tmp_path)
    worker.leases.admit(record(), Ask(70, 7, 1, 1, worker.held.append))
    await eventually(lambda: worker.held)
    before = store.counters(WS).requests_tat
    await retire(pipe, BOOT)
    assert store.counters(WS).requests_tat == before
    worker.journal.close(remove=True)


@pytest.mark.parametrize("rolled_back", [False, True])
async def test_the_tail_of_a_worker_that_stopped_is_told_if_redis_lost_its_end(
    store: Store, pipe: RedisPipe, tmp_path: Path, rolled_back: bool
) -> None:
    path = tmp_path / f"{BOOT}.tail"
    tail = Tail(path, 65536)
    for number in (1, 2):
        ended = settle(number, 30, 100)
        await pipe.call(batch_command(keyspace.shard_of(WS), BOOT, number, [ended]))
        tail.add(keyspace.shard_of(WS), number, join_events([ended.event]))
    tail.close(remove=False)
    before = keyspace.boots_key(keyspace.shard_of(WS))
    if rolled_back:
        store.client.hset(before, BOOT, 1)
    else:
        await retire(pipe, BOOT)
    assert strays(tmp_path) == [path] and not is_old(path)
    for _ in range(2):
        await replay_stray(path, pipe)
    assert late_numbers(store) == ([2] if rolled_back else [])
    assert store.client.hget(before, BOOT) == b"fenced"


def test_a_tail_beside_a_journal_is_no_stray_and_an_old_one_is_old(tmp_path: Path) -> None:
    journal, tail = tmp_path / "boot_1.journal", tmp_path / "boot_1.tail"
    journal.touch()
    tail.touch()
    assert strays(tmp_path) == []
    journal.unlink()
    assert strays(tmp_path) == [tail]
    os.utime(tail, (0, 0))
    assert is_old(tail)
