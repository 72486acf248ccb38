"""put_workspace.lua and put_key.lua on a real Redis: states change, money and counters stay."""

from typing import Any

import msgspec
import pytest
from redis import ResponseError

from accounting.contract.keyspace import (
    ACTIVE,
    LIVE,
    REVOKED,
    SUSPENDED,
    KeyRules,
    Wallet,
    workspace_key,
)
from tests.contract.store import ADMITTED, KEY_ENDED, MAX, Ask, Row, Store, pack
from tests.contract.store import SUSPENDED as SUSPENDED_VERDICT

WS = "ws_1"


def test_a_new_workspace_starts_empty(store: Store) -> None:
    assert store.put_workspace(WS) == 1
    assert store.wallet(WS) == Wallet(0, 0, ACTIVE, 0)
    assert store.put_workspace(WS) == 0


def test_a_workspace_may_begin_suspended(store: Store) -> None:
    assert store.put_workspace(WS, SUSPENDED) == 1
    assert store.wallet(WS) == Wallet(0, 0, SUSPENDED, 0)


def test_suspending_keeps_money_holds_and_deltas(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(60))
    assert store.put_workspace(WS, SUSPENDED) == 0
    assert store.wallet(WS) == Wallet(100, 60, SUSPENDED, 1)
    assert store.lease(WS, Ask(1), mine=(60, 0, 1)).outcomes == [SUSPENDED_VERDICT]
    store.settle(1, Row(WS, credits=60, charge=50))  # what runs is still settled
    store.put_workspace(WS, ACTIVE)
    assert store.wallet(WS) == Wallet(50, 0, ACTIVE, 1)
    assert store.lease(WS, Ask(50)).outcomes == [ADMITTED]


@pytest.mark.parametrize("state", ["0", "3", "-1", "1.5", "nan", "", "active", None])
def test_an_unknown_state_is_refused(store: Store, state: Any) -> None:
    store.fund(WS, 100)
    before = store.everything()
    with pytest.raises(ResponseError):
        store.run("put_workspace", [workspace_key(WS)], [] if state is None else [state])
    assert store.everything() == before


def test_rules_are_kept_as_given(store: Store) -> None:
    rules = KeyRules(3, LIVE, MAX, 60, 1000, 10_000, 5, MAX)
    assert store.put_key(WS, "key_1", rules) == 1
    assert store.snapshot(WS).rules == {"key_1": rules}


def test_a_key_never_goes_back_a_version(store: Store) -> None:
    store.fund(WS, 100, version=2)
    assert store.put_key(WS, "key_1", KeyRules(4, REVOKED)) == 1
    before = store.everything()
    for version in (1, 2, 3):
        assert store.put_key(WS, "key_1", KeyRules(version, LIVE)) == 0
    assert store.everything() == before
    assert store.lease(WS, Ask(1), version=4).outcomes == [KEY_ENDED]


def test_the_same_version_may_be_written_again(store: Store) -> None:
    store.put_key(WS, "key_1", KeyRules(2, LIVE))
    before = store.everything()
    assert store.put_key(WS, "key_1", KeyRules(2, LIVE)) == 1
    assert store.everything() == before


def test_versions_in_any_order_end_at_the_highest(store: Store) -> None:
    for version in (3, 1, 5, 2, 4):
        store.put_key(WS, "key_1", KeyRules(version, LIVE, requests_per_minute=version))
    assert store.snapshot(WS).rules["key_1"].requests_per_minute == 5


def test_versions_next_to_the_largest_compare_exactly(store: Store) -> None:
    assert store.put_key(WS, "key_1", KeyRules(MAX, LIVE)) == 1
    assert store.put_key(WS, "key_1", KeyRules(MAX - 1, REVOKED)) == 0
    assert store.snapshot(WS).rules["key_1"] == KeyRules(MAX, LIVE)


def test_counters_wallet_and_other_keys_are_left_alone(store: Store) -> None:
    store.fund(WS, 100, requests_per_minute=60)
    store.fund(WS, key="key_2")
    store.lease(WS, Ask(60, 6))
    before = store.snapshot(WS)
    store.put_key(WS, "key_1", KeyRules(2, LIVE, requests_per_minute=1))
    found = store.snapshot(WS)
    assert (found.wallet, found.counters, found.leases) == (
        before.wallet,
        before.counters,
        before.leases,
    )
    assert found.rules["key_2"] == before.rules["key_2"]


def test_a_revoked_key_is_refused_at_once(store: Store) -> None:
    store.fund(WS, 100)
    assert store.lease(WS, Ask(1)).outcomes == [ADMITTED]
    store.put_key(WS, "key_1", KeyRules(2, REVOKED))
    assert store.lease(WS, Ask(1), mine=(1, 0, 1)).code == 2  # the worker's record is stale
    assert store.lease(WS, Ask(1), mine=(1, 0, 1), version=2).outcomes == [KEY_ENDED]


@pytest.mark.parametrize(
    "blob",
    [pack([2.0, 1.0, 0, 0, 0, 0, 0, -1.0]), pack([2, 1, 0, 0, 0, 0, 0, -1]) + b"\x00"],
    ids=["floats", "more bytes"],
)
def test_what_is_stored_is_what_python_reads(store: Store, blob: bytes) -> None:
    store.run("put_key", [workspace_key(WS)], ["key_1", blob])
    assert store.snapshot(WS).rules == {"key_1": KeyRules(2, LIVE)}


GOOD = [2, 1, 0, 60, 1000, 0, 0, -1]
NAN = float("nan")


def bad_rules() -> list[Any]:
    rules: list[Any] = [None, 5, "rules", {}, [], GOOD[:7], [*GOOD, 1], {"version": 2}, [GOOD]]
    for place in range(8):
        for value in (-2, 1.5, NAN, float("inf"), MAX + 1, 2**63, "1", None, True, []):
            rules.append([*GOOD[:place], value, *GOOD[place + 1 :]])
        if place < 7:
            rules.append([*GOOD[:place], -1, *GOOD[place + 1 :]])
    return rules


@pytest.mark.parametrize("rules", bad_rules(), ids=repr)
def test_bad_rules_are_refused_before_anything_is_written(store: Store, rules: Any) -> None:
    refused(store, ["key_1", pack(rules)])


@pytest.mark.parametrize("blob", [b"", b"\xc1", b"\x98\x01", msgspec.json.encode(GOOD)])
def test_bytes_that_are_no_rules_are_refused(store: Store, blob: bytes) -> None:
    refused(store, ["key_1", blob])


@pytest.mark.parametrize("arguments", [[], ["key_1"]])
def test_missing_arguments_are_refused(store: Store, arguments: list[Any]) -> None:
    refused(store, arguments)


def refused(store: Store, arguments: list[Any]) -> None:
    store.fund(WS, 100)
    before = store.everything()
    with pytest.raises(ResponseError):
        store.run("put_key", [workspace_key(WS)], arguments)
    assert store.everything() == before
