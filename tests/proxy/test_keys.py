"""Whom a secret stands for: asked of the real Redis once, kept within bounds, never a wrong 401."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

from accounting.contract import keyspace
from accounting.contract.errors import InvalidKey, Unavailable
from accounting.contract.keyspace import KeyRecord
from proxy.keys import Keys
from tests.contract.store import Store
from tests.proxy.redis_scene import Between, empty_store, open_pipe, record
from tests.waiting import eventually

ENTRIES, SECONDS = 4, 300.0


def secret(number: int) -> str:
    return f"inf_{number:043d}"


def bearer(number: int) -> bytes:
    return f"Bearer {secret(number)}".encode()


class Door:
    """Keys, a clock, and everything that was answered."""

    def __init__(self, between: Between, pipe: Any) -> None:
        self.between = between
        self.now = 1000.0
        self.keys = Keys(pipe, ENTRIES, SECONDS, lambda: self.now)
        self.told: list[Any] = []

    async def find(self, authorization: bytes | None) -> Any:
        before = len(self.told)
        self.keys.find(authorization, self.told.append)
        await eventually(lambda: len(self.told) > before)
        return self.told[-1]

    @property
    def questions(self) -> int:
        return self.between.commands_seen.count(b"\r\nGET\r\n")


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    with empty_store(redis_url) as store:
        yield store


@pytest.fixture
async def door(store: Store, redis_url: str) -> AsyncIterator[Door]:
    async with Between(redis_url) as between, open_pipe(between.url, 0.2) as pipe:
        yield Door(between, pipe)


def publish(store: Store, number: int, version: int = 1) -> KeyRecord:
    found = record(key_id=f"key_{number}", version=version)
    name = keyspace.digest_key(keyspace.digest_of(secret(number)))
    store.client.set(name, msgspec.msgpack.encode(found))
    return found


async def test_a_key_is_asked_once_and_then_known(store: Store, door: Door) -> None:
    expected = publish(store, 1)
    assert await door.find(bearer(1)) == expected
    told: list[Any] = []
    door.keys.find(bearer(1), told.append)
    assert told == [expected]  # at once
    assert door.questions == 1
    assert repr(door.keys) == "Keys(records=1, asked=0)"


async def test_many_who_ask_at_once_share_one_question(store: Store, door: Door) -> None:
    expected = publish(store, 1)
    for _ in range(10):
        door.keys.find(bearer(1), door.told.append)
    await eventually(lambda: len(door.told) == 10)
    assert door.told == [expected] * 10
    assert door.questions == 1


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER ", b"Bearer   "])
async def test_the_scheme_is_read_in_any_case(store: Store, door: Door, scheme: bytes) -> None:
    expected = publish(store, 1)
    assert await door.find(scheme + secret(1).encode() + b" ") == expected


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Basic dXNlcjpwYXNz",
        secret(1).encode(),
        b"Bearer sk-0123456789",
        b"Bearer inf_short",
        b"Bearer " + secret(1).encode() + b"x",
        b"Bearer INF_" + b"0" * 43,
        b"Bearer\t" + secret(1).encode(),
        b"Bearer " + b"\xff" * 47,
        b"Bearer " + b"inf_" + b"0" * 100_000,
    ],
)
async def test_a_malformed_credential_is_refused_without_a_question(
    store: Store, door: Door, authorization: bytes | None
) -> None:
    publish(store, 1)
    told: list[Any] = []
    assert door.keys.find(authorization, told.append) is None
    assert [type(one) for one in told] == [InvalidKey]
    assert door.questions == 0


async def test_nobody_s_key_is_invalid_where_redis_is_filled(door: Door) -> None:
    assert isinstance(await door.find(bearer(9)), InvalidKey)
    assert repr(door.keys) == "Keys(records=0, asked=0)"  # a key made now works at once


async def test_nobody_s_key_is_unavailable_where_redis_is_empty(store: Store, door: Door) -> None:
    store.client.delete(keyspace.EPOCH)
    assert isinstance(await door.find(bearer(9)), Unavailable)


async def test_a_new_key_works_at_once(store: Store, door: Door) -> None:
    assert isinstance(await door.find(bearer(1)), InvalidKey)
    expected = publish(store, 1)
    assert await door.find(bearer(1)) == expected


async def test_no_redis_is_unavailable_but_for_known_keys(store: Store, door: Door) -> None:
    expected = publish(store, 1)
    await door.find(bearer(1))
    door.between.closed = True
    door.between.cut()
    await eventually(lambda: not door.keys._pipe.up)
    assert isinstance(await door.find(bearer(2)), Unavailable)
    assert await door.find(bearer(1)) == expected


async def test_a_lost_reply_is_unavailable(store: Store, door: Door) -> None:
    publish(store, 1)
    door.between.silent = True
    assert isinstance(await door.find(bearer(1)), Unavailable)


@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x93abc", b"{}"])
async def test_a_record_that_cannot_be_read_is_unavailable(
    store: Store, door: Door, packed: bytes
) -> None:
    store.client.set(keyspace.digest_key(keyspace.digest_of(secret(1))), packed)
    assert isinstance(await door.find(bearer(1)), Unavailable)


async def test_a_foreign_type_under_the_name_is_unavailable(store: Store, door: Door) -> None:
    store.client.lpush(keyspace.digest_key(keyspace.digest_of(secret(1))), "x")
    assert isinstance(await door.find(bearer(1)), Unavailable)


async def test_a_record_is_read_again_when_it_is_old_or_forgotten(store: Store, door: Door) -> None:
    publish(store, 1, version=1)
    await door.find(bearer(1))
    newer = publish(store, 1, version=2)
    assert (await door.find(bearer(1))).version == 1
    door.now += SECONDS
    assert await door.find(bearer(1)) == newer
    newest = publish(store, 1, version=3)
    digest = door.keys.find(bearer(1), door.told.append)
    assert digest is not None
    door.keys.forget(digest)
    door.keys.forget(digest)
    assert await door.find(bearer(1)) == newest


async def test_the_cache_is_bounded_and_the_oldest_goes_first(store: Store, door: Door) -> None:
    for number in range(ENTRIES):
        publish(store, number)
        await door.find(bearer(number))
    door.now += SECONDS
    await door.find(bearer(0))  # renewed: now the youngest
    publish(store, 99)
    await door.find(bearer(99))
    assert repr(door.keys) == f"Keys(records={ENTRIES}, asked=0)"
    asked = door.questions
    door.now += 1
    await door.find(bearer(0))
    assert door.questions == asked
    await door.find(bearer(1))
    assert door.questions == asked + 1


async def test_one_who_cannot_bear_the_answer_costs_the_others_nothing(
    store: Store, door: Door
) -> None:
    expected = publish(store, 1)
    caught: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))

    def broken(found: object) -> None:
        raise ValueError("a bug")

    door.keys.find(bearer(1), broken)
    assert await door.find(bearer(1)) == expected
    assert len(caught) == 1
