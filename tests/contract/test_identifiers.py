"""Ids: the day is in the id, later ids sort later, no two are alike."""

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting.contract.identifiers import day_of, new_id, time_ms, ulid

ALPHABET = set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")
MILLISECONDS = st.integers(0, 2**48 - 1)


def test_an_id_is_a_prefix_and_26_letters() -> None:
    identifier = new_id("req")
    prefix, _, letters = identifier.partition("_")
    assert prefix == "req"
    assert len(letters) == 26 and set(letters) <= ALPHABET
    assert letters[0] in "01234567"


def test_an_id_is_of_now() -> None:
    before = datetime.now(UTC).timestamp() * 1000 - 1
    at_ms = time_ms(new_id("req"))
    assert before <= at_ms <= datetime.now(UTC).timestamp() * 1000 + 1


@given(MILLISECONDS)
def test_the_time_reads_back(at_ms: int) -> None:
    assert time_ms(ulid(at_ms)) == at_ms
    assert time_ms("req_" + ulid(at_ms)) == at_ms


@given(MILLISECONDS, MILLISECONDS)
def test_later_ids_sort_later(one: int, other: int) -> None:
    if one != other:
        assert (ulid(one) < ulid(other)) == (one < other)


def test_ids_of_one_millisecond_differ() -> None:
    assert len({ulid(1_700_000_000_000) for _ in range(20_000)}) == 20_000


def test_every_random_bit_is_used() -> None:
    """Each of the last sixteen letters takes each of its 32 values."""
    ids = [ulid(0) for _ in range(2_000)]
    assert all(len({one[place] for one in ids}) == 32 for place in range(10, 26))


def test_a_published_ulid_reads_as_published() -> None:
    assert time_ms("01ARZ3NDEKTSV4RRFFQ69G5FAV") == 1_469_922_850_259


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), date(2026, 1, 1)),
        (datetime(2025, 12, 31, 23, 59, 59, 999_000, UTC), date(2025, 12, 31)),
        (datetime(2024, 2, 29, 12, tzinfo=UTC), date(2024, 2, 29)),
        (datetime(1970, 1, 1, tzinfo=UTC), date(1970, 1, 1)),
    ],
)
def test_the_day_is_the_utc_day(moment: datetime, day: date) -> None:
    at_ms = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert day_of("req_" + ulid(at_ms)) == day


@given(st.integers(0, 4_102_444_800_000 - 1))
def test_the_day_is_a_pure_function_of_the_id(at_ms: int) -> None:
    identifier = "req_" + ulid(at_ms)
    assert day_of(identifier) == day_of(identifier)
    assert day_of(identifier) == date(1970, 1, 1) + timedelta(days=at_ms // 86_400_000)


@pytest.mark.parametrize(
    "text",
    [
        "", "req_", "req", "req_01ARZ3NDEKTSV4RRFFQ69G5FA", "req_01ARZ3NDEKTSV4RRFFQ69G5FAVX",
        "req_01arz3ndektsv4rrffq69g5fav", "req_01ARZ3NDEKTSV4RRFFQ69G5FAI", "req_" + "U" * 26,
        "req_01ARZ3NDEKTSV4RRFFQ69G5FA٣", "chatcmpl-123", "req_8" + "0" * 25, "req_" + "Z" * 26,
    ],
)  # fmt: skip
def test_foreign_ids_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        time_ms(text)
    with pytest.raises(ValueError, match=r"\w"):
        day_of(text)


def test_a_day_beyond_the_calendar_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"\w"):
        day_of(ulid(2**48 - 1))


@given(st.text(max_size=40))
def test_any_text_is_an_id_or_a_value_error(text: str) -> None:
    try:
        at_ms = time_ms(text)
    except ValueError:
        return
    assert 0 <= at_ms < 2**48
