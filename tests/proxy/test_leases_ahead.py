"""Leasing ahead against the real scripts: rights that end, recalls, and limits shared exactly.

Where time matters the worker's clock is the test's own; Redis keeps its own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

from accounting.contract.errors import CreditInFlight, Failure
from accounting.contract.keyspace import LIVE, REVOKED, KeyRules, workspace_key
from accounting.contract.money import ceil_div
from accounting.recall import recall
from proxy import recalls
from proxy.admission import Hold
from proxy.key_lease import Ask, KeyLease, Stale
from proxy.leases import Leases
from proxy.redis_pipe import RedisPipe
from tests.contract.store import MINUTE, Row, Store
from tests.proxy.redis_scene import Between, empty_store, open_pipe, record
from tests.waiting import eventually

WS, KEY = "ws_1", "key_1"
CREDITS, TOKENS = 10, 5
APART_SECONDS = 0.001  # between two requests of a hot key


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """One worker's leases of one key, with what its requests were told, in order."""

    def __init__(self, pipe: RedisPipe, boot: str = "boot_1", own_clock: bool = True) -> None:
        self.clock = Clock()
        self.boot = boot
        self.leases = Leases(pipe, boot, self.clock if own_clock else time.monotonic)
        self.leases.may_lease_ahead = True
        self.lease: KeyLease = self.leases.of(record())
        self.told: list[Any] = []

    def ask(self, credits: int = CREDITS, version: int = 1) -> bool:
        """True when it was admitted before the call returned."""
        before = len(self.told)
        ask = Ask(credits, TOKENS, 1, version, self.told.append)
        self.leases.admit(record(version=version), ask)
        return len(self.told) > before

    async def answer(self, credits: int = CREDITS, version: int = 1) -> Any:
        """One request, and what it was told."""
        told: list[Hold | Failure | Stale] = []
        ask = Ask(credits, TOKENS, 1, version, told.append)
        self.leases.admit(record(version=version), ask)
        await eventually(lambda: told)
        self.told += told
        return told[0]

    async def warm(self) -> None:
        """Two requests a thousandth of a second apart: some are then leased ahead."""
        assert isinstance(await self.answer(), Hold)
        self.clock.now += APART_SECONDS
        assert isinstance(await self.answer(), Hold)
        assert self.lease.free_requests > 0

    @property
    def holds(self) -> int:
        return sum(isinstance(one, Hold) for one in self.told)

    def settle_all(self, store: Store) -> None:
        """All its requests end, charged in full."""
        count = self.holds
        row = Row(WS, KEY, *[count * CREDITS] * 2, count * TOKENS, count, count)
        store.settle(1, row, boot=self.boot)
        for _ in range(count):
            self.lease.drop(CREDITS, TOKENS)
        self.leases.release_all()


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with empty_store(redis_url) as store:
        yield store


@pytest.fixture
async def between(store: Store, redis_url: str) -> AsyncIterator[Between]:
    async with Between(redis_url) as between:
        yield between


@pytest.fixture
async def desk(between: Between) -> AsyncIterator[Desk]:
    async with open_pipe(between.url) as pipe:
        yield Desk(pipe)


def lease_calls(between: Between) -> int:
    return between.commands_seen.count(b"EVALSHA")


async def agreed(store: Store, desk: Desk, unused: int = 0) -> None:
    """Redis holds for this worker what it says itself, and so much of it unused."""
    lease = desk.lease

    def same() -> bool:
        found = store.snapshot(WS).leases[f"{desk.boot}:{KEY}"]
        theirs = found.credits_ucr, found.tokens, found.slots, found.unused_requests
        ours = lease.credits, lease.tokens, lease.slots, lease.free_requests
        return theirs == ours and found.unused_requests == unused

    await eventually(same)
    in_flight = desk.holds + unused
    assert (lease.credits, lease.slots) == (in_flight * CREDITS, in_flight)
    assert store.wallet(WS).unused == unused * CREDITS


# The right to admit


async def test_a_hot_key_is_admitted_without_a_call(
    store: Store, between: Between, desk: Desk
) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    free, calls = desk.lease.free_requests, lease_calls(between)
    assert store.wallet(WS).unused == free * CREDITS
    for _ in range(free // 2):
        assert desk.ask()
    assert desk.holds == 2 + free // 2
    assert lease_calls(between) == calls
    assert store.wallet(WS).held == desk.lease.credits == (2 + free) * CREDITS


async def test_nothing_is_leased_ahead_while_recalls_are_not_heard(
    store: Store, desk: Desk
) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    desk.leases.may_lease_ahead = False
    desk.leases.give_back_all()
    await agreed(store, desk)
    for _ in range(3):
        desk.clock.now += APART_SECONDS
        assert isinstance(await desk.answer(), Hold)
    assert desk.lease.free_requests == 0
    await agreed(store, desk)


async def test_a_paused_worker_admits_nothing_on_an_old_right(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    desk.clock.now += 0.999
    assert desk.ask()
    desk.clock.now += 0.002
    assert not desk.ask()
    await eventually(lambda: desk.holds == 4)  # by a call, which gave back the rest
    await agreed(store, desk, unused=desk.lease.free_requests)


async def test_what_counts_for_nothing_at_redis_no_worker_admits_on(
    store: Store, desk: Desk
) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    started = time.monotonic()
    await eventually(lambda: store.run("ahead", [workspace_key(WS)], []) == 0)
    desk.clock.now += time.monotonic() - started  # what passed at Redis passed here too
    assert not desk.ask()
    await eventually(lambda: desk.holds == 3)
    await agreed(store, desk, unused=desk.lease.free_requests)


async def test_another_version_is_not_admitted_from_what_is_ahead(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    assert not desk.ask(version=2)
    await eventually(lambda: isinstance(desk.told[-1], Stale))
    await agreed(store, desk)


# Giving back


async def test_a_recall_gives_back_at_once(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    assert desk.ask()
    desk.leases.recalled("ws_2")
    assert desk.ask()
    desk.leases.recalled(WS)
    assert not desk.ask()
    await eventually(lambda: desk.holds == 5)
    await agreed(store, desk)


async def test_a_recall_that_meets_a_call_keeps_the_hold_it_brings(
    store: Store, desk: Desk
) -> None:
    store.fund(WS, 100_000)
    assert isinstance(await desk.answer(), Hold)
    desk.clock.now += APART_SECONDS
    assert not desk.ask()  # its call will also bring some ahead
    desk.leases.recalled(WS)
    await eventually(lambda: desk.holds == 2)
    await agreed(store, desk)
    assert store.wallet(WS).held == 2 * CREDITS


async def test_a_recall_that_meets_a_refill(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    while not desk.lease.calling:
        desk.clock.now += APART_SECONDS
        assert desk.ask()
    desk.leases.recalled(WS)
    assert not desk.ask()
    await eventually(lambda: not desk.lease.calling)
    await agreed(store, desk)


async def test_a_recall_tells_of_what_was_used_up(store: Store, desk: Desk) -> None:
    store.fund(WS, 3 * 8 * CREDITS + CREDITS)
    await desk.warm()
    while desk.lease.free_requests:
        assert desk.ask()
    assert not desk.lease.calling
    assert store.wallet(WS).unused > 0
    desk.leases.recalled(WS)
    await agreed(store, desk)


async def test_quiet_leases_come_back(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    desk.leases.release_unused()
    assert desk.ask()  # not quiet
    desk.leases.release_unused()
    assert desk.lease.free_requests
    desk.leases.release_unused()
    await agreed(store, desk)


async def test_what_was_used_is_told_before_long(store: Store, desk: Desk) -> None:
    """Past its deadline, Redis takes back what it thinks unused; it must not be in flight."""
    store.fund(WS, 100_000)
    await desk.warm()
    assert desk.ask()
    desk.clock.now += 0.1
    desk.leases.release_unused()
    await agreed(store, desk, unused=desk.lease.free_requests)
    assert desk.lease.free_requests


async def test_what_was_used_is_told_at_the_end_of_a_worker(store: Store, desk: Desk) -> None:
    """Or a worker that is replaced would give its last requests per minute away twice."""
    store.fund(WS, 100_000, requests_per_minute=60)
    await desk.warm()
    assert desk.ask()
    count = desk.holds
    desk.settle_all(store)
    await eventually(lambda: not store.snapshot(WS).leases)
    counters = store.counters(WS)
    assert counters.requests_tat - counters.busy_since == count * MINUTE // 60
    assert counters.held_requests == 0


async def test_a_stale_refill_gives_back(store: Store, desk: Desk) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    store.put_key(WS, KEY, KeyRules(2, LIVE))
    while not desk.lease.calling:
        desk.clock.now += APART_SECONDS
        assert desk.ask()
    assert desk.ask()  # while its call is under way
    await eventually(lambda: not desk.lease.calling)
    await agreed(store, desk)


async def test_after_an_outage_what_was_let_go_is_told(
    store: Store, between: Between, desk: Desk
) -> None:
    """The reply of a refill is lost, with what it brought; what was used stays held."""
    store.fund(WS, 100_000)
    await desk.warm()
    between.silent = True
    held = store.wallet(WS).held
    while not desk.lease.calling:
        desk.clock.now += APART_SECONDS
        assert desk.ask()
    await eventually(lambda: store.wallet(WS).held > held)
    between.silent = False
    between.cut()
    await eventually(lambda: not desk.lease.calling)
    desk.leases.release_unused()  # still down: told again later
    await eventually(lambda: desk.leases._pipe.up and not desk.lease.calling)
    desk.leases.release_unused()
    await agreed(store, desk)


# Several workers


class Floor:
    """Eight workers of one key that hear each other's recalls."""

    def __init__(self, stack: AsyncExitStack, url: str) -> None:
        self._stack, self._url = stack, url
        self.desks: list[Desk] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        for number in range(8):
            pipe = await self._stack.enter_async_context(open_pipe(self._url))
            desk = Desk(pipe, f"boot_{number}", own_clock=False)
            desk.leases.may_lease_ahead = False
            self.desks.append(desk)
            self._tasks.append(asyncio.create_task(self._listen(desk)))
        await eventually(lambda: all(desk.leases.may_lease_ahead for desk in self.desks))

    async def _listen(self, desk: Desk) -> None:
        def heard(yes: bool) -> None:
            desk.leases.may_lease_ahead = yes

        await recalls.listen(self._url, 5.0, desk.leases.recalled, heard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def holds(self) -> int:
        return sum(desk.holds for desk in self.desks)

    async def settled(self, store: Store) -> None:
        """Everything ends: nothing is held any more."""
        spent, before = self.holds * CREDITS, store.wallet(WS).balance
        for desk in self.desks:
            desk.settle_all(store)
        await eventually(lambda: store.wallet(WS).held == 0)
        found = store.snapshot(WS)
        assert found.wallet is not None
        assert (found.wallet.unused, found.wallet.balance) == (0, before - spent)
        counters = found.counters[KEY]
        sums = counters.open, counters.held_ucr, counters.held_tokens, counters.held_requests
        assert sums == (0, 0, 0, 0)


@pytest.fixture
async def floor(store: Store, redis_url: str) -> AsyncIterator[Floor]:
    async with AsyncExitStack() as stack:
        floor = Floor(stack, redis_url)
        try:
            await floor.open()
            yield floor
        finally:
            await floor.close()


async def heat(desks: list[Desk]) -> None:
    """All at once, until each of them has some ahead."""
    for desk in desks:
        for _ in range(20):
            if desk.lease.free_requests:
                break
            assert isinstance(await desk.answer(), Hold)
        assert desk.lease.free_requests


async def ask_until_refused(desk: Desk) -> None:
    while isinstance(await desk.answer(), Hold):
        pass


@pytest.mark.parametrize("k", [1, 100, 301])
async def test_a_wallet_for_exactly_k_serves_exactly_k(store: Store, floor: Floor, k: int) -> None:
    store.fund(WS, k * CREDITS)
    await asyncio.gather(*(ask_until_refused(desk) for desk in floor.desks))
    assert floor.holds == k
    wallet = store.wallet(WS)
    assert (wallet.held, wallet.unused) == (k * CREDITS, 0)
    await floor.settled(store)


async def test_one_gets_the_last_that_others_had_ahead(store: Store, floor: Floor) -> None:
    store.fund(WS, 1000 * CREDITS)
    await heat(floor.desks)
    elsewhere = store.wallet(WS).unused
    assert elsewhere > 0
    last = floor.desks[0]
    left = 1000 - floor.holds
    for _ in range(left):
        last.ask()
    await eventually(lambda: floor.holds == 1000)
    assert isinstance(await last.answer(), CreditInFlight)
    assert store.wallet(WS).held == store.wallet(WS).balance
    await floor.settled(store)


async def test_a_shared_concurrency_is_met_exactly(store: Store, floor: Floor) -> None:
    store.fund(WS, 10**9, concurrency=150)
    await asyncio.gather(*(ask_until_refused(desk) for desk in floor.desks))
    assert floor.holds == store.counters(WS).open == 150
    await floor.settled(store)


async def test_a_shared_cost_cap_is_met_exactly(store: Store, floor: Floor) -> None:
    store.fund(WS, 10**9, cost_cap_ucr=150 * CREDITS)
    await asyncio.gather(*(ask_until_refused(desk) for desk in floor.desks))
    assert floor.holds * CREDITS == store.counters(WS).held_ucr == 150 * CREDITS
    await floor.settled(store)


async def test_shared_requests_per_minute_are_met(store: Store, floor: Floor) -> None:
    store.fund(WS, 10**9, requests_per_minute=120)
    started = store.now()
    await asyncio.gather(*(ask_until_refused(desk) for desk in floor.desks))
    refilled = (store.now() - started) // ceil_div(MINUTE, 120)
    assert 120 <= floor.holds <= 120 + refilled
    await floor.settled(store)


async def test_after_a_revoke_no_worker_admits(store: Store, floor: Floor, redis_url: str) -> None:
    """Requests keep coming while it is revoked; none is admitted after the recall's return."""
    store.fund(WS, 10**9)
    await heat(floor.desks)
    store.put_key(WS, KEY, KeyRules(2, REVOKED))
    askers = [asyncio.create_task(ask_until_refused(desk)) for desk in floor.desks]
    async with Redis.from_url(redis_url) as client:
        await recall(client, WS)
    assert not any(desk.ask() for desk in floor.desks)
    unused = [desk.lease.free_requests for desk in floor.desks]
    assert (unused, store.wallet(WS).unused) == ([0] * 8, 0)
    await asyncio.gather(*askers)
    await eventually(lambda: not any(desk.lease.calling for desk in floor.desks))
    assert all(isinstance(desk.told[-1], Stale) for desk in floor.desks)
    await floor.settled(store)


async def test_a_recall_outlasts_the_right_of_a_worker_that_hears_nothing(
    store: Store, desk: Desk, redis_url: str
) -> None:
    store.fund(WS, 100_000)
    await desk.warm()
    store.put_key(WS, KEY, KeyRules(2, REVOKED))
    started = time.monotonic()
    async with Redis.from_url(redis_url) as client:
        await recall(client, WS)
    desk.clock.now += time.monotonic() - started
    assert not desk.ask()
    await eventually(lambda: isinstance(desk.told[-1], Stale))
    await agreed(store, desk)
