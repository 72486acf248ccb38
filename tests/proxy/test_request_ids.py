"""Request ids: ULIDs of their moment, unique, in the order of time."""

import time
from typing import Any

import pytest

from accounting.contract.identifiers import day_of, time_ms, ulid
from proxy import request_ids
from proxy.request_ids import RequestIds


def test_an_id_is_a_ulid_of_its_moment() -> None:
    before = time.time_ns() // 1_000_000
    found = RequestIds().next()
    after = time.time_ns() // 1_000_000
    assert len(found) == 30 and found.startswith(b"req_")
    assert set(found[4:].decode()) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
    assert before <= time_ms(found.decode()) <= after


def test_ids_are_unique() -> None:
    generators = [RequestIds(), RequestIds()]
    assert len({one.next() for _ in range(20_000) for one in generators}) == 40_000


def test_the_time_part_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now: dict[str, Any] = {"ns": 1_000_000_000_000_000_000}
    monkeypatch.setattr(request_ids.time, "time_ns", lambda: now["ns"])
    generator = RequestIds()
    for milliseconds in (0, 0, 1, 1_000, 86_400_000, 500):  # the last: a clock set back
        now["ns"] = 1_000_000_000_000_000_000 + milliseconds * 1_000_000 + 999
        found = generator.next().decode()
        assert time_ms(found) == 1_000_000_000_000 + milliseconds
        assert found[4:14] == ulid(1_000_000_000_000 + milliseconds)[:10]
    assert day_of("req_" + ulid(1_000_000_000_000)).isoformat() == "2001-09-09"


def test_later_ids_sort_after_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter(range(1_000, 3_000))
    monkeypatch.setattr(request_ids.time, "time_ns", lambda: next(moments) * 1_000_000)
    generator = RequestIds()
    ids = [generator.next() for _ in range(2_000)]
    assert ids == sorted(ids)


def test_all_bits_of_the_random_part_are_used() -> None:
    generator = RequestIds()
    columns = zip(*(generator.next()[14:] for _ in range(2_000)), strict=True)
    assert all(len(set(column)) == 32 for column in columns)
