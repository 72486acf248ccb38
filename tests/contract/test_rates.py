"""Rate limits over time: what any window can admit, tested to the microsecond.

The scripts' own text runs with the test's clock. The bound is GCRA's: from any instant to any
later one, at most a full bucket plus what has refilled in between; so within any minute at
most twice the limit, and from a full bucket exactly the limit at once.
"""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accounting.contract.money import ceil_div
from tests.contract.store import ADMITTED, DAY, MINUTE, REQUESTS, TOKENS, Ask, Row, Store

WS = "ws_1"
NOON = 20_000 * DAY + DAY // 2

few = settings(
    max_examples=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WAITS = st.lists(
    st.one_of(st.just(0), st.integers(1, 1000), st.integers(0, 2 * MINUTE)), max_size=25
)


@few
@given(rpm=st.sampled_from([1, 2, 3, 7, 13, 60, 61]), waits=WAITS, burst=st.integers(1, 8))
def test_no_window_admits_more_requests_than_a_bucket_and_its_refill(
    clocked: Store, rpm: int, waits: list[int], burst: int
) -> None:
    clocked.client.flushall()
    clocked.fund(WS, 1, requests_per_minute=rpm)
    gap = ceil_div(MINUTE, rpm)
    now, admitted, free_at = NOON, [], NOON
    for wait in waits:
        now += wait
        clocked.set_clock(now)
        for outcome in clocked.lease(WS, *[Ask()] * burst, mine=(0, 0, len(admitted))).outcomes:
            # Admitted exactly when the bucket has room for one more gap.
            level = max(0, free_at - now)
            assert outcome == (ADMITTED if level + gap <= rpm * gap else REQUESTS)
            if outcome == ADMITTED:
                free_at = max(free_at, now) + gap
                admitted.append(now)
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            refilled = (admitted[last] - admitted[first]) // gap
            assert last - first + 1 <= rpm + refilled
    for start in admitted:
        assert sum(start <= at < start + MINUTE for at in admitted) <= 2 * rpm


@few
@given(
    tpm=st.sampled_from([1, 7, 60, 1000, 999_983]),
    waits=WAITS,
    shares=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=25, max_size=25),
)
def test_no_window_uses_more_tokens_than_a_bucket_and_its_refill(
    clocked: Store, tpm: int, waits: list[int], shares: list[tuple[int, int]]
) -> None:
    clocked.client.flushall()
    clocked.fund(WS, 1, tokens_per_minute=tpm)
    now, number, spent = NOON, 0, []
    for wait, (asked_share, used_share) in zip(waits, shares, strict=False):
        now += wait
        clocked.set_clock(now)
        tokens = max(1, tpm * asked_share // 100)
        [verdict] = clocked.lease(WS, Ask(0, tokens)).verdicts
        if verdict.verdict == TOKENS:
            assert 0 < verdict.detail_1 <= MINUTE
            continue
        assert verdict.verdict == ADMITTED
        number += 1
        used = tokens * used_share // 100
        clocked.settle(number, Row(WS, tokens=tokens, used=used))
        spent.append((now, used))
    for first in range(len(spent)):
        for last in range(first, len(spent)):
            used = sum(tokens for _, tokens in spent[first : last + 1])
            passed = spent[last][0] - spent[first][0]
            assert used <= tpm + tpm * passed // MINUTE + 1


def test_a_steady_stream_at_the_limit_is_never_refused(clocked: Store) -> None:
    clocked.fund(WS, 1, requests_per_minute=7)
    gap = ceil_div(MINUTE, 7)
    for number in range(50):
        clocked.set_clock(NOON + number * gap)
        assert clocked.lease(WS, Ask(), mine=(0, 0, number)).outcomes == [ADMITTED]


def test_a_refused_request_does_not_push_the_next_one_back(clocked: Store) -> None:
    clocked.fund(WS, 1, requests_per_minute=2)
    clocked.set_clock(NOON)
    waits = [v.detail_1 for v in clocked.lease(WS, *[Ask()] * 5).verdicts]
    assert waits == [0, 0, MINUTE // 2, MINUTE // 2, MINUTE // 2]


@few
@given(
    waits=st.lists(st.integers(0, 3_000_000), min_size=1, max_size=30),
    voided=st.lists(st.booleans(), min_size=30, max_size=30),
    burst=st.integers(1, 20),
)
def test_voids_never_admit_more_than_if_all_limits_refilled_unused(
    clocked: Store, waits: list[int], voided: list[bool], burst: int
) -> None:
    """What completed since the bucket was last full stays within one bucket and its refill."""
    clocked.client.flushall()
    rpm, gap = 12, MINUTE // 12
    clocked.fund(WS, 1, requests_per_minute=rpm)
    now, number, completed = NOON, 0, []
    for wait, is_void in zip(waits, voided, strict=False):
        now += wait
        clocked.set_clock(now)
        count = clocked.lease(WS, *[Ask()] * burst).outcomes.count(ADMITTED)
        if count:
            number += 1
            voids = (now,) * count if is_void else ()
            clocked.settle(number, Row(WS, slots=count, voids=voids))
            completed += [] if is_void else [now] * count
    for first in range(len(completed)):
        for last in range(first, len(completed)):
            passed = completed[last] - completed[first]
            assert last - first + 1 <= rpm + passed // gap


def test_voids_at_once_are_as_if_they_had_never_been(clocked: Store) -> None:
    clocked.fund(WS, 1, requests_per_minute=5)
    for number in range(1, 40):
        clocked.set_clock(NOON + number)
        assert clocked.lease(WS, *[Ask()] * 5).outcomes == [ADMITTED] * 5
        clocked.settle(number, Row(WS, slots=5, voids=(NOON + number,) * 5))


@pytest.mark.parametrize("rpm", [1, 60, 6000])
def test_limits_reset_when_the_reply_says_so(clocked: Store, rpm: int) -> None:
    """`requests_tat` is the instant at which the bucket is full again."""
    clocked.fund(WS, 1, requests_per_minute=rpm)
    clocked.set_clock(NOON)
    verdicts = clocked.lease(WS, *[Ask()] * rpm).verdicts
    tats = [verdict.requests_tat for verdict in verdicts]
    assert all(two - one == MINUTE // rpm for one, two in pairwise([NOON, *tats]))
    clocked.set_clock(tats[-1])
    assert clocked.lease(WS, *[Ask()] * (rpm + 1)).outcomes == [ADMITTED] * rpm + [REQUESTS]
