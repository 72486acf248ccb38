"""Request ids: ULIDs of their moment, unique, in the order of time."""

import time

from accounting.contract.identifiers import day_of, time_ms, ulid
from proxy.request_ids import RequestIds


def test_an_id_is_a_ulid_of_its_moment() -> None:
    before = time.time_ns() // 1_000_000
    found = RequestIds().next(time.time_ns())
    after = time.time_ns() // 1_000_000
    assert len(found) == 30 and found.startswith(b"req_")
    assert set(found[4:].decode()) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
    assert before <= time_ms(found.decode()) <= after


def test_ids_are_unique() -> None:
    generators, now_ns = [RequestIds(), RequestIds()], time.time_ns()
    assert len({one.next(now_ns) for _ in range(20_000) for one in generators}) == 40_000


def test_a_millisecond_has_no_end_of_ids() -> None:
    generator, every = RequestIds(), 1 << 20
    assert len({generator.next(7) for _ in range(every)}) == every


def test_the_time_part_follows_the_clock() -> None:
    generator = RequestIds()
    for milliseconds in (0, 0, 1, 1_000, 86_400_000, 500):  # the last: a clock set back
        found = generator.next(10**18 + milliseconds * 1_000_000 + 999).decode()
        assert time_ms(found) == 1_000_000_000_000 + milliseconds
        assert found[4:14] == ulid(1_000_000_000_000 + milliseconds)[:10]
    assert day_of("req_" + ulid(1_000_000_000_000)).isoformat() == "2001-09-09"


def test_later_ids_sort_after_earlier_ones() -> None:
    generator = RequestIds()
    ids = [generator.next(moment * 250_000) for moment in range(4_000, 12_000)]
    assert ids == sorted(ids)


def test_all_bits_of_the_random_part_are_used() -> None:
    generator = RequestIds()
    ids = [generator.next(moment * 1_000_000) for moment in range(2_000)]
    columns = list(zip(*(one[14:] for one in ids), strict=True))
    assert len(columns) == 16
    assert len(set(columns.pop(12))) == 16  # the count starts in the lower half of its range
    assert all(len(set(column)) == 32 for column in columns)
