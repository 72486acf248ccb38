"""credit.lua on a real Redis: every ledger delta once and in order, and exact."""

from typing import Any

import pytest
from redis import ResponseError

from accounting.contract.keyspace import Wallet, workspace_key
from tests.contract.store import MAX, Ask, Row, Store

WS = "ws_1"


def test_deltas_apply_in_order_and_once(store: Store) -> None:
    store.put_workspace(WS)
    assert store.credit(WS, 1, 100) == [1, 100]
    assert store.credit(WS, 2, -30) == [1, 70]
    assert store.credit(WS, 3, 0) == [1, 70]
    assert store.wallet(WS) == Wallet(70, 0, 1, 3)


def test_spend_changes_with_the_balance_and_once(store: Store) -> None:
    store.put_workspace(WS)
    assert store.credit(WS, 1, 100, "key_1", 40) == [1, 100]
    assert store.credit(WS, 2, 25, "key_1", -25) == [1, 125]
    assert store.credit(WS, 2, 25, "key_1", -25) == [0, 125]
    assert store.counters(WS).spent_ucr == 15
    assert store.wallet(WS) == Wallet(125, 0, 1, 2)


def test_a_repeated_delta_changes_nothing(store: Store) -> None:
    store.put_workspace(WS)
    store.credit(WS, 1, 100)
    store.credit(WS, 2, 50)
    before = store.everything()
    assert store.credit(WS, 2, 50) == [0, 150]
    assert store.credit(WS, 1, 100) == [0, 150]
    assert store.credit(WS, 1, 999) == [0, 150]
    assert store.everything() == before


def test_a_gap_is_named_and_changes_nothing(store: Store) -> None:
    store.put_workspace(WS)
    before = store.everything()
    assert store.credit(WS, 2, 100) == [-1, 0]
    assert store.everything() == before
    store.credit(WS, 1, 100)
    assert store.credit(WS, 3, 100) == [-1, 1]
    assert store.credit(WS, MAX, 100) == [-1, 1]
    assert store.wallet(WS) == Wallet(100, 0, 1, 1)


def test_an_unknown_workspace_is_not_made_up(store: Store) -> None:
    assert store.credit(WS, 1, 100) == [-2, 0]
    assert store.everything() == {}


def test_deltas_arriving_in_any_order_end_alike(store: Store) -> None:
    """Each is repeated until it is applied, as accounting does it."""
    store.put_workspace(WS)
    amounts = {1: 500, 2: -20, 3: 7, 4: 1_000_000, 5: -3}
    waiting = [3, 5, 1, 4, 2]
    while waiting:
        delta = waiting.pop(0)
        if store.credit(WS, delta, amounts[delta])[0] == -1:
            waiting.append(delta)
    assert store.wallet(WS) == Wallet(sum(amounts.values()), 0, 1, 5)


def test_workspaces_count_their_own_deltas(store: Store) -> None:
    for name in ("ws_1", "ws_2"):
        store.put_workspace(name)
        assert store.credit(name, 1, 10) == [1, 10]


def test_held_state_and_keys_are_left_alone(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60, 6))
    before = store.snapshot(WS)
    store.put_workspace(WS, 2)
    assert store.credit(WS, 2, 40) == [1, 140]
    found = store.snapshot(WS)
    assert found.wallet == Wallet(140, 60, 2, 2)
    assert (found.counters, found.leases) == (before.counters, before.leases)


def test_money_taken_out_may_leave_less_than_is_held(store: Store) -> None:
    """A claw-back bites at once: what runs is settled, nothing new is admitted."""
    store.fund(WS, 100)
    store.lease(WS, Ask(60))
    assert store.credit(WS, 2, -100) == [1, 0]
    assert store.lease(WS, Ask(1), mine=(60, 0, 1)).verdicts[0][:3] == (10, 0, 60)
    store.settle(1, Row(WS, credits=60, charge=50))
    assert store.wallet(WS) == Wallet(-50, 0, 1, 2)
    assert store.credit(WS, 3, 60) == [1, 10]


def test_figures_next_to_the_largest_stay_exact(store: Store) -> None:
    store.put_workspace(WS)
    assert store.credit(WS, 1, MAX - 1) == [1, MAX - 1]
    assert store.credit(WS, 2, 1) == [1, MAX]
    before = store.everything()
    with pytest.raises(ResponseError, match="out of range"):
        store.credit(WS, 3, 1)
    assert store.everything() == before
    assert store.credit(WS, 3, -MAX) == [1, 0]
    assert store.credit(WS, 4, -MAX) == [1, -MAX]
    with pytest.raises(ResponseError, match="out of range"):
        store.credit(WS, 5, -1)
    assert store.credit(WS, 5, 8_999_999_999_999_999) == [1, -1]


BAD_AMOUNTS = [
    "", " ", "x", "1.5", "-0.1", "nan", "inf", "-inf", "1e3", "0x10", " 5", "5 ", "+5", "--5",
    "9000000000000001", "-9000000000000001", "9007199254740993", "1e400",
    "4503599627370497.25",  # a double has no room for the fraction: it must not pass as whole
]  # fmt: skip


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_a_bad_amount_is_refused_before_anything_is_written(store: Store, amount: str) -> None:
    refused(store, [2, amount])


@pytest.mark.parametrize("delta", ["0", "-1", *BAD_AMOUNTS])
def test_a_bad_delta_is_refused_before_anything_is_written(store: Store, delta: str) -> None:
    refused(store, [delta, 5])


@pytest.mark.parametrize("spent", BAD_AMOUNTS)
def test_a_bad_spend_is_refused_before_anything_is_written(store: Store, spent: str) -> None:
    refused(store, [2, 5, "key_1", spent])


@pytest.mark.parametrize("arguments", [[], [2], [2, 5, "", 7]])
def test_missing_arguments_are_refused(store: Store, arguments: list[Any]) -> None:
    refused(store, arguments)


def refused(store: Store, arguments: list[Any]) -> None:
    store.fund(WS, 100)
    before = store.everything()
    with pytest.raises(ResponseError):
        store.run("credit", [workspace_key(WS)], arguments)
    assert store.everything() == before


def test_at_maxmemory_nothing_is_half_credited(store: Store) -> None:
    store.fund(WS, 100)
    store.client.config_set("maxmemory", 1)
    with pytest.raises(ResponseError, match=r"OOM|maxmemory"):
        store.credit(WS, 2, 50)
    store.client.config_set("maxmemory", 0)
    assert store.wallet(WS) == Wallet(100, 0, 1, 1)
    assert store.credit(WS, 2, 50) == [1, 150]
