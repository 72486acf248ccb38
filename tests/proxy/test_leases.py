"""Leases against the real script: coalesced calls, lost replies, stale keys, giving back."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from accounting.contract import keyspace
from accounting.contract.errors import (
    AccountSuspended,
    ConcurrencyLimited,
    CreditInFlight,
    InsufficientCredit,
    InvalidKey,
    ModelNotAllowed,
    Unavailable,
)
from accounting.contract.keyspace import LIVE, REVOKED, SUSPENDED, KeyRules, LeaseRecord
from proxy.admission import Hold
from proxy.key_lease import Ask, KeyLease, Stale
from proxy.leases import Leases
from proxy.redis_pipe import RedisPipe
from tests.contract.store import Store
from tests.proxy.redis_scene import Between, empty_store, open_pipe, record
from tests.waiting import eventually

WS, KEY, BOOT = "ws_1", "key_1", "boot_1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """One worker's leases, with what its requests were told, in order."""

    def __init__(self, pipe: RedisPipe, boot: str = BOOT) -> None:
        self.clock = Clock()
        self.leases = Leases(pipe, boot, self.clock)
        self.told: list[Any] = []

    def ask(
        self, credits: int = 10, tokens: int = 5, allowed: int = 1, version: int = 1
    ) -> KeyLease:
        ask = Ask(credits, tokens, allowed, version, self.told.append)
        return self.leases.admit(record(version=version), ask)

    async def answer(self, credits: int = 10, **more: int) -> Any:
        """One request, and what it was told."""
        before = len(self.told)
        self.ask(credits, **more)
        await self.heard(before + 1)
        return self.told[-1]

    async def heard(self, number: int) -> None:
        await eventually(lambda: len(self.told) >= number)
        assert len(self.told) == number

    @property
    def kinds(self) -> list[type]:
        return [type(one) for one in self.told]


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
    async with open_pipe(between.url, timeout_seconds=0.2) as pipe:
        yield Desk(pipe)


def lease_calls(between: Between) -> int:
    return between.commands_seen.count(b"EVALSHA")


async def test_a_lone_request_is_one_call(store: Store, between: Between, desk: Desk) -> None:
    store.fund(WS, 100)
    hold = await desk.answer(30, tokens=7)
    assert isinstance(hold, Hold)
    assert (hold.credits_ucr, hold.tokens, hold.rate_headers) == (30, 7, b"")
    assert abs(hold.admitted_at_us - store.now()) < 5_000_000
    assert lease_calls(between) == 1
    assert store.wallet(WS).held == 30
    assert store.snapshot(WS).leases == {f"{BOOT}:{KEY}": LeaseRecord(30, 7, 1)}


async def test_requests_that_meet_a_call_under_way_go_together_in_the_next(
    store: Store, between: Between, desk: Desk
) -> None:
    store.fund(WS, 1000)
    for _ in range(20):
        desk.ask(10)
    await desk.heard(20)
    assert desk.kinds == [Hold] * 20
    assert lease_calls(between) == 2  # the first alone, nineteen together
    assert store.wallet(WS).held == 200


async def test_each_is_judged_in_order(store: Store, desk: Desk) -> None:
    store.fund(WS, 100)
    for credits in (10, 60, 50, 30, 1):
        desk.ask(credits)
    await desk.heard(5)
    assert desk.kinds == [Hold, Hold, CreditInFlight, Hold, CreditInFlight]
    assert [one.credits_ucr for one in desk.told if isinstance(one, Hold)] == [10, 60, 30]
    assert store.wallet(WS).held == 100


async def test_one_batch_may_hold_every_kind_of_answer(store: Store, desk: Desk) -> None:
    store.fund(WS, 100, concurrency=2)
    for credits, allowed in ((1, 1), (1, 0), (200, 1), (1, 1), (1, 1)):
        desk.ask(credits, allowed=allowed)
    await desk.heard(5)
    assert desk.kinds == [Hold, ModelNotAllowed, InsufficientCredit, Hold, ConcurrencyLimited]


async def test_a_wallet_for_exactly_k_serves_exactly_k(store: Store, desk: Desk) -> None:
    store.fund(WS, 70)
    for _ in range(10):
        desk.ask(10)
    await desk.heard(10)
    assert desk.kinds == [Hold] * 7 + [CreditInFlight] * 3


async def test_rate_headers_come_with_the_hold(store: Store, desk: Desk) -> None:
    store.fund(WS, 100, requests_per_minute=60, tokens_per_minute=6000)
    hold = await desk.answer(1, tokens=100)
    assert hold.rate_headers.startswith(
        b"x-ratelimit-limit-requests: 60\r\nx-ratelimit-remaining-requests: 59\r\n"
        b"x-ratelimit-reset-requests: 1s\r\n"
        b"x-ratelimit-limit-tokens: 6000\r\nx-ratelimit-remaining-tokens: 5900\r\n"
    )


async def test_suspended_and_revoked(store: Store, desk: Desk) -> None:
    store.fund(WS, 100)
    store.put_workspace(WS, SUSPENDED)
    assert isinstance(await desk.answer(), AccountSuspended)
    store.put_key(WS, KEY, KeyRules(1, REVOKED))
    assert isinstance(await desk.answer(), InvalidKey)
    assert store.wallet(WS).held == 0


# A record that is not current, or not there


async def test_another_version_is_stale(store: Store, desk: Desk) -> None:
    store.fund(WS, 100, version=2)
    assert isinstance(await desk.answer(version=1), Stale)
    assert isinstance(await desk.answer(version=2), Hold)
    store.put_key(WS, KEY, KeyRules(3, LIVE))
    assert isinstance(await desk.answer(version=2), Stale)


async def test_a_stale_request_makes_those_beside_it_ask_again(store: Store, desk: Desk) -> None:
    store.fund(WS, 100, version=2)
    desk.ask(version=2)
    desk.ask(version=1)
    desk.ask(version=2)
    await desk.heard(3)
    assert desk.kinds == [Hold, Stale, Stale]
    assert store.wallet(WS).held == 10


async def test_unknown_here_is_an_invalid_key_where_redis_is_filled(desk: Desk) -> None:
    desk.ask()
    desk.ask()
    await desk.heard(2)
    assert desk.kinds == [InvalidKey, InvalidKey]


async def test_unknown_here_is_unavailable_where_redis_is_empty(store: Store, desk: Desk) -> None:
    store.client.delete(keyspace.EPOCH)
    desk.ask()
    desk.ask()
    await desk.heard(2)
    assert desk.kinds == [Unavailable, Unavailable]


# Replies that do not come


async def test_a_lost_reply_is_unavailable_and_corrected_by_the_next_call(
    store: Store, between: Between, desk: Desk
) -> None:
    store.fund(WS, 100)
    between.silent = True
    desk.ask(60)
    desk.ask(20)
    await eventually(lambda: store.wallet(WS).held == 60)  # taken, and nobody knows
    await desk.heard(2)
    assert desk.kinds == [Unavailable, Unavailable]
    between.silent = False
    between.cut()
    await eventually(lambda: desk.leases._pipe.up)
    assert isinstance(await desk.answer(100), Hold)  # what was lost is free again
    assert store.wallet(WS).held == 100
    assert store.snapshot(WS).leases == {f"{BOOT}:{KEY}": LeaseRecord(100, 5, 1)}


async def test_what_nobody_knows_to_be_held_is_given_back_unasked(
    store: Store, between: Between, desk: Desk
) -> None:
    """No request may come under that key for long: as soon as Redis is back."""
    store.fund(WS, 100)
    between.silent = True
    assert isinstance(await desk.answer(60), Unavailable)
    await eventually(lambda: store.wallet(WS).held == 60)
    desk.leases.release_unused()  # nobody can be told yet
    between.silent = False
    between.cut()
    await eventually(lambda: desk.leases._pipe.up)
    desk.leases.release_unused()
    await eventually(lambda: store.wallet(WS).held == 0)


async def test_what_is_in_flight_survives_a_lost_reply(
    store: Store, between: Between, desk: Desk
) -> None:
    store.fund(WS, 100)
    await desk.answer(40)
    between.silent = True
    assert isinstance(await desk.answer(30), Unavailable)
    between.silent = False
    between.cut()
    await eventually(lambda: desk.leases._pipe.up)
    await desk.answer(50)
    assert store.wallet(WS).held == 90  # 40 and 50


async def test_no_redis_is_unavailable_at_once(between: Between, desk: Desk) -> None:
    between.closed = True
    between.cut()
    await eventually(lambda: not desk.leases._pipe.up)
    assert isinstance(await desk.answer(), Unavailable)


async def test_scripts_lost_by_redis_cost_one_answer(store: Store, desk: Desk) -> None:
    store.fund(WS, 100)
    store.client.script_flush()
    assert isinstance(await desk.answer(), Unavailable)
    assert isinstance(await desk.answer(), Hold)


async def test_a_request_whose_answer_raises_costs_the_others_nothing(
    store: Store, desk: Desk
) -> None:
    store.fund(WS, 100)
    caught: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))

    def broken(outcome: object) -> None:
        raise ValueError("a bug")

    desk.ask(1)
    desk.leases.admit(record(), Ask(1, 1, 1, 1, broken))
    desk.ask(1)
    await desk.heard(2)
    desk.leases.admit(record(), Ask(1, 1, 1, 9, broken))
    desk.ask(1, version=9)
    await desk.heard(3)
    assert desk.kinds == [Hold, Hold, Stale]
    assert len(caught) == 2


# Giving back


async def test_idle_leases_are_given_back_and_forgotten(store: Store, desk: Desk) -> None:
    store.fund(WS, 100)
    lease = desk.ask(40)
    await desk.heard(1)
    desk.clock.now += 60
    desk.leases.release_idle()  # not idle: a request is open
    assert store.wallet(WS).held == 40
    lease.drop(40, 5)  # as if its settle had gone out
    desk.leases.release_idle()
    await eventually(lambda: store.wallet(WS).held == 0)
    assert not store.leased_by(WS, BOOT)
    assert not store.snapshot(WS).leases
    assert repr(desk.leases) == "Leases([])"
    counters = store.counters(WS)
    assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)


async def test_leases_in_recent_use_are_kept(store: Store, desk: Desk) -> None:
    store.fund(WS, 100)
    desk.ask(40)
    await desk.heard(1)
    desk.clock.now += 1
    desk.leases.release_idle()
    assert "key_1" in repr(desk.leases)


async def test_all_are_given_back_at_the_end_but_those_in_flight(store: Store, desk: Desk) -> None:
    for workspace in (WS, "ws_2"):
        store.fund(workspace, 100, key=f"key_of_{workspace}")
        lease = desk.leases.admit(
            record(workspace, f"key_of_{workspace}"), Ask(40, 5, 1, 1, desk.told.append)
        )
    await desk.heard(2)
    lease.drop(40, 5)
    desk.leases.release_all()
    await eventually(lambda: store.wallet("ws_2").held == 0)
    assert store.wallet(WS).held == 40


async def test_a_lost_release_is_tried_again(store: Store, between: Between, desk: Desk) -> None:
    store.fund(WS, 100)
    lease = desk.ask(40)
    await desk.heard(1)
    lease.drop(40, 5)
    between.closed = True
    between.cut()
    await eventually(lambda: not desk.leases._pipe.up)
    desk.clock.now += 60
    desk.leases.release_idle()
    await eventually(lambda: "key_1" in repr(desk.leases))
    assert store.wallet(WS).held == 40
    between.closed = False
    await eventually(lambda: desk.leases._pipe.up)
    desk.leases.release_idle()
    await eventually(lambda: store.wallet(WS).held == 0)


async def test_two_boots_share_one_key(store: Store, redis_url: str) -> None:
    store.fund(WS, 100)
    async with open_pipe(redis_url) as pipe_1, open_pipe(redis_url) as pipe_2:
        desks = [Desk(pipe_1, "boot_1"), Desk(pipe_2, "boot_2")]
        answers = await asyncio.gather(*(desk.answer(60) for desk in desks))
        assert sorted(type(answer).__name__ for answer in answers) == ["CreditInFlight", "Hold"]
        assert store.wallet(WS).held == 60
