"""lease.lua leasing ahead: held like what is in flight, in every limit, and given back whole."""

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import ResponseError

from accounting.contract.figures import unpack_figures
from accounting.contract.keyspace import LIVE, REVOKED, KeyRules, LeaseRecord
from accounting.contract.keyspace import SUSPENDED as WORKSPACE_SUSPENDED
from accounting.contract.money import ceil_div
from tests.contract.store import (
    ADMITTED,
    BALANCE,
    CAP,
    CONCURRENCY,
    DAILY,
    DAY,
    MAX,
    MINUTE,
    REQUESTS,
    TOKENS,
    TOO_LARGE,
    Ask,
    Row,
    Store,
    lease_call,
)

WS = "ws_1"
NOON = 20_000 * DAY + DAY // 2
SECOND = 1_000_000


class Mine(NamedTuple):
    """What a worker says it holds: in all, of these unused, and what it admitted itself."""

    credits: int = 0
    tokens: int = 0
    slots: int = 0
    requests: int = 0
    unused_ucr: int = 0
    unused_tokens: int = 0
    used: int = 0


class Reply(NamedTuple):
    outcomes: list[int]
    extra: int
    right_us: int
    elsewhere: int
    now: int


def lease(
    store: Store,
    *asks: Ask,
    mine: tuple[int, ...] = Mine(),
    ahead: tuple[int, int, int] = (0, 0, 0),
    key: str = "key_1",
    boot: str = "boot_1",
    version: int = 1,
) -> Reply:
    """A call as a worker that leases ahead makes it: four parts, seven figures of its own."""
    keys, arguments = lease_call(
        WS, list(asks), key=key, boot=boot, mine=mine, ahead=ahead, version=version
    )
    reply = store.run("lease", keys, arguments)
    if isinstance(reply, int):
        return Reply([-reply], 0, 0, 0, 0)
    figures = unpack_figures(reply)
    return Reply(list(figures[5:-5:5]), *figures[-5:-2], figures[0])


def assert_sums(store: Store) -> None:
    """Every sum is that of the leases, and no limit is passed."""
    found = store.snapshot(WS)
    wallet, leases = found.wallet, found.leases
    assert wallet is not None
    assert wallet.held == sum(one.credits_ucr for one in leases.values())
    assert wallet.unused == sum(one.unused_ucr for one in leases.values())
    assert 0 <= wallet.held <= wallet.balance
    for key, counters in found.counters.items():
        ours = [one for name, one in leases.items() if name.endswith(f":{key}")]
        assert counters.open == sum(one.slots for one in ours)
        assert counters.held_ucr == sum(one.credits_ucr for one in ours)
        assert counters.held_tokens == sum(one.tokens for one in ours)
        assert counters.held_requests == sum(one.unused_requests for one in ours)
        rules = found.rules[key]
        if rules.cost_cap_ucr >= 0:
            assert counters.spent_ucr + counters.held_ucr <= rules.cost_cap_ucr
        if rules.concurrency:
            assert counters.open <= rules.concurrency


def test_what_is_leased_ahead_is_held_and_counted(store: Store) -> None:
    store.fund(WS, 8000)
    reply = lease(store, Ask(100, 7), ahead=(4, 100, 7))
    assert reply.outcomes == [ADMITTED]
    assert (reply.extra, reply.right_us, reply.elsewhere) == (4, SECOND, 0)
    record = LeaseRecord(500, 35, 5, 4, 400, 28, reply.now + 1_100_000)
    assert store.snapshot(WS).leases == {"boot_1:key_1": record}
    assert (store.wallet(WS).held, store.wallet(WS).unused) == (500, 400)
    assert store.counters(WS).held_requests == 4
    assert_sums(store)


# At most an eighth of what is left, of whatever is scarcest

LIMITS: list[tuple[dict[str, int], int, int]] = [
    ({}, 1000 * 80, 10),  # balance
    ({"cost_cap_ucr": 1000 * 40}, MAX, 5),
    ({"requests_per_minute": 32}, MAX, 4),
    ({"tokens_per_minute": 10 * 24}, MAX, 3),
    ({"tokens_per_day": 10 * 16}, MAX, 2),
    ({"concurrency": 56}, MAX, 7),
]


@pytest.mark.parametrize(("rules", "balance", "eighth"), LIMITS)
def test_an_eighth_of_what_is_left_at_most(
    store: Store, rules: dict[str, int], balance: int, eighth: int
) -> None:
    store.fund(WS, balance, **rules)
    assert lease(store, ahead=(500, 1000, 10)).extra == eighth
    assert_sums(store)


@pytest.mark.parametrize(("rules", "balance", "eighth"), LIMITS)
def test_less_than_an_eighth_is_none(
    store: Store, rules: dict[str, int], balance: int, eighth: int
) -> None:
    scarce = {name: figure // eighth - figure // eighth // 8 for name, figure in rules.items()}
    store.fund(WS, balance if rules else 7999, **scarce)
    assert lease(store, Ask(), ahead=(500, 1000, 10)).extra == 0
    assert store.wallet(WS).unused == 0


CASES = [
    ({}, BALANCE),
    ({"cost_cap_ucr": 8000}, CAP),
    ({"requests_per_minute": 8}, REQUESTS),
    ({"tokens_per_minute": 80}, TOKENS),
    ({"tokens_per_day": 80}, DAILY),
    ({"concurrency": 8}, CONCURRENCY),
]


@pytest.mark.parametrize(("rules", "refused"), CASES)
def test_ahead_counts_against_each_limit_like_what_is_in_flight(
    clocked: Store, rules: dict[str, int], refused: int
) -> None:
    """Of eight, one is leased ahead: another boot gets seven, and is told of the eighth."""
    clocked.set_clock(NOON)
    clocked.fund(WS, MAX if rules else 8000, **rules)
    mine = Mine(1000, 10, 1, 1, 1000, 10)
    assert lease(clocked, ahead=(1, 1000, 10)).extra == 1
    others = lease(clocked, *[Ask(1000, 10)] * 8, boot="boot_2")
    assert others.outcomes == [ADMITTED] * 7 + [refused]
    assert others.elsewhere == 1
    assert_sums(clocked)
    held = Mine(7000, 70, 7)
    assert lease(clocked, mine=mine._replace(slots=1)).outcomes == []
    assert lease(clocked).outcomes == []  # declares nothing any more: all of it goes back
    assert clocked.wallet(WS).unused == 0
    assert lease(clocked, Ask(1000, 10), boot="boot_2", mine=held).outcomes == [ADMITTED]
    last = lease(clocked, Ask(1000, 10), boot="boot_2", mine=Mine(8000, 80, 8))
    assert (last.outcomes, last.elsewhere) == ([refused], 0)
    assert_sums(clocked)


@pytest.mark.parametrize("state", ["refused", "suspended", "revoked", "expired"])
def test_nothing_is_leased_ahead_where_anything_is_refused(store: Store, state: str) -> None:
    store.fund(WS, 8000)
    if state == "suspended":
        store.put_workspace(WS, WORKSPACE_SUSPENDED)
    elif state != "refused":
        ended = REVOKED if state == "revoked" else LIVE
        store.put_key(WS, "key_1", KeyRules(1, ended, expires_at_us=1))
    asks = [Ask(10), Ask(9000), Ask(10)] if state == "refused" else []
    assert lease(store, *asks, ahead=(5, 10, 1)).extra == 0
    assert store.wallet(WS).unused == 0


def test_nothing_is_elsewhere_when_it_is_ones_own_or_of_no_use(store: Store) -> None:
    store.fund(WS, 8000)
    store.fund(WS, key="key_2", concurrency=1, tokens_per_minute=5)
    lease(store, ahead=(1, 1000, 1))
    own = lease(store, Ask(7500), mine=Mine(1000, 1, 1, 1, 1000, 1))
    assert (own.outcomes, own.elsewhere) == ([BALANCE], 0)
    assert lease(store, Ask(7500), boot="boot_2").elsewhere == 1
    full = lease(store, Ask(1), Ask(1), key="key_2", boot="boot_2")
    assert (full.outcomes, full.elsewhere) == ([ADMITTED, CONCURRENCY], 0)  # another key's lease
    large = lease(store, Ask(1, 9), key="key_2", boot="boot_2", mine=Mine(1, 0, 1))
    assert (large.outcomes, large.elsewhere) == ([TOO_LARGE], 0)


def test_less_declared_is_given_back_though_the_version_is_stale(store: Store) -> None:
    store.fund(WS, 8000, requests_per_minute=600)
    lease(store, Ask(10, 1), ahead=(9, 10, 1))
    store.put_key(WS, "key_1", KeyRules(2, LIVE, requests_per_minute=600))
    stale = lease(store, Ask(10, 1), mine=Mine(40, 4, 4, used=3), ahead=(9, 10, 1))
    assert stale.outcomes == [-2]
    found = store.snapshot(WS)
    assert found.leases["boot_1:key_1"].unused_requests == 0
    assert (store.wallet(WS).held, store.wallet(WS).unused) == (40, 0)
    counters = store.counters(WS)
    assert counters.requests_tat == counters.busy_since + 4 * MINUTE // 600  # one, and three used
    assert_sums(store)


def test_the_right_ends_with_the_key(clocked: Store) -> None:
    clocked.fund(WS, 8000, expires_at_us=NOON + 300_000)
    clocked.set_clock(NOON)
    assert lease(clocked, ahead=(1, 10, 1)).right_us == 300_000
    clocked.set_clock(NOON + 299_999)
    assert lease(clocked, mine=Mine(10, 1, 1, 1, 10, 1), ahead=(1, 10, 1)).right_us == 1
    clocked.set_clock(NOON + 300_000)
    late = lease(clocked, mine=Mine(20, 2, 2, 2, 20, 2), ahead=(1, 10, 1))
    assert (late.extra, late.right_us) == (0, 0)


def test_the_deadline_moves_with_each_call_that_keeps_some(clocked: Store) -> None:
    clocked.fund(WS, 8000)
    clocked.set_clock(NOON)
    lease(clocked, ahead=(2, 10, 1))
    clocked.set_clock(NOON + 500_000)
    lease(clocked, mine=Mine(20, 2, 2, 1, 10, 1, 1))
    assert clocked.snapshot(WS).leases["boot_1:key_1"].deadline_us == NOON + 1_600_000


def test_a_settle_before_the_use_is_told_leaves_the_sums_right(store: Store) -> None:
    store.fund(WS, 8000)
    lease(store, ahead=(10, 10, 1))
    store.settle(1, Row(WS, credits=40, charge=40, tokens=4, used=4, slots=4))
    assert_sums(store)
    lease(store, mine=Mine(60, 6, 6, 6, 60, 6, 4))
    assert (store.wallet(WS).balance, store.wallet(WS).held) == (7960, 60)
    assert store.wallet(WS).unused == 60
    assert_sums(store)


# Requests per minute

few = settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@few
@given(
    rpm=st.sampled_from([8, 17, 60, 100]),
    steps=st.lists(
        st.tuples(st.integers(0, 900_000), st.integers(0, 12), st.integers(0, 3), st.booleans()),
        min_size=5,
        max_size=30,
    ),
)
def test_no_window_admits_more_than_a_bucket_and_its_refill(
    clocked: Store, rpm: int, steps: list[tuple[int, int, int, bool]]
) -> None:
    """One boot uses what it has ahead and tells later; another asks for each."""
    clocked.client.flushall()
    clocked.fund(WS, 1, requests_per_minute=rpm)
    gap = ceil_div(MINUTE, rpm)
    now, free, used, open_here, open_there = NOON, 0, 0, 0, 0
    admitted: list[int] = []
    for wait, uses, others, gives_back in steps:
        now += wait
        clocked.set_clock(now)
        count = min(uses, free)
        free, used = free - count, used + count
        open_here += count
        there = lease(clocked, *[Ask()] * others, boot="boot_2", mine=Mine(slots=open_there))
        open_there += there.outcomes.count(ADMITTED)
        admitted += [now] * (count + there.outcomes.count(ADMITTED))
        free = 0 if gives_back else free
        mine = Mine(slots=open_here + free, requests=free, used=used)
        free += lease(clocked, mine=mine, ahead=(5, 0, 0)).extra
        used = 0
        assert_sums(clocked)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            assert last - first + 1 <= rpm + (admitted[last] - admitted[first]) // gap


def test_used_requests_are_counted_once_told(clocked: Store) -> None:
    clocked.fund(WS, 1, requests_per_minute=80)
    clocked.set_clock(NOON)
    assert lease(clocked, ahead=(10, 0, 0)).extra == 10
    lease(clocked, mine=Mine(slots=10, requests=3, used=7))
    counters = clocked.counters(WS)
    assert (counters.held_requests, counters.requests_tat) == (3, NOON + 7 * MINUTE // 80)
    rest = lease(clocked, *[Ask()] * 71, boot="boot_2")
    assert rest.outcomes == [ADMITTED] * 70 + [REQUESTS]


# What is malformed is refused before the first write

BAD = [-1, MAX + 1, 2**62]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", range(7))
def test_bad_figures_of_ones_own_write_nothing(store: Store, field: int, value: int) -> None:
    store.fund(WS, 8000)
    lease(store, Ask(10, 1), ahead=(3, 10, 1))
    before = store.everything()
    mine = [30, 3, 3, 2, 20, 2, 1]
    mine[field] = value
    with pytest.raises(ResponseError, match="whole number"):
        lease(store, Ask(1), mine=tuple(mine))
    assert store.everything() == before


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", range(3))
def test_bad_figures_to_lease_ahead_write_nothing(store: Store, field: int, value: int) -> None:
    store.fund(WS, 8000)
    before = store.everything()
    ahead = (2 if field else value, value if field == 1 else 10, value if field == 2 else 1)
    with pytest.raises(ResponseError, match="whole number"):
        lease(store, Ask(1), ahead=ahead)
    assert store.everything() == before
