"""snapshot.lua and the scripts' loader on a real Redis."""

import hashlib

import pytest
from redis import ResponseError
from redis.asyncio import Redis

from accounting.contract.keyspace import (
    LIVE,
    KeyRules,
    LeaseRecord,
    Wallet,
    shard_of,
    stream_key,
    workspace_key,
)
from accounting.contract.scripts import SCRIPTS, call, load_all
from tests.contract.store import Ask, Row, Store, read_snapshot, same_shard

WS = "ws_1"


def test_nothing_is_a_snapshot_too(store: Store) -> None:
    found = store.snapshot(WS)
    assert found.stream_id == b"0-0"
    assert (found.wallet, found.rules, found.counters, found.leases) == (None, {}, {}, {})
    assert store.everything() == {}


def test_all_of_a_workspace_at_one_instant(store: Store) -> None:
    store.fund(WS, 1000)
    store.put_key(WS, "key_2", KeyRules(7, LIVE, concurrency=3))
    store.lease(WS, Ask(100, 10), Ask(50, 5))
    stream_id = store.settle(1, Row(WS, credits=100, charge=60, tokens=10, used=8))
    before = store.everything()
    found = store.snapshot(WS)
    assert store.everything() == before
    assert found.stream_id == stream_id
    assert found.wallet == Wallet(940, 50, 1, 1)
    assert found.rules == {"key_1": KeyRules(1, LIVE), "key_2": KeyRules(7, LIVE, concurrency=3)}
    assert found.leases == {"boot_1:key_1": LeaseRecord(50, 5, 1)}
    assert found.counters["key_1"].spent_ucr == 60


def test_the_position_is_that_of_the_shard_s_stream(store: Store) -> None:
    one, two = same_shard(2)
    store.fund(one, 10)
    store.fund(two, 10)
    stream_id = store.settle(1, Row(two, slots=0))
    assert store.snapshot(one).stream_id == stream_id


def test_the_position_outlives_trimming_and_deletion_of_entries(store: Store) -> None:
    store.fund(WS, 10)
    store.settle(1, Row(WS, slots=0))
    stream_id = store.settle(2, Row(WS, slots=0))
    store.client.xdel(stream_key(shard_of(WS)), stream_id)
    assert store.snapshot(WS).stream_id == stream_id
    store.client.xtrim(stream_key(shard_of(WS)), maxlen=0)
    assert store.stream(WS) == []
    assert store.snapshot(WS).stream_id == stream_id


def test_a_snapshot_needs_no_memory(store: Store) -> None:
    store.fund(WS, 10)
    store.client.config_set("maxmemory", 1)
    assert store.wallet(WS) == Wallet(10, 0, 1, 1)


def test_a_stream_of_another_type_is_refused(store: Store) -> None:
    store.client.set(stream_key(shard_of(WS)), "not a stream")
    with pytest.raises(ResponseError):
        store.snapshot(WS)


def test_every_script_is_known_by_its_digest() -> None:
    assert set(SCRIPTS) == {
        "ahead", "beat", "credit", "depart", "fence", "lease", "put_key", "put_workspace",
        "release", "retire", "settle", "silent", "snapshot",
    }  # fmt: skip
    for name, script in SCRIPTS.items():
        assert script.name == name
        assert script.source.startswith(f"-- {name}: ")
        assert script.digest == hashlib.sha1(script.source.encode()).hexdigest()


async def test_loading_puts_every_script_into_redis(redis_client: Redis) -> None:
    await redis_client.script_flush()
    await load_all(redis_client)
    digests = [script.digest for script in SCRIPTS.values()]
    assert await redis_client.script_exists(*digests) == [True] * len(digests)


async def test_a_script_redis_has_lost_is_brought_back(redis_client: Redis) -> None:
    await redis_client.script_flush()
    keys = [workspace_key(WS)]
    assert await call(redis_client, "put_workspace", keys, [1]) == 1
    assert await redis_client.script_exists(SCRIPTS["put_workspace"].digest) == [True]
    assert await call(redis_client, "credit", keys, [1, 500]) == [1, 500]
    reply = await call(redis_client, "snapshot", [*keys, stream_key(shard_of(WS))], [])
    assert read_snapshot(reply).wallet == Wallet(500, 0, 1, 1)
    with pytest.raises(ResponseError, match="whole numbers"):
        await call(redis_client, "credit", keys, [2, "1.5"])
