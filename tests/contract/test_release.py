"""release.lua on a real Redis: a boot's lease under a key goes back, once."""

import pytest
from redis import ResponseError

from accounting.contract.keyspace import (
    KeyCounters,
    LeaseRecord,
    Wallet,
    leases_key,
    shard_of,
    workspace_key,
)
from tests.contract.store import ADMITTED, BALANCE, Ask, Row, Store

WS = "ws_1"


def test_all_of_a_lease_goes_back(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6), Ask(30, 3))
    assert store.release(WS) == [90, 9, 2]
    found = store.snapshot(WS)
    assert found.wallet == Wallet(100, 0, 1, 1)
    assert found.leases == {}
    counters = found.counters["key_1"]
    assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)
    assert store.leased_by(WS) == set()
    assert store.lease(WS, Ask(100)).outcomes == [ADMITTED]


def test_what_was_settled_does_not_go_back(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6), Ask(30, 3))
    store.settle(1, Row(WS, credits=60, charge=50, tokens=6, used=5))
    assert store.release(WS) == [30, 3, 1]
    assert store.wallet(WS) == Wallet(50, 0, 1, 1)
    counters = store.counters(WS)
    assert (counters.spent_ucr, counters.day_tokens) == (50, 5)


def test_twice_gives_nothing_back_twice(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    store.lease(WS, Ask(20, 2), boot="boot_2")
    store.release(WS)
    before = store.everything()
    assert store.release(WS) == [0, 0, 0]
    assert store.everything() == before
    assert store.wallet(WS) == Wallet(100, 20, 1, 1)


def test_other_boots_and_keys_keep_theirs(store: Store) -> None:
    store.fund(WS, 100)
    store.fund(WS, key="key_2")
    store.lease(WS, Ask(10, 1))
    store.lease(WS, Ask(20, 2), key="key_2")
    store.lease(WS, Ask(30, 3), boot="boot_2")
    assert store.release(WS) == [10, 1, 1]
    found = store.snapshot(WS)
    assert found.wallet == Wallet(100, 50, 1, 1)
    assert found.leases == {
        "boot_1:key_2": LeaseRecord(20, 2, 1),
        "boot_2:key_1": LeaseRecord(30, 3, 1),
    }
    assert found.counters["key_1"].held_ucr == 30
    assert found.counters["key_2"].held_ucr == 20
    assert store.leased_by(WS) == {b"ws_1|key_2"}
    assert store.leased_by(WS, "boot_2") == {b"ws_1|key_1"}


def test_requests_of_the_minute_are_not_given_back(store: Store) -> None:
    store.fund(WS, 100, requests_per_minute=60)
    [verdict] = store.lease(WS, Ask(60)).verdicts
    store.release(WS)
    assert store.counters(WS).requests_tat == verdict.requests_tat


def test_the_unknown_gives_nothing_back(store: Store) -> None:
    assert store.release(WS) == [0, 0, 0]
    store.fund(WS, 100)
    before = store.everything()
    assert store.release(WS) == [0, 0, 0]
    assert store.release(WS, "key_9", "boot_9") == [0, 0, 0]
    assert store.everything() == before


def test_a_leftover_mark_is_cleared(store: Store) -> None:
    """A workspace that is gone must not keep a dead boot from being retired."""
    store.client.sadd(leases_key(shard_of(WS), "boot_1"), f"{WS}|key_1")
    assert store.release(WS) == [0, 0, 0]
    assert store.leased_by(WS) == set()


def test_at_maxmemory_a_lease_still_goes_back(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    store.client.config_set("maxmemory", 1)
    assert store.release(WS) == [60, 6, 1]
    assert store.wallet(WS) == Wallet(100, 0, 1, 1)


def test_an_early_release_lets_others_in_and_the_balance_still_adds_up(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(100))
    assert store.lease(WS, Ask(1), boot="boot_2").outcomes == [BALANCE]
    store.release(WS)
    assert store.lease(WS, Ask(1), boot="boot_2").outcomes == [ADMITTED]
    assert store.counters(WS) == KeyCounters(day=store.counters(WS).day, open=1, held_ucr=1)


@pytest.mark.parametrize("given", range(3))
def test_missing_arguments_are_refused(store: Store, given: int) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    before = store.everything()
    keys = [workspace_key(WS), leases_key(shard_of(WS), "boot_1")]
    with pytest.raises(ResponseError):
        store.run("release", keys, ["boot_1", "key_1", WS][:given])
    with pytest.raises(ResponseError):
        store.run("release", keys[:1], ["boot_1", "key_1", WS])
    assert store.everything() == before
