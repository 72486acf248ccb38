"""Redis keys: one hash slot per workspace, stable shards, records Lua and Python share."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from accounting.contract import keyspace
from accounting.contract.keyspace import (
    KeyCounters,
    KeyRecord,
    KeyRules,
    LeaseRecord,
    Wallet,
    boots_key,
    digest_key,
    digest_of,
    key_record_decoder,
    leases_key,
    shard_of,
    stream_key,
    tag,
    workspace_key,
)
from accounting.contract.settings import SHARDS

WORKSPACES = st.text(min_size=1, max_size=40)
BOOTS = st.text(min_size=1, max_size=20)


def slot(key: str) -> int:
    return int(key_slot(key.encode()))


@given(WORKSPACES, BOOTS)
def test_all_keys_of_a_workspace_share_one_slot(workspace_id: str, boot: str) -> None:
    """Whatever an id contains, braces too: Cluster hashes the first tag only."""
    shard = shard_of(workspace_id)
    keys = [
        workspace_key(workspace_id),
        stream_key(shard),
        boots_key(shard),
        leases_key(shard, boot),
    ]
    assert len({slot(key) for key in keys}) == 1
    assert len(set(keys)) == 4


@given(WORKSPACES)
def test_a_workspace_has_one_of_the_shards(workspace_id: str) -> None:
    assert 0 <= shard_of(workspace_id) < SHARDS == 64


def test_shards_never_move() -> None:
    """Data lies under these: a change of the function would lose every wallet."""
    assert workspace_key("ws_1") == "{s17}:ws:ws_1"
    assert stream_key(shard_of("ws_2")) == "{s43}:usage"
    assert leases_key(shard_of("ws_3"), "b") == "{s61}:leases:b"
    assert boots_key(shard_of("ws_1")) == "{s17}:boots"


def test_shards_are_used_evenly() -> None:
    counts = [0] * SHARDS
    for number in range(64 * 200):
        counts[shard_of(f"ws_{number}")] += 1
    assert min(counts) > 100 and max(counts) < 300


def test_shards_spread_over_the_cluster() -> None:
    assert len({slot(stream_key(shard)) for shard in range(SHARDS)}) == SHARDS


def test_tags_have_two_digits() -> None:
    assert tag(0) == "{s00}"
    assert tag(63) == "{s63}"


def test_a_secret_is_stored_as_its_digest_only() -> None:
    secret = "inf_" + "a" * 43
    assert digest_of(secret) == hashlib.sha256(secret.encode()).hexdigest()
    assert digest_key(digest_of(secret)) == "key:" + digest_of(secret)
    assert secret not in digest_key(digest_of(secret))


def test_names_do_not_collide() -> None:
    names = [
        keyspace.EPOCH, keyspace.RECALL_CHANNEL, keyspace.HEARD, digest_key("b"),
        keyspace.FENCED, keyspace.CLOCK,
        workspace_key("b"), stream_key(0), boots_key(0), leases_key(0, "b"),
    ]  # fmt: skip
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "record",
    [
        Wallet(10**15, 5, keyspace.ACTIVE, 3),
        KeyRules(1, keyspace.LIVE),
        KeyRules(7, keyspace.REVOKED, 1, 2, 3, 4, 5, 6),
        KeyCounters(),
        KeyCounters(1, 2, 3, 4, 5, 6, 7, 8, 9),
        LeaseRecord(1, 2, 3),
        KeyRecord(1, "key_1", "ws_1", "n", ["chat"], []),
    ],
)
def test_records_read_back(record: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=type(record)) == record


def test_a_key_without_rules_of_its_own_is_unlimited() -> None:
    rules = KeyRules(1, keyspace.LIVE)
    assert msgspec.structs.astuple(rules) == (1, 1, 0, 0, 0, 0, 0, -1)


def test_a_foreign_key_record_is_a_decode_error() -> None:
    for blob in (b"", b"\xc1", b"\x90", b"{}", msgspec.msgpack.encode([1, 2, 3, 4, 5, 6])):
        with pytest.raises(msgspec.DecodeError):
            key_record_decoder.decode(blob)
