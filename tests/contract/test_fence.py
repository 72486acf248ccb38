"""Boots of workers: heard, silent, fenced; what comes late from a fenced one does nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from accounting.contract import keyspace
from accounting.contract.figures import unpack_figures
from accounting.contract.keyspace import KeyCounters
from tests.contract.store import MINUTE, Ask, Row, Store, lease_call

WS, BOOT = "ws_1", "boot_1"
SHARD = keyspace.shard_of(WS)
KEYS = [keyspace.HEARD, keyspace.FENCED, keyspace.CLOCK]


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield Store(client)


def fence(store: Store, boot: str = BOOT) -> list[bytes]:
    keys = [keyspace.boots_key(SHARD), keyspace.leases_key(SHARD, boot)]
    found: list[bytes] = store.run("fence", keys, [boot])
    return found


def retire(store: Store, counted: int = 0, key: str = "key_1") -> list[int]:
    keys = [keyspace.workspace_key(WS), keyspace.leases_key(SHARD, BOOT)]
    reply: list[int] = store.run("retire", keys, [BOOT, key, WS, counted])
    return reply


def silent(store: Store, silence_ms: int, keep_ms: int = 60_000) -> list[bytes]:
    found: list[bytes] = store.run("silent", KEYS, [silence_ms, keep_ms])
    return found


def beat(store: Store, boot: str = BOOT) -> int:
    return int(store.run("beat", KEYS, [boot]))


def pass_time(store: Store, ms: int) -> None:
    """As if the clock had last moved so long ago."""
    seconds, rest = store.client.time()
    store.client.hset(keyspace.CLOCK, "at", int(seconds) * 1000 + int(rest) // 1000 - ms)


def test_a_lease_that_comes_late_takes_nothing(store: Store) -> None:
    store.fund(WS, 100)
    assert fence(store) == []
    before = store.everything()
    with pytest.raises(ResponseError, match="FENCED"):
        store.lease(WS, Ask(10, 5))
    assert store.everything() == before


def test_a_settle_that_comes_late_takes_nothing(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(10, 5))
    assert fence(store) == [b"ws_1|key_1"]
    before = store.everything()
    with pytest.raises(ResponseError, match="FENCED"):
        store.settle(1, Row(WS, credits=10, charge=6, tokens=5, used=3))
    assert store.everything() == before


def test_a_fenced_boot_is_retired_key_by_key(store: Store) -> None:
    store.fund(WS, 100)
    store.lease(WS, Ask(10, 5))
    fence(store)
    assert retire(store) == [10, 5, 1]
    assert fence(store) == []
    assert retire(store) == [0, 0, 0]
    assert store.wallet(WS).held == 0
    assert (store.counters(WS).open, store.counters(WS).held_tokens) == (0, 0)
    with pytest.raises(ResponseError, match="FENCED"):
        store.lease(WS, Ask(10, 5))


def lease_ahead(store: Store, requests: int) -> None:
    keys, arguments = lease_call(WS, [], ahead=(requests, 1, 1))
    assert unpack_figures(store.run("lease", keys, arguments))[-5] == requests


@pytest.mark.parametrize("counted", [0, 1])
def test_what_was_leased_ahead_counts_as_made_if_it_may_have_been(
    store: Store, counted: int
) -> None:
    store.fund(WS, 10_000, requests_per_minute=600)
    lease_ahead(store, 7)
    fence(store)
    assert retire(store, counted) == [7, 7, 7]
    found = store.counters(WS)
    assert (found.held_requests, found.open, store.wallet(WS).unused) == (0, 0, 0)
    used = found.requests_tat - store.now()
    assert used <= 0 if not counted else 0.6 < used / (7 * MINUTE / 600) <= 1


def test_a_bucket_is_never_more_than_full(store: Store) -> None:
    store.fund(WS, 10_000, requests_per_minute=600)
    lease_ahead(store, 7)
    store.write_counters(
        WS, KeyCounters(requests_tat=store.now() + MINUTE, held_requests=7, open=7, held_ucr=7)
    )
    fence(store)
    retire(store, 1)
    assert store.counters(WS).requests_tat <= store.now() + MINUTE


def test_a_boot_that_beats_is_not_silent(store: Store) -> None:
    assert beat(store) == 1
    for _ in range(5):
        pass_time(store, 4000)
        assert silent(store, 5000) == []
        assert beat(store) == 1


def test_a_silent_boot_is_fenced_and_listed_until_it_has_departed(store: Store) -> None:
    beat(store)
    silent(store, 6000)
    pass_time(store, 4000)
    assert silent(store, 6000) == []
    pass_time(store, 4000)
    assert silent(store, 6000) == [BOOT.encode()]
    assert beat(store) == 0
    assert silent(store, 6000) == [BOOT.encode()]
    assert store.run("depart", KEYS[:2], [BOOT, 60_000]) == 1
    assert silent(store, 6000) == []
    assert beat(store) == 0


def test_an_outage_is_not_silence(store: Store) -> None:
    """Nobody could be heard while Redis or accounting stood still."""
    beat(store)
    silent(store, 6000)
    pass_time(store, 3_600_000)
    assert silent(store, 6000) == []
    assert beat(store) == 1


def test_a_clock_set_back_moves_nothing(store: Store) -> None:
    beat(store)
    silent(store, 5000)
    pass_time(store, -3_600_000)
    assert silent(store, 5000) == []
    pass_time(store, 0)
    assert silent(store, 5000) == []


@pytest.mark.parametrize("words", [["", 1], [1, "x"], [0, 1], [1, 0]])
def test_a_silence_of_nothing_is_refused(store: Store, words: list[Any]) -> None:
    with pytest.raises(ResponseError, match="expected ms"):
        store.run("silent", KEYS, words)
    assert store.everything() == {}
