"""What a stream entry says: its usage events, and those that cannot be posted.

Decoding and judging only. A defect is kept with whatever could be read of it, because its
charge has already left the balance in Redis; trying it again would not make it better.
"""

from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from accounting.contract.identifiers import time_ms
from accounting.contract.keyspace import STREAM_FIELD_EVENTS, STREAM_FIELD_LATE
from accounting.contract.money import MAX_UCR
from accounting.contract.usage_event import UsageEvent, decode_event, split_events
from accounting.partitions import believed

WHOLE_ENTRY = -1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_US = 86_400_000_000
_CLOCKS_AGREE_US = 3_600_000_000  # an id is made when its exchange starts
_MOST_TOKENS = 2**31 - 1
_MOST_REVISIONS = 2**15 - 1
_LONGEST_NAME = 512
_LONGEST_REASON = 500
_EVENTS, _LATE = STREAM_FIELD_EVENTS.encode(), STREAM_FIELD_LATE.encode()


class StreamId(NamedTuple):
    """A position in a stream; ids compare as the entries follow each other."""

    ms: int
    seq: int

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"

    @property
    def next(self) -> "StreamId":
        return StreamId(self.ms, self.seq + 1)


START = StreamId(0, 0)


def stream_id(raw: bytes) -> StreamId:
    ms, _dash, seq = raw.partition(b"-")
    return StreamId(int(ms), int(seq))


class Entry(NamedTuple):
    """One entry as read. `body` None: it is still pending, but its data have been trimmed.

    `late`: its charges have not been taken from any balance; whoever posts them has to.
    """

    shard: int
    id: StreamId
    body: bytes | None
    late: bool = False


def entry(shard: int, raw_id: bytes, fields: dict[bytes, bytes] | None) -> Entry:
    """From Redis's reply; its fields are None or empty when they have been trimmed."""
    if not fields:
        return Entry(shard, stream_id(raw_id), None)
    return Entry(shard, stream_id(raw_id), fields.get(_EVENTS, b""), _LATE in fields)


class Billed(NamedTuple):
    """An event fit to be posted, and where it was found."""

    event: UsageEvent
    day: date
    started_at: datetime
    shard: int
    stream_id: str
    position: int
    late: bool = False


class Defect(Struct, frozen=True):
    """An event, or a whole entry, that cannot be posted, and what could be read of it."""

    shard: int
    stream_id: str
    position: int
    reason: str
    body: bytes
    workspace_id: str | None = None
    key_id: str | None = None
    request_id: str | None = None
    charge_ucr: int | None = None


def read(entry: Entry, today: date) -> tuple[list[Billed], list[Defect]]:
    """The events of an entry whose data are still there."""
    try:
        encoded = split_events(entry.body or b"")
    except msgspec.DecodeError as error:
        return [], [_defect(entry, WHOLE_ENTRY, str(error), entry.body or b"")]
    billed: list[Billed] = []
    defects: list[Defect] = []
    shard, text, late = entry.shard, str(entry.id), entry.late
    for position, one in enumerate(encoded):
        try:
            event = decode_event(one)
            made_at_ms = time_ms(event.request_id)
            _judge(event, made_at_ms, today)
        except (msgspec.DecodeError, ValueError) as error:
            defects.append(_defect(entry, position, str(error), one))
            continue
        started_at = _EPOCH + timedelta(microseconds=event.started_at_us)
        billed.append(Billed(event, _day(made_at_ms), started_at, shard, text, position, late))
    return billed, defects


def condemned(entry: Entry, reason: str) -> list[Defect]:
    """All of an entry as defects: for one that the database refuses."""
    body = entry.body or b""
    try:
        encoded = split_events(body)
    except msgspec.DecodeError:
        return [_defect(entry, WHOLE_ENTRY, reason, body)]
    return [_defect(entry, position, reason, one) for position, one in enumerate(encoded)]


def homeless(billed: Billed) -> Defect:
    """An event whose workspace does not exist."""
    return refused(billed, "unknown workspace")


def refused(billed: Billed, reason: str) -> Defect:
    """An event that is well-formed, and cannot be posted all the same."""
    entry = Entry(billed.shard, stream_id(billed.stream_id.encode()), None, billed.late)
    body = msgspec.msgpack.encode(billed.event)
    return _defect(entry, billed.position, reason, body)


def as_told_before(billed: Billed) -> Billed:
    """The exchange as its event says that it was told before; a first telling as it is."""
    event = billed.event
    if not event.revision:
        return billed
    before = msgspec.structs.replace(
        event,
        charge_ucr=event.replaces_ucr,
        hold_ucr=max(event.hold_ucr, event.replaces_ucr),
        revision=event.revision - 1,
        replaces_ucr=0,
    )
    return billed._replace(event=before)


def _day(made_at_ms: int) -> date:
    return datetime.fromtimestamp(made_at_ms / 1000, UTC).date()


def _judge(event: UsageEvent, made_at_ms: int, today: date) -> None:
    """Raises ValueError for what the tables could not hold, or nobody should believe."""
    if not event.request_id.startswith("req_") or len(event.request_id) != 30:
        raise ValueError("not a request id of ours")
    if made_at_ms >= 1 << 46 or not believed(_day(made_at_ms), today):
        raise ValueError("its day is out of range")
    if abs(event.started_at_us - made_at_ms * 1000) > _CLOCKS_AGREE_US:
        raise ValueError("its start disagrees with its request id")
    if event.charge_ucr > MAX_UCR or not 0 <= event.overrun_ucr <= MAX_UCR:
        raise ValueError("an amount is out of range")
    if not 0 <= event.revision <= _MOST_REVISIONS or not 0 <= event.replaces_ucr <= MAX_UCR:
        raise ValueError("its revision is out of range")
    if event.replaces_ucr and not event.revision:
        raise ValueError("it replaces a charge, but is the first of its exchange")
    if event.hold_ucr > MAX_UCR or not 0 <= event.status <= 999:
        raise ValueError("a figure is out of range")
    tokens = msgspec.structs.astuple(event.tokens)
    if min(tokens) < 0 or max(tokens) > _MOST_TOKENS:
        raise ValueError("a token count is out of range")
    lengths = (event.total_us, event.provider_us, event.first_byte_us)
    sizes = (event.request_bytes, event.answer_bytes, event.fallback_depth * _DAY_US)
    if max(map(abs, lengths + sizes)) > MAX_UCR:
        raise ValueError("a length or size is out of range")
    names = (event.key_id, event.route, event.model, event.served_by, event.price_version)
    text = "".join((*names, event.workspace_id, event.settlement, event.outcome))
    if "\0" in text or max(map(len, names)) > _LONGEST_NAME or len(text) > 4 * _LONGEST_NAME:
        raise ValueError("a name is too long or holds a NUL")


def _defect(entry: Entry, position: int, reason: str, body: bytes) -> Defect:
    """With whose it is and what it took from the balance, as far as that can be read."""
    defect = Defect(
        entry.shard, str(entry.id), position, _printable(reason)[:_LONGEST_REASON], body
    )
    try:
        fields = msgspec.msgpack.decode(body, type=list[Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return defect
    said = dict(zip(UsageEvent.__struct_fields__, fields, strict=False))
    return msgspec.structs.replace(
        defect,
        workspace_id=_name(said.get("workspace_id")),
        key_id=_name(said.get("key_id")),
        request_id=_name(said.get("request_id")),
        charge_ucr=None if entry.late else _taken(said.get("charge_ucr"), said.get("replaces_ucr")),
    )


def _name(said: Any) -> str | None:
    return _printable(said)[:_LONGEST_NAME] if isinstance(said, str) else None


def _taken(charge: Any, replaces: Any) -> int | None:
    """What a settle can have taken: whole, not negative, and of a size that a balance has."""
    if type(charge) is not int or not 0 <= charge <= MAX_UCR:
        return None
    known = type(replaces) is int and 0 <= replaces <= MAX_UCR
    return max(0, charge - replaces) if known else charge


def _printable(text: str) -> str:
    return text.replace("\0", "�")
