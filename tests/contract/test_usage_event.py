"""The usage event's codec: round trips, batches without decoding, foreign bytes refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting.contract.usage_event import (
    SCHEMA,
    TokenUsage,
    UsageEvent,
    decode_event,
    encode_event,
    join_events,
    split_events,
)

WHOLE = st.integers(0, 2**53)
TEXT = st.text(max_size=20)


def event(**changes: Any) -> UsageEvent:
    plain = UsageEvent(
        schema=SCHEMA,
        request_id="req_01ARZ3NDEKTSV4RRFFQ69G5FAV",
        workspace_id="ws_1",
        key_id="key_1",
        route="chat.completions",
        model="gpt-4o-mini",
        served_by="openai/gpt-4o-mini",
        price_version="abc",
        started_at_us=1_700_000_000_000_000,
        charge_ucr=900,
        hold_ucr=1000,
        overrun_ucr=0,
        settlement="exact",
        outcome="completed",
        status=200,
        streamed=True,
        fallback_depth=0,
        tokens=TokenUsage(19, 10, 1, 2, 3, 4, 5),
        total_us=1,
        provider_us=2,
        first_byte_us=3,
        request_bytes=4,
        answer_bytes=5,
    )
    return msgspec.structs.replace(plain, **changes)


events = st.builds(
    lambda hold, share, **rest: event(hold_ucr=hold, charge_ucr=min(share, hold), **rest),
    WHOLE,
    WHOLE,
    request_id=TEXT,
    model=TEXT,
    outcome=TEXT,
    streamed=st.booleans(),
    status=st.integers(0, 599),
    started_at_us=WHOLE,
    tokens=st.builds(TokenUsage, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE),
)


@given(events)
def test_an_event_reads_back(one: UsageEvent) -> None:
    assert decode_event(encode_event(one)) == one


@given(st.lists(events, max_size=5))
def test_a_batch_splits_into_what_was_joined(batch: list[UsageEvent]) -> None:
    encoded = [encode_event(one) for one in batch]
    assert split_events(join_events(encoded)) == encoded
    assert [decode_event(one) for one in split_events(join_events(encoded))] == batch


def test_a_batch_of_any_size_splits() -> None:
    for size in (0, 15, 16, 65_536):  # where MessagePack changes its array header
        encoded = [encode_event(event(status=n % 600)) for n in range(min(size, 20))]
        encoded = (encoded * (size // 20 + 1))[:size] if encoded else []
        assert split_events(join_events(encoded)) == encoded


def test_the_wire_form_is_an_array_that_opens_with_the_schema() -> None:
    array = msgspec.msgpack.decode(encode_event(event()))
    assert isinstance(array, list)
    assert array[0] == SCHEMA
    assert len(array) == len(UsageEvent.__struct_fields__) == 25
    assert array[17] == [19, 10, 1, 2, 3, 4, 5]


def test_an_event_of_before_revisions_reads_as_the_first() -> None:
    whole = msgspec.msgpack.decode(encode_event(event(revision=3, replaces_ucr=7)))
    before = decode_event(msgspec.msgpack.encode(whole[:23]))
    assert (before.revision, before.replaces_ucr) == (0, 0)


@pytest.mark.parametrize("arity", [1, 22, 26, 40])
def test_another_arity_is_refused(arity: int) -> None:
    whole = msgspec.msgpack.decode(encode_event(event())) + [0] * 20
    with pytest.raises(msgspec.ValidationError, match="length"):
        decode_event(msgspec.msgpack.encode(whole[:arity]))


@pytest.mark.parametrize(("charge", "replaces", "taken"), [(9, 0, 9), (9, 4, 5), (4, 9, 0)])
def test_a_revision_takes_what_is_charged_beyond_the_one_before(
    charge: int, replaces: int, taken: int
) -> None:
    assert event(charge_ucr=charge, replaces_ucr=replaces).taken_ucr == taken


def test_usage_is_zero_by_default() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(TokenUsage())) == [0] * 7


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, -1])
def test_another_schema_is_refused(schema: int) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"schema {schema}"):
        decode_event(encode_event(event(schema=schema)))


@pytest.mark.parametrize(("charge", "hold"), [(-1, 10), (11, 10), (1, 0)])
def test_a_charge_outside_its_hold_is_refused(charge: int, hold: int) -> None:
    with pytest.raises(msgspec.ValidationError, match="charge"):
        decode_event(encode_event(event(charge_ucr=charge, hold_ucr=hold)))


@pytest.mark.parametrize("charge", [0, 10])
def test_a_charge_may_be_nothing_or_all_of_its_hold(charge: int) -> None:
    assert decode_event(encode_event(event(charge_ucr=charge, hold_ucr=10))).charge_ucr == charge


@pytest.mark.parametrize("place", range(23))
def test_a_field_of_another_type_is_refused(place: int) -> None:
    array = msgspec.msgpack.decode(encode_event(event()))
    array[place] = {"not": "this"}
    with pytest.raises(msgspec.ValidationError):
        decode_event(msgspec.msgpack.encode(array))


def test_money_as_a_float_is_refused() -> None:
    array = msgspec.msgpack.decode(encode_event(event()))
    array[9] = 900.5
    with pytest.raises(msgspec.ValidationError):
        decode_event(msgspec.msgpack.encode(array))


@given(st.binary(max_size=60))
def test_foreign_bytes_are_a_decode_error(blob: bytes) -> None:
    for read in (decode_event, split_events):
        try:
            read(blob)
        except msgspec.DecodeError:
            continue


def test_a_cut_batch_is_a_decode_error() -> None:
    blob = join_events([encode_event(event()), encode_event(event())])
    for end in range(len(blob)):
        with pytest.raises(msgspec.DecodeError):
            split_events(blob[:end])
    with pytest.raises(msgspec.DecodeError):
        split_events(blob + b"\x00")


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        event().charge_ucr = 0  # type: ignore[misc]
