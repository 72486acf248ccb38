"""What is read of a stream entry: good events, and each way in which one can be bad."""

from datetime import UTC, date, datetime, timedelta
from typing import Any

import msgspec
import pytest

from accounting.contract.identifiers import new_id, ulid
from accounting.contract.money import MAX_UCR
from accounting.contract.usage_event import TokenUsage, encode_event, join_events
from accounting.usage_entries import (
    WHOLE_ENTRY,
    Entry,
    StreamId,
    condemned,
    entry,
    homeless,
    read,
    stream_id,
)
from tests.accounting.scene import make_event

ID = StreamId(1_700_000_000_000, 3)


def today() -> date:
    return datetime.now(UTC).date()


def written(*events: Any) -> Entry:
    return Entry(7, ID, join_events([encode_event(event) for event in events]))


def test_ids_of_a_stream_are_in_order_and_keep_their_text() -> None:
    assert stream_id(b"12-3") == StreamId(12, 3)
    assert str(StreamId(12, 3)) == "12-3"
    assert StreamId(9, 9) < StreamId(10, 0) < StreamId(10, 0).next == StreamId(10, 1)


def test_an_entry_is_read_from_its_fields() -> None:
    assert entry(7, b"12-3", {b"b": b"boot", b"e": b"events"}).body == b"events"
    assert entry(7, b"12-3", {}).body is None
    assert entry(7, b"12-3", None).body is None
    assert entry(7, b"12-3", {b"b": b"boot"}).body == b""


def test_events_are_read_in_order() -> None:
    events = [make_event("ws", "key", n) for n in range(3)]
    billed, defects = read(written(*events), today())
    assert [one.event for one in billed] == events
    assert [(one.shard, one.stream_id, one.position) for one in billed] == [
        (7, str(ID), n) for n in range(3)
    ]
    assert all(one.day == today() or one.day == today() - timedelta(days=1) for one in billed)
    assert not defects


def test_the_day_is_that_of_the_request_id() -> None:
    at = datetime(2026, 3, 1, 0, 0, 1, tzinfo=UTC)
    for made_at, day in [(at, date(2026, 3, 1)), (at - timedelta(seconds=2), date(2026, 2, 28))]:
        request_id = "req_" + ulid(int(made_at.timestamp() * 1000))
        event = make_event(
            "ws", "key", 1, request_id=request_id, started_at_us=int(at.timestamp() * 1_000_000)
        )
        [billed], _ = read(written(event), date(2026, 3, 1))
        assert (billed.day, billed.started_at) == (day, at)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"not a list", b"\x93\x01"])
def test_bytes_that_are_no_events_are_one_defect(body: bytes) -> None:
    billed, [defect] = read(Entry(7, ID, body), today())
    assert not billed
    assert (defect.position, defect.body, defect.charge_ucr) == (WHOLE_ENTRY, body, None)


def old_id(days: int) -> str:
    at = datetime.now(UTC) - timedelta(days=days)
    return "req_" + ulid(int(at.timestamp() * 1000))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema"),
        ({"charge_ucr": 5, "hold_ucr": 4}, "above its hold"),
        ({"charge_ucr": -1}, "negative"),
        ({"request_id": "req_1"}, "not an id"),
        ({"request_id": new_id("key")}, "request id"),
        ({"request_id": "req_7" + "Z" * 25}, "day"),
        ({"request_id": old_id(60)}, "day"),
        ({"request_id": old_id(-3)}, "day"),
        ({"started_at_us": 0}, "start"),
        ({"charge_ucr": MAX_UCR + 1, "hold_ucr": MAX_UCR + 1}, "amount"),
        ({"overrun_ucr": -1}, "amount"),
        ({"hold_ucr": MAX_UCR + 1}, "figure"),
        ({"status": 1000}, "figure"),
        ({"tokens": TokenUsage(input=-1)}, "token"),
        ({"tokens": TokenUsage(output=2**31)}, "token"),
        ({"total_us": 2**60}, "length"),
        ({"request_bytes": 2**60}, "length"),
        ({"fallback_depth": 2**20}, "length"),
        ({"model": "a\0b"}, "name"),
        ({"model": "m" * 600}, "name"),
        ({"outcome": "o" * 5000}, "name"),
    ],
)
def test_what_nobody_should_believe_is_a_defect(changes: dict[str, Any], reason: str) -> None:
    good = make_event("ws", "key", 3)
    bad = msgspec.structs.replace(make_event("ws", "key", 3), **changes)
    billed, [defect] = read(written(good, bad), today())
    assert [one.event for one in billed] == [good]
    assert reason in defect.reason
    assert (defect.position, defect.workspace_id, defect.key_id) == (1, "ws", "key")
    assert defect.request_id == bad.request_id
    believable = 0 <= bad.charge_ucr <= MAX_UCR
    assert defect.charge_ucr == (bad.charge_ucr if believable else None)
    assert defect.body == encode_event(bad)


def test_a_defect_that_cannot_be_read_keeps_its_bytes() -> None:
    body = join_events([msgspec.msgpack.encode([1, "too short"])])
    _, [defect] = read(Entry(7, ID, body), today())
    assert (defect.position, defect.workspace_id, defect.charge_ucr) == (0, None, None)


def test_condemning_keeps_every_event() -> None:
    events = [make_event("ws", "key", n) for n in range(3)]
    defects = condemned(written(*events), "refused\0")
    assert [(one.position, one.charge_ucr) for one in defects] == [(0, 0), (1, 1), (2, 2)]
    assert {one.reason for one in defects} == {"refused�"}
    [whole] = condemned(Entry(7, ID, None), "gone")
    assert (whole.position, whole.reason, whole.body) == (WHOLE_ENTRY, "gone", b"")


def test_an_event_without_a_workspace_keeps_its_place() -> None:
    [_, billed], _ = read(written(make_event("ws", "k", 1), make_event("ws", "k", 2)), today())
    defect = homeless(billed)
    assert (defect.stream_id, defect.position, defect.charge_ucr) == (str(ID), 1, 2)
