"""settle.lua on a real Redis: once per batch, charge and event in one step, checked first."""

from itertools import pairwise
from typing import Any

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
    boots_key,
    shard_of,
)
from tests.contract.store import (
    ADMITTED,
    BALANCE,
    DAY,
    MAX,
    MINUTE,
    REQUESTS,
    TOKENS,
    Ask,
    Row,
    Store,
    same_shard,
)

WS = "ws_1"
NOON = 20_000 * DAY + DAY // 2


def boots(store: Store, workspace: str = WS) -> dict[bytes, bytes]:
    return dict(store.client.hgetall(boots_key(shard_of(workspace))))


def test_a_hold_becomes_a_charge_and_an_event(store: Store) -> None:
    store.fund(WS, 1000, tokens_per_minute=600, tokens_per_day=1000)
    leased = store.lease(WS, Ask(300, 50))
    before = store.now()
    stream_id = store.settle(
        1, Row(WS, credits=300, charge=120, tokens=50, used=20), events=b"\x91\xa5event"
    )
    after = store.now()
    found = store.snapshot(WS)
    assert found.wallet == Wallet(880, 0, 1, 1)
    assert found.leases == {"boot_1:key_1": LeaseRecord(0, 0, 0)}
    counters = found.counters["key_1"]
    assert before + 2_000_000 <= counters.tokens_tat <= after + 2_000_000
    assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)
    assert (counters.spent_ucr, counters.day_tokens) == (120, 20)
    assert counters.day == leased.now // DAY
    assert store.stream(WS) == [(stream_id, {b"b": b"boot_1", b"n": b"1", b"e": b"\x91\xa5event"})]
    assert found.stream_id == stream_id
    assert boots(store) == {b"boot_1": b"1"}


def test_part_of_a_lease_settles_part_of_it(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100, 10), Ask(200, 20))
    store.settle(1, Row(WS, credits=100, charge=100, tokens=10, used=3))
    assert store.wallet(WS) == Wallet(900, 200, 1, 1)
    assert store.snapshot(WS).leases == {"boot_1:key_1": LeaseRecord(200, 20, 1)}
    assert (store.counters(WS).open, store.counters(WS).held_tokens) == (1, 20)


def test_a_batch_settles_once_per_boot_and_number(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100), Ask(100))
    row = Row(WS, credits=100, charge=70)
    assert store.settle(5, row) != b""
    before = store.everything()
    for number in (5, 4, 1):
        assert store.settle(number, row) == b""
    assert store.everything() == before
    assert store.settle(7, row) != b""  # numbers may skip, they only rise
    assert store.wallet(WS) == Wallet(860, 0, 1, 1)
    assert len(store.stream(WS)) == 2


def test_another_boot_has_numbers_of_its_own(store: Store) -> None:
    store.fund(WS, 1000)
    for boot in ("boot_1", "boot_2"):
        store.lease(WS, Ask(100), boot=boot)
        assert store.settle(1, Row(WS, credits=100, charge=70), boot=boot) != b""
    assert store.wallet(WS) == Wallet(860, 0, 1, 1)
    assert boots(store) == {b"boot_1": b"1", b"boot_2": b"1"}


def test_shards_have_numbers_of_their_own(store: Store) -> None:
    for name in ("ws_1", "ws_2"):
        store.fund(name, 100)
        store.lease(name, Ask(10))
        assert store.settle(1, Row(name, credits=10, charge=10)) != b""


def test_one_batch_settles_several_workspaces_and_keys(store: Store) -> None:
    one, two, three = same_shard(3)
    for name in (one, two, three):
        store.fund(name, 1000)
        store.put_key(name, "key_2", KeyRules(1, LIVE))
        store.lease(name, Ask(100), Ask(100))
        store.lease(name, Ask(50), key="key_2")
    store.settle(
        1,
        Row(three, credits=200, charge=30, slots=2),
        Row(one, credits=100, charge=1),
        Row(one, "key_2", credits=50, charge=50),
    )
    assert store.wallet(one) == Wallet(949, 100, 1, 1)
    assert store.wallet(two) == Wallet(1000, 250, 1, 1)
    assert store.wallet(three) == Wallet(970, 50, 1, 1)
    assert store.counters(one, "key_2").spent_ucr == 50
    assert len(store.stream(one)) == 1


def test_two_rows_of_one_key_add_up(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100, 1), Ask(100, 2))
    row = Row(WS, credits=100, charge=40, tokens=1, used=1)
    store.settle(1, row, row)
    assert store.wallet(WS) == Wallet(920, 0, 1, 1)
    assert store.counters(WS).spent_ucr == 80


def test_stream_ids_rise(store: Store) -> None:
    store.fund(WS, 1000)
    ids = [store.settle(n, Row(WS, slots=0)) for n in range(1, 30)]
    keys = [tuple(map(int, one.split(b"-"))) for one in ids]
    assert all(one < two for one, two in pairwise(keys))


def test_a_charge_of_nothing_still_writes_its_event(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100, 10))
    store.settle(1, Row(WS, credits=100, tokens=10))
    assert store.wallet(WS) == Wallet(1000, 0, 1, 1)
    assert len(store.stream(WS)) == 1


def test_an_event_of_an_unknown_workspace_is_kept(store: Store) -> None:
    """The wallet is rebuilt from ledger and stream; what was used must be there."""
    assert store.settle(1, Row("ws_gone", credits=5, charge=5)) != b""
    assert len(store.stream("ws_gone")) == 1
    assert store.snapshot("ws_gone").wallet is None


def test_a_late_settle_charges_what_was_released_already(store: Store) -> None:
    """After a release came too early, the charge still leaves the balance and is counted."""
    store.fund(WS, 1000, cost_cap_ucr=100, tokens_per_day=100)
    store.lease(WS, Ask(80, 10))
    store.release(WS)
    store.settle(1, Row(WS, credits=80, charge=70, tokens=10, used=9))
    assert store.wallet(WS) == Wallet(930, 0, 1, 1)
    counters = store.counters(WS)
    assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)
    assert (counters.spent_ucr, counters.day_tokens) == (70, 9)
    assert store.snapshot(WS).leases == {}


def test_more_is_never_given_back_than_is_leased(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(10, 1))
    store.lease(WS, Ask(500, 50), boot="boot_2")
    store.settle(1, Row(WS, credits=400, charge=5, tokens=40, used=1, slots=3))
    assert store.wallet(WS) == Wallet(995, 500, 1, 1)
    counters = store.counters(WS)
    assert (counters.open, counters.held_ucr, counters.held_tokens) == (1, 500, 50)


def test_a_key_without_rules_settles_all_the_same(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100, 1))
    store.client.hdel("{s17}:ws:ws_1", "k:key_1")
    store.settle(1, Row(WS, credits=100, charge=60, tokens=1, used=1))
    assert store.wallet(WS) == Wallet(940, 0, 1, 1)


def test_a_revoked_key_still_pays_for_what_it_began(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100))
    store.put_key(WS, "key_1", KeyRules(2, REVOKED))
    store.settle(1, Row(WS, credits=100, charge=60))
    assert store.wallet(WS) == Wallet(940, 0, 1, 1)


def test_what_is_settled_can_be_leased_again(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(100))
    assert store.lease(WS, Ask(1), mine=(100, 0, 1)).outcomes == [BALANCE]
    store.settle(1, Row(WS, credits=100, charge=40))
    assert store.lease(WS, Ask(61), Ask(60)).outcomes == [BALANCE, ADMITTED]


# The minute's tokens and the day's


def test_tokens_used_drain_from_their_settle_on(clocked: Store) -> None:
    clocked.fund(WS, 1, tokens_per_minute=60)
    clocked.set_clock(NOON)
    clocked.lease(WS, Ask(0, 60))
    clocked.set_clock(NOON + MINUTE)
    clocked.settle(1, Row(WS, tokens=60, used=30))
    assert clocked.counters(WS).tokens_tat == NOON + MINUTE + MINUTE // 2
    assert clocked.lease(WS, Ask(0, 31), Ask(0, 30)).outcomes == [TOKENS, ADMITTED]


def test_tokens_of_the_day_begin_anew(clocked: Store) -> None:
    clocked.fund(WS, 1, tokens_per_day=100)
    clocked.set_clock(NOON)
    clocked.lease(WS, Ask(0, 50), Ask(0, 50))
    clocked.settle(1, Row(WS, tokens=50, used=50))
    clocked.set_clock(NOON + DAY)
    clocked.settle(2, Row(WS, tokens=50, used=20))
    counters = clocked.counters(WS)
    assert (counters.day, counters.day_tokens) == (NOON // DAY + 1, 20)


def test_a_tightened_limit_blocks_for_a_minute_at_most(clocked: Store) -> None:
    """A bucket is never more than full, though the tokens began under a wider limit."""
    clocked.fund(WS, 1, tokens_per_minute=1_000_000)
    clocked.set_clock(NOON)
    clocked.lease(WS, Ask(0, 1_000_000))
    clocked.put_key(WS, "key_1", KeyRules(2, LIVE, tokens_per_minute=1))
    clocked.settle(1, Row(WS, tokens=1_000_000, used=1_000_000))
    [refused] = clocked.lease(WS, Ask(0, 1), version=2).verdicts
    assert refused[:2] == (TOKENS, MINUTE)
    clocked.set_clock(NOON + MINUTE)
    assert clocked.lease(WS, Ask(0, 1), version=2).outcomes == [ADMITTED]


# Voids


def fill(store: Store, count: int, rpm: int = 60, now: int = NOON) -> None:
    store.fund(WS, 1, requests_per_minute=rpm)
    store.set_clock(now)
    assert store.lease(WS, *[Ask()] * count).outcomes == [ADMITTED] * count


def test_a_void_gives_its_request_back(clocked: Store) -> None:
    fill(clocked, 60)
    assert clocked.lease(WS, Ask(), mine=(0, 0, 60)).outcomes == [REQUESTS]
    clocked.settle(1, Row(WS, slots=2, voids=(NOON, NOON)))
    assert clocked.counters(WS).requests_tat == NOON + 58 * 1_000_000
    assert clocked.lease(WS, *[Ask()] * 3, mine=(0, 0, 58)).outcomes == [0, 0, REQUESTS]


def test_a_completed_request_is_not_given_back(clocked: Store) -> None:
    fill(clocked, 60)
    clocked.settle(1, Row(WS, slots=60))
    assert clocked.lease(WS, Ask()).outcomes == [REQUESTS]


@pytest.mark.parametrize("passed", [1_000_000, 1_000_001, 2_000_000])
def test_a_void_of_before_the_bucket_was_full_gives_nothing_back(
    clocked: Store, passed: int
) -> None:
    fill(clocked, 1)
    clocked.set_clock(NOON + passed)  # the bucket is full again, at its first moment even
    assert clocked.lease(WS, *[Ask()] * 60, mine=(0, 0, 1)).outcomes == [ADMITTED] * 60
    assert clocked.counters(WS).busy_since == NOON + passed
    clocked.settle(1, Row(WS, voids=(NOON,)))
    assert clocked.lease(WS, Ask(), mine=(0, 0, 60)).outcomes == [REQUESTS]


def test_a_void_while_the_bucket_is_full_gives_nothing_back(clocked: Store) -> None:
    fill(clocked, 1)
    clocked.set_clock(NOON + 1_000_000)
    clocked.settle(1, Row(WS, voids=(NOON,)))
    assert clocked.counters(WS).requests_tat == NOON + 1_000_000


def test_a_void_of_a_request_that_drained_away_long_ago_gives_nothing_back(
    clocked: Store,
) -> None:
    """A bucket kept busy for long: requests older than a minute have drained, void or not."""
    fill(clocked, 60)
    open_slots = 60
    for second in range(1, 301):
        clocked.set_clock(NOON + second * 1_000_000)
        assert clocked.lease(WS, Ask(), mine=(0, 0, open_slots)).outcomes == [ADMITTED]
        open_slots += 1
    clocked.settle(1, Row(WS, slots=300, voids=(NOON,) * 60 + tuple(
        NOON + second * 1_000_000 for second in range(1, 241)
    )))  # fmt: skip
    assert clocked.lease(WS, Ask(), mine=(0, 0, open_slots - 300)).outcomes == [REQUESTS]


def test_no_request_is_given_back_where_there_is_no_limit(store: Store) -> None:
    store.fund(WS, 1)
    store.lease(WS, Ask())
    store.settle(1, Row(WS, voids=(store.now(),)))
    assert store.counters(WS).requests_tat == 0


def test_voids_follow_redis_s_own_clock_too(store: Store) -> None:
    store.fund(WS, 1, requests_per_minute=60)
    store.lease(WS, Ask())
    now = store.now()
    store.write_counters(WS, KeyCounters(now + MINUTE, now - 5_000_000, 0, now // DAY, open=1))
    store.settle(1, Row(WS, voids=(now - 5_000_000, now - 5_000_001, now)))
    assert store.counters(WS).requests_tat == now + MINUTE - 2_000_000


# Large figures, memory, and arguments nobody should send


def test_figures_next_to_the_largest_stay_exact(store: Store) -> None:
    store.fund(WS, MAX)
    store.lease(WS, Ask(MAX))
    store.settle(1, Row(WS, credits=MAX - 1, charge=MAX - 2))
    assert store.wallet(WS) == Wallet(2, 1, 1, 1)
    assert store.counters(WS).spent_ucr == MAX - 2
    assert store.snapshot(WS).leases["boot_1:key_1"].credits_ucr == 1


def test_absurd_token_counts_stay_whole_numbers(store: Store) -> None:
    store.fund(WS, 1, tokens_per_minute=1)
    store.lease(WS, Ask(0, 1))
    store.settle(1, Row(WS, tokens=1, used=MAX))
    assert store.counters(WS).day_tokens == MAX
    assert store.lease(WS, Ask(0, 1)).outcomes == [TOKENS]


def test_at_maxmemory_settles_go_through_while_leases_are_refused(store: Store) -> None:
    store.fund(WS, 1000)
    store.lease(WS, Ask(100), Ask(100))
    store.client.config_set("maxmemory", 1)
    with pytest.raises(ResponseError, match=r"OOM|maxmemory"):
        store.lease(WS, Ask(1), mine=(200, 0, 2))
    row = Row(WS, credits=100, charge=60)
    assert store.settle(1, row) != b""  # the first of this boot, so its field is new
    assert store.settle(2, row) != b""
    assert store.wallet(WS) == Wallet(880, 0, 1, 1)
    assert len(store.stream(WS)) == 2


GOOD = [1, 10, 5, 1, 1, 1, 1]  # a workspace, five figures, a void
BAD_NUMBERS = [-1, -MAX, MAX + 1, 2**53, 2**62]


def pair(*figures: int) -> list[str | bytes]:
    return ["key_1", pack_figures(*figures)]


def bad_words() -> list[list[str | bytes]]:
    good = pair(*GOOD)
    words: list[list[str | bytes]] = [
        [], ["key_1"], [*good, "key_1"], [*good, "key_1", b""], [*good, *pair(*GOOD[:5])],
        [*good, "key_1", b"x" * 49], [*good, "key_1", b"\x01" * 47],
        [*good, *pair(1, 10, 11, 1, 1, 1)],  # charge above hold
        [*good, *pair(2, *GOOD[1:])], [*good, *pair(0, *GOOD[1:])],  # no such workspace
    ]  # fmt: skip
    for number in BAD_NUMBERS:
        for place in range(len(GOOD)):
            words.append([*good, *pair(*GOOD[:place], number, *GOOD[place + 1 :], 1)])
    return words


def refused(store: Store, workspaces: list[str], arguments: list[Any]) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(50, 5), Ask(10, 1))
    store.settle(1, Row(WS, credits=5, charge=5))
    before = store.everything()
    with pytest.raises(ResponseError):
        store.settle_raw(workspaces, arguments)
    assert store.everything() == before


@pytest.mark.parametrize("words", bad_words(), ids=repr)
def test_bad_rows_are_refused_before_anything_is_written(
    store: Store, words: list[str | bytes]
) -> None:
    refused(store, [WS], ["boot_1", 2, b"\x90", *words])


@pytest.mark.parametrize(
    "number", ["0", "-1", "1.5", "nan", "inf", "", "x", "9000000000000001", "1e400", "0x10", " 2"]
)
def test_a_bad_batch_number_is_refused(store: Store, number: str) -> None:
    refused(store, [WS], ["boot_1", number, b"\x90", *pair(*GOOD)])


def test_a_batch_without_events_is_refused(store: Store) -> None:
    refused(store, [WS], ["boot_1", 2, b"", *pair(*GOOD)])


@pytest.mark.parametrize("given", range(5))
def test_missing_arguments_are_refused(store: Store, given: int) -> None:
    refused(store, [WS], ["boot_1", 2, b"\x90", *pair(*GOOD)][:given])


def test_a_bad_row_behind_good_ones_takes_none_of_them(store: Store) -> None:
    one, two = same_shard(2)
    store.fund(two, 100)
    words = [*pair(*GOOD), *pair(2, *GOOD[1:]), *pair(3, *GOOD[1:])]
    refused(store, [one, two], ["boot_1", 2, b"\x90", *words])


def test_a_key_of_another_type_is_refused(store: Store) -> None:
    store.fund(WS, 100)
    store.client.set(boots_key(shard_of(WS)), "not a hash")
    before = store.everything()
    with pytest.raises(ResponseError):
        store.settle(1, Row(WS, credits=5, charge=5))
    assert store.everything() == before
