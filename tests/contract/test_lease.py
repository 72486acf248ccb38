"""lease.lua on a real Redis: each verdict, its precedence, and that a refusal takes nothing."""

from typing import Any

import msgspec
import pytest
from redis import ResponseError

from accounting.contract.figures import pack_figures
from accounting.contract.keyspace import (
    LIVE,
    REVOKED,
    KeyCounters,
    KeyRules,
    LeaseRecord,
    Wallet,
    leases_key,
    shard_of,
    workspace_key,
)
from accounting.contract.keyspace import (
    SUSPENDED as WORKSPACE_SUSPENDED,
)
from tests.contract.store import (
    ADMITTED,
    BALANCE,
    CAP,
    CONCURRENCY,
    DAILY,
    DAY,
    KEY_ENDED,
    MAX,
    MINUTE,
    MODEL,
    REQUESTS,
    SUSPENDED,
    TOKENS,
    TOO_LARGE,
    Ask,
    Row,
    Store,
    lease_call,
)

WS = "ws_1"
NOON = 20_000 * DAY + DAY // 2  # some day's noon, UTC, in µs


def test_an_unknown_workspace_is_said_to_be_unknown(store: Store) -> None:
    assert store.lease(WS, Ask(1)).code == 1
    store.put_workspace(WS)
    assert store.lease(WS, Ask(1)).code == 1  # the key is still unknown
    store.put_key(WS, "key_1", KeyRules(1, LIVE))
    assert store.lease(WS, Ask(0)).code == 0


def test_a_key_without_its_workspace_is_unknown(store: Store) -> None:
    store.put_key(WS, "key_1", KeyRules(1, LIVE))
    before = store.everything()
    assert store.lease(WS, Ask(1)).code == 1
    assert store.everything() == before


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_of_the_key_is_stale(store: Store, version: int) -> None:
    store.fund(WS, 100, version=2)
    before = store.everything()
    assert store.lease(WS, Ask(1), version=version).code == 2
    assert store.everything() == before
    assert store.lease(WS, Ask(1), version=2).outcomes == [ADMITTED]


def test_an_admission_takes_what_was_asked(store: Store) -> None:
    store.fund(WS, 1000, requests_per_minute=60, tokens_per_minute=600, tokens_per_day=6000)
    before = store.now()
    leased = store.lease(WS, Ask(300, 50))
    assert before <= leased.now <= store.now()
    assert (leased.balance, leased.held, leased.rpm, leased.tpm) == (1000, 300, 60, 600)
    [verdict] = leased.verdicts
    assert verdict == (ADMITTED, 0, 0, leased.now + 1_000_000, leased.now + 5_000_000)
    found = store.snapshot(WS)
    assert found.wallet == Wallet(1000, 300, 1, 1)
    assert found.leases == {"boot_1:key_1": LeaseRecord(300, 50, 1)}
    assert found.counters["key_1"] == KeyCounters(
        requests_tat=leased.now + 1_000_000,
        busy_since=leased.now,
        tokens_tat=0,
        day=leased.now // DAY,
        day_tokens=0,
        open=1,
        held_ucr=300,
        held_tokens=50,
        spent_ucr=0,
    )
    assert store.leased_by(WS) == {b"ws_1|key_1"}


def test_boots_and_keys_lease_apart_from_one_wallet(store: Store) -> None:
    store.fund(WS, 1000)
    store.put_key(WS, "key_2", KeyRules(1, LIVE))
    store.lease(WS, Ask(1, 10))
    store.lease(WS, Ask(2, 20), boot="boot_2")
    assert store.lease(WS, Ask(4, 40), key="key_2").held == 7
    found = store.snapshot(WS)
    assert found.leases == {
        "boot_1:key_1": LeaseRecord(1, 10, 1),
        "boot_2:key_1": LeaseRecord(2, 20, 1),
        "boot_1:key_2": LeaseRecord(4, 40, 1),
    }
    assert (found.counters["key_1"].open, found.counters["key_1"].held_ucr) == (2, 3)
    assert (found.counters["key_2"].open, found.counters["key_2"].held_ucr) == (1, 4)
    assert store.leased_by(WS) == {b"ws_1|key_1", b"ws_1|key_2"}
    assert store.leased_by(WS, "boot_2") == {b"ws_1|key_1"}


def in_every_trouble(store: Store) -> list[tuple[int, tuple[int, int] | None, Any]]:
    """A key refused for every reason at once, and the cures in order of precedence.

    Each step: the verdict, its details where they do not depend on the clock, and the cure.
    """
    rules = KeyRules(
        version=1,
        state=REVOKED,
        requests_per_minute=60,
        tokens_per_minute=5,
        tokens_per_day=5,
        concurrency=1,
        cost_cap_ucr=99,
    )
    store.put_workspace(WS, WORKSPACE_SUSPENDED)
    store.put_key(WS, "key_1", rules)
    now = store.now()
    later = now + 10 * MINUTE
    counters = KeyCounters(
        requests_tat=later,
        busy_since=now - MINUTE,
        tokens_tat=later,
        day=now // DAY,
        day_tokens=96,
        open=1,
        held_ucr=40,
        held_tokens=0,
        spent_ucr=50,
    )
    store.write_counters(WS, counters)

    def rule(**changes: Any) -> Any:
        def cure() -> None:
            nonlocal rules
            rules = msgspec.structs.replace(rules, **changes)
            store.put_key(WS, "key_1", rules)

        return cure

    def count(**changes: Any) -> Any:
        def cure() -> None:
            nonlocal counters
            counters = msgspec.structs.replace(counters, **changes)
            store.write_counters(WS, counters)

        return cure

    return [
        (KEY_ENDED, (0, 0), rule(state=LIVE, expires_at_us=now - 1)),
        (KEY_ENDED, (0, 0), rule(expires_at_us=0)),
        (SUSPENDED, (0, 0), lambda: store.put_workspace(WS)),
        (MODEL, (0, 0), None),
        (REQUESTS, None, count(requests_tat=0)),
        (TOO_LARGE, (5, 10), rule(tokens_per_minute=100)),
        (TOKENS, None, count(tokens_tat=0)),
        (TOO_LARGE, (5, 10), rule(tokens_per_day=100)),
        (DAILY, None, rule(tokens_per_day=1000)),
        (CONCURRENCY, (0, 0), rule(concurrency=2)),
        (CAP, (99, 90), rule(cost_cap_ucr=100)),
        (BALANCE, (0, 0), lambda: store.credit(WS, 1, 10)),
    ]


def test_refusals_come_by_precedence_and_leave_no_trace(store: Store) -> None:
    allowed = 0
    for verdict, details, cure in in_every_trouble(store):
        before = store.everything()
        leased = store.lease(WS, Ask(10, 10, allowed))
        assert leased.outcomes == [verdict]
        if details is not None:
            assert leased.verdicts[0][1:3] == details
        assert store.everything() == before
        if cure is None:
            allowed = 1
        else:
            cure()
    assert store.lease(WS, Ask(10, 10, allowed)).outcomes == [ADMITTED]


def test_many_refused_asks_leave_no_trace(store: Store) -> None:
    in_every_trouble(store)
    before = store.everything()
    assert store.lease(WS, *[Ask(n, n, n % 2) for n in range(50)]).outcomes == [KEY_ENDED] * 50
    assert store.everything() == before


def test_asks_of_one_call_are_judged_in_order(store: Store) -> None:
    store.fund(WS, 100)
    leased = store.lease(WS, Ask(60), Ask(50), Ask(40), Ask(1), Ask(0))
    assert leased.outcomes == [ADMITTED, BALANCE, ADMITTED, BALANCE, ADMITTED]
    assert leased.verdicts[1][1:3] == (100, 60)
    assert leased.verdicts[3][1:3] == (100, 100)
    assert leased.held == store.wallet(WS).held == 100
    assert store.counters(WS).open == 3


def test_one_call_judges_like_many(store: Store) -> None:
    asks = [Ask(n * 7 % 31, n * 5 % 17, int(n % 5 > 0)) for n in range(40)]
    limits = {"tokens_per_day": 150, "concurrency": 22, "cost_cap_ucr": 290}
    store.fund("ws_1", 300, **limits)
    store.fund("ws_2", 300, **limits)
    together = store.lease("ws_1", *asks).outcomes
    one_by_one, mine = [], (0, 0, 0)
    for ask in asks:
        outcome = store.lease("ws_2", ask, mine=mine).outcomes[0]
        if outcome == ADMITTED:
            mine = (mine[0] + ask.credits, mine[1] + ask.tokens, mine[2] + 1)
        one_by_one.append(outcome)
    assert together == one_by_one
    assert {ADMITTED, MODEL, DAILY, CAP} <= set(together)
    assert store.wallet("ws_1") == store.wallet("ws_2")


def test_no_asks_take_nothing(store: Store) -> None:
    store.fund(WS, 100)
    before = store.everything()
    assert store.lease(WS).verdicts == []
    assert store.everything() == before


# Each limit, to the last unit


@pytest.mark.parametrize("k", [0, 1, 7, 100])
def test_a_wallet_for_k_serves_k(store: Store, k: int) -> None:
    store.fund(WS, 33 * k + 32)
    outcomes = store.lease(WS, *[Ask(33)] * (k + 20)).outcomes
    assert outcomes == [ADMITTED] * k + [BALANCE] * 20


def test_a_request_that_costs_nothing_needs_no_balance(store: Store) -> None:
    store.fund(WS, 0)
    assert store.lease(WS, Ask(0), Ask(1)).outcomes == [ADMITTED, BALANCE]


def test_a_cost_cap_for_k_serves_k_and_reaching_it_is_allowed(store: Store) -> None:
    store.fund(WS, 10_000, cost_cap_ucr=500)
    leased = store.lease(WS, *[Ask(100)] * 6)
    assert leased.outcomes == [ADMITTED] * 5 + [CAP]
    assert leased.verdicts[5][1:3] == (500, 500)
    store.settle(1, Row(WS, credits=500, charge=450, slots=5))
    leased = store.lease(WS, Ask(51), Ask(50))
    assert leased.outcomes == [CAP, ADMITTED]
    assert leased.verdicts[0][1:3] == (500, 450)


def test_a_cap_of_nothing_admits_what_is_free_only(store: Store) -> None:
    store.fund(WS, 10_000, cost_cap_ucr=0)
    assert store.lease(WS, Ask(1), Ask(0)).outcomes == [CAP, ADMITTED]


def test_the_cap_is_the_key_s_own(store: Store) -> None:
    store.fund(WS, 1000, cost_cap_ucr=10)
    store.put_key(WS, "key_2", KeyRules(1, LIVE, cost_cap_ucr=10))
    assert store.lease(WS, Ask(10), Ask(1)).outcomes == [ADMITTED, CAP]
    assert store.lease(WS, Ask(10), Ask(1), key="key_2").outcomes == [ADMITTED, CAP]


def test_concurrency_counts_what_is_open_on_every_worker(store: Store) -> None:
    store.fund(WS, 1000, concurrency=3)
    assert store.lease(WS, Ask(), Ask(), boot="boot_1").outcomes == [ADMITTED] * 2
    assert store.lease(WS, Ask(), Ask(), boot="boot_2").outcomes == [ADMITTED, CONCURRENCY]
    store.settle(1, Row(WS), boot="boot_1")
    assert store.lease(WS, Ask(), Ask(), boot="boot_3").outcomes == [ADMITTED, CONCURRENCY]


@pytest.mark.parametrize("rpm", [1, 2, 3, 7, 59, 60, 61, 1000, 7001])
def test_a_full_bucket_holds_exactly_the_minute_s_requests(clocked: Store, rpm: int) -> None:
    clocked.fund(WS, 1, requests_per_minute=rpm)
    clocked.set_clock(NOON)
    assert clocked.lease(WS, *[Ask()] * (rpm + 2)).outcomes == [ADMITTED] * rpm + [REQUESTS] * 2


@pytest.mark.parametrize("tpm", [1, 7, 60, 999, 1_000_003, 100_000_000])
def test_a_full_bucket_holds_exactly_the_minute_s_tokens(clocked: Store, tpm: int) -> None:
    clocked.fund(WS, 1, tokens_per_minute=tpm)
    clocked.set_clock(NOON)
    assert clocked.lease(WS, Ask(0, tpm)).outcomes == [ADMITTED]
    assert clocked.lease(WS, Ask(0, 1), mine=(0, tpm, 1)).outcomes == [TOKENS]
    clocked.release(WS)
    assert clocked.lease(WS, Ask(0, tpm + 1), Ask(0, tpm)).outcomes == [TOO_LARGE, ADMITTED]


@pytest.mark.parametrize("rpm", [1, 7, 60, 61, 1000])
def test_the_wait_of_a_refused_request_is_exact(clocked: Store, rpm: int) -> None:
    clocked.fund(WS, 1, requests_per_minute=rpm)
    clocked.set_clock(NOON)
    clocked.lease(WS, *[Ask()] * rpm)
    for passed in (0, 1, 12_345):
        now = NOON + passed
        clocked.set_clock(now)
        [refused] = clocked.lease(WS, Ask(), mine=(0, 0, rpm)).verdicts
        assert refused.verdict == REQUESTS
        clocked.set_clock(now + refused.detail_1 - 1)
        assert clocked.lease(WS, Ask(), mine=(0, 0, rpm)).outcomes == [REQUESTS]
    clocked.set_clock(now + refused.detail_1)
    assert clocked.lease(WS, Ask(), Ask(), mine=(0, 0, rpm)).outcomes == [ADMITTED, REQUESTS]


@pytest.mark.parametrize("tpm", [7, 60, 999, 1_000_003])
def test_the_wait_of_refused_tokens_is_exact(clocked: Store, tpm: int) -> None:
    clocked.fund(WS, 1, tokens_per_minute=tpm)
    clocked.set_clock(NOON)
    clocked.lease(WS, Ask(0, tpm))
    clocked.settle(1, Row(WS, tokens=tpm, used=tpm))
    [refused] = clocked.lease(WS, Ask(0, 3)).verdicts
    assert refused.verdict == TOKENS
    clocked.set_clock(NOON + refused.detail_1 - 1)
    assert clocked.lease(WS, Ask(0, 3)).outcomes == [TOKENS]
    clocked.set_clock(NOON + refused.detail_1)
    assert clocked.lease(WS, Ask(0, 3)).outcomes == [ADMITTED]


def test_tokens_in_flight_do_not_drain_away(clocked: Store) -> None:
    """What is held counts in full until it is settled, however long that takes."""
    clocked.fund(WS, 1, tokens_per_minute=100)
    clocked.set_clock(NOON)
    clocked.lease(WS, Ask(0, 60))
    clocked.set_clock(NOON + 3 * MINUTE)
    [refused] = clocked.lease(WS, Ask(0, 60), mine=(0, 60, 1)).verdicts
    assert refused.verdict == TOKENS
    assert 0 < refused.detail_1 <= MINUTE


def test_daily_tokens_are_exact_and_end_at_midnight(clocked: Store) -> None:
    clocked.fund(WS, 1, tokens_per_day=100)
    clocked.set_clock(NOON)
    assert clocked.lease(WS, Ask(0, 101), Ask(0, 60), Ask(0, 41), Ask(0, 40)).outcomes == [
        TOO_LARGE, ADMITTED, DAILY, ADMITTED,
    ]  # fmt: skip
    clocked.settle(1, Row(WS, tokens=100, used=70, slots=2))
    [refused] = clocked.lease(WS, Ask(0, 31)).verdicts
    assert refused[:2] == (DAILY, DAY // 2)
    midnight = NOON + DAY // 2
    clocked.set_clock(midnight - 1)
    assert clocked.lease(WS, Ask(0, 31)).verdicts[0][:2] == (DAILY, 1)
    clocked.set_clock(midnight)
    assert clocked.lease(WS, Ask(0, 100)).outcomes == [ADMITTED]


def test_tokens_held_over_midnight_count_for_the_new_day(clocked: Store) -> None:
    clocked.fund(WS, 1, tokens_per_day=100)
    clocked.set_clock(NOON + DAY // 2 - 1)
    clocked.lease(WS, Ask(0, 60))
    clocked.set_clock(NOON + DAY // 2)
    assert clocked.lease(WS, Ask(0, 41), mine=(0, 60, 1)).outcomes == [DAILY]
    clocked.settle(1, Row(WS, tokens=60, used=50))
    assert clocked.counters(WS).day_tokens == 50
    assert clocked.lease(WS, Ask(0, 50)).outcomes == [ADMITTED]


def test_a_key_ends_at_its_instant(clocked: Store) -> None:
    clocked.fund(WS, 1, expires_at_us=NOON)
    clocked.set_clock(NOON - 1)
    assert clocked.lease(WS, Ask()).outcomes == [ADMITTED]
    clocked.set_clock(NOON)
    assert clocked.lease(WS, Ask(), mine=(0, 0, 1)).outcomes == [KEY_ENDED]


def test_limits_are_judged_with_counters_of_the_past(store: Store) -> None:
    """The same on Redis's own clock, with arrival times written relative to it."""
    store.fund(WS, 1, requests_per_minute=60, tokens_per_minute=60)
    now = store.now()
    level = 59 * 1_000_000 + 500_000
    store.write_counters(WS, KeyCounters(now + level, now - MINUTE, now + level, now // DAY))
    leased = store.lease(WS, Ask(0, 0))
    [verdict] = leased.verdicts
    wait = now + level + 1_000_000 - MINUTE - leased.now
    assert verdict[:2] == ((REQUESTS, wait) if wait > 0 else (ADMITTED, 0))
    store.write_counters(WS, KeyCounters(now - 1, now - MINUTE, now - 1, now // DAY))
    leased = store.lease(WS, *[Ask(0, 1)] * 61)
    assert leased.outcomes == [ADMITTED] * 60 + [REQUESTS]
    assert store.counters(WS).busy_since == leased.now


# Replies that were lost


def test_a_lease_whose_reply_was_lost_is_brought_back(store: Store) -> None:
    store.fund(WS, 100, concurrency=2)
    store.lease(WS, Ask(30, 3))
    store.lease(WS, Ask(60, 6), mine=(30, 3, 1))  # this reply never arrives
    leased = store.lease(WS, Ask(70, 7), mine=(30, 3, 1))
    assert leased.outcomes == [ADMITTED]
    assert leased.held == store.wallet(WS).held == 100
    assert store.snapshot(WS).leases["boot_1:key_1"] == LeaseRecord(100, 10, 2)
    assert store.counters(WS).open == 2


def test_a_correction_stays_though_every_ask_is_refused(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    leased = store.lease(WS, Ask(200))
    assert leased.outcomes == [BALANCE]
    assert leased.verdicts[0][1:3] == (100, 0)
    assert store.wallet(WS).held == 0
    assert store.snapshot(WS).leases["boot_1:key_1"] == LeaseRecord(0, 0, 0)
    assert (store.counters(WS).open, store.counters(WS).held_tokens) == (0, 0)


def test_a_correction_does_not_touch_other_workers(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(10, 1), boot="boot_2")
    store.lease(WS, Ask(20, 2), boot="boot_1")
    store.lease(WS, boot="boot_1")
    assert store.wallet(WS).held == 10
    assert store.snapshot(WS).leases["boot_2:key_1"] == LeaseRecord(10, 1, 1)


def test_a_worker_that_lost_its_lease_puts_it_back(store: Store) -> None:
    """After a release that came too early, what is in flight is held again."""
    store.fund(WS, 100)
    store.lease(WS, Ask(40, 4))
    store.release(WS)
    leased = store.lease(WS, Ask(60, 6), Ask(1), mine=(40, 4, 1))
    assert leased.outcomes == [ADMITTED, BALANCE]
    assert store.wallet(WS).held == 100
    assert store.leased_by(WS) == {b"ws_1|key_1"}


def test_a_true_claim_writes_nothing(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    before = store.everything()
    store.lease(WS, Ask(41), mine=(60, 6, 1))
    assert store.everything() == before


# Large figures


def test_figures_next_to_the_largest_stay_exact(store: Store) -> None:
    store.fund(WS, MAX, cost_cap_ucr=MAX)
    leased = store.lease(WS, Ask(MAX - 1), Ask(2), Ask(1), Ask(1))
    assert leased.outcomes == [ADMITTED, CAP, ADMITTED, CAP]
    assert leased.held == store.wallet(WS).held == MAX
    store.put_key(WS, "key_2", KeyRules(1, LIVE))
    assert store.lease(WS, Ask(1), key="key_2").verdicts[0][:3] == (BALANCE, MAX, MAX)
    store.settle(1, Row(WS, credits=MAX, charge=MAX - 1, slots=2))
    assert store.wallet(WS) == Wallet(1, 0, 1, 1)
    assert store.counters(WS).spent_ucr == MAX - 1
    assert store.lease(WS, Ask(2), Ask(1), key="key_2").outcomes == [BALANCE, ADMITTED]


def test_odd_figures_beyond_a_float_s_precision_are_kept(store: Store) -> None:
    amount = 8_999_999_999_999_999
    store.fund(WS, amount)
    assert store.lease(WS, Ask(4_503_599_627_370_497)).balance == amount
    assert store.wallet(WS) == Wallet(amount, 4_503_599_627_370_497, 1, 1)


# Arguments nobody should send


BAD_NUMBERS = [-1, -MAX, MAX + 1, 2**53, 2**62]
GOOD = [1, *[0] * 7, *[0] * 3, 1, 1, 1]


def refused(store: Store, packed: bytes) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(10, 1))
    before = store.everything()
    keys, arguments = lease_call(WS, [])
    with pytest.raises(ResponseError):
        store.run("lease", keys, [*arguments[:3], packed])
    assert store.everything() == before


@pytest.mark.parametrize("number", BAD_NUMBERS)
@pytest.mark.parametrize("place", range(len(GOOD)))
def test_a_bad_figure_is_refused_before_anything_is_written(
    store: Store, place: int, number: int
) -> None:
    refused(store, pack_figures(*GOOD[:place], number, *GOOD[place + 1 :], 1, 1, 1))


@pytest.mark.parametrize("figures", [0, 1, 10, 12, 13, 15, 16])
def test_figures_that_are_missing_or_too_many_are_refused(store: Store, figures: int) -> None:
    refused(store, pack_figures(*[1] * figures))


def test_a_bad_ask_is_refused_though_the_version_is_stale(store: Store) -> None:
    refused(store, pack_figures(7, *[0] * 10, 1, 1, 1, 1, MAX + 1, 1))


@pytest.mark.parametrize("blob", [b"", b"\x01", b"\x01" * 87, b"\x01" * 89])
def test_bytes_that_are_no_figures_are_refused(store: Store, blob: bytes) -> None:
    refused(store, blob)


@pytest.mark.parametrize("given", range(4))
def test_missing_arguments_are_refused(store: Store, given: int) -> None:
    store.fund(WS, 100)
    before = store.everything()
    keys, arguments = lease_call(WS, [Ask(1)])
    with pytest.raises(ResponseError):
        store.run("lease", keys, arguments[:given])
    assert store.everything() == before


@pytest.mark.parametrize("given", [0, 1])
def test_missing_keys_are_refused(store: Store, given: int) -> None:
    store.fund(WS, 100)
    before = store.everything()
    keys, arguments = lease_call(WS, [Ask(1)])
    with pytest.raises(ResponseError):
        store.run("lease", keys[:given], arguments)
    assert store.everything() == before


def test_keys_of_another_type_are_refused(store: Store) -> None:
    store.client.set(workspace_key(WS), "not a hash")
    with pytest.raises(ResponseError):
        store.lease(WS, Ask(1))
    store.client.delete(workspace_key(WS))
    store.fund(WS, 100)
    store.client.set(leases_key(shard_of(WS), "boot_1"), "not a set")
    before = store.everything()
    with pytest.raises(ResponseError):
        store.lease(WS, Ask(1))
    assert store.everything() == before


def test_at_maxmemory_no_lease_is_granted_and_nothing_written(store: Store) -> None:
    store.fund(WS, 100)
    before = store.everything()
    store.client.config_set("maxmemory", 1)
    with pytest.raises(ResponseError, match=r"OOM|maxmemory"):
        store.lease(WS, Ask(1))
    assert store.lease(WS, Ask(1000)).outcomes == [BALANCE]  # a refusal needs no memory
    store.client.config_set("maxmemory", 0)
    assert store.everything() == before
    assert store.lease(WS, Ask(1)).outcomes == [ADMITTED]
