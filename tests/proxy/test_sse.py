"""Event boundaries: every line end, every cut, and bounds that hold."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.sse import EventSplitter, EventTooLong, event_data, split_events

LINE_ENDS = (b"\n", b"\r\n", b"\r")
LIMIT = 1000

texts = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)
lines = st.builds(
    lambda field, text: (field + text).encode(),
    st.sampled_from(["data: ", "data:", ": ", "event: ", "id: ", "data: ünï😀"]),
    texts,
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """A stream in which each line may end differently, and its events."""
    events = []
    for event_lines in draw(st.lists(st.lists(lines, min_size=1, max_size=3), max_size=6)):
        ends = [draw(st.sampled_from(LINE_ENDS)) for _ in range(len(event_lines) + 1)]
        # A lone CR before a line that is empty and ends with LF would read as one CR LF.
        if ends[-2] == b"\r" and ends[-1] == b"\n":
            ends[-1] = b"\r\n"
        pairs = zip([*event_lines, b""], ends, strict=True)
        events.append(b"".join(line + end for line, end in pairs))
    return b"".join(events), events


def split(pieces: list[bytes], limit: int = LIMIT) -> tuple[list[bytes], bytes]:
    """What comes out per read, and what is left unfinished."""
    splitter = EventSplitter(limit)
    blocks = [splitter.whole_events(piece) for piece in pieces]
    return blocks, splitter.rest()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in pieces, cut at each of `places`."""
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_every_cut_in_two_gives_the_same_whole_events(end: bytes) -> None:
    events = [b": ping" + end * 2, b"data: a" + end + b"data: b" + end * 2, b"data:c" + end * 2]
    stream = b"".join(events) + b"data: next"
    for place in range(len(stream) + 1):
        blocks, rest = split([stream[:place], stream[place:]])
        assert b"".join(blocks) == b"".join(events)
        assert rest == b"data: next"
        for block in filter(None, blocks):
            assert block.endswith(end * 2)  # never within a CR LF


@settings(deadline=None)
@given(streams(), st.lists(st.integers(0, 400), max_size=12))
def test_any_stream_cut_anywhere_gives_its_events(
    stream: tuple[bytes, list[bytes]], places: list[int]
) -> None:
    data, events = stream
    blocks, rest = split(cut(data, places))
    whole = b"".join(blocks)
    assert whole + rest == data
    # A CR at the very end waits for what follows.
    assert rest == (events[-1] if events and data.endswith(b"\r") else b"")
    assert [event for block in blocks for event in split_events(block)] == (
        events[:-1] if rest else events
    )


@settings(deadline=None)
@given(streams())
def test_single_bytes_give_the_same_events(stream: tuple[bytes, list[bytes]]) -> None:
    data, _ = stream
    uncut, uncut_rest = split([data])
    blocks, rest = split([bytes([byte]) for byte in data])
    assert (b"".join(blocks), rest) == (b"".join(uncut), uncut_rest)


def test_whole_events_pass_as_they_came_without_a_copy() -> None:
    data = b"data: a\n\ndata: b\n\n"
    assert EventSplitter(LIMIT).whole_events(data) is data


def test_a_large_event_within_the_limit_passes_whole() -> None:
    event = b"data: " + b"x" * 1_000_000 + b"\n\n"
    pieces = [event[at : at + 4096] for at in range(0, len(event), 4096)]
    blocks, rest = split(pieces, limit=len(event))
    assert b"".join(blocks) == event
    assert not any(blocks[:-1])
    assert not rest


def test_an_event_beyond_the_limit_is_refused_while_it_grows() -> None:
    splitter = EventSplitter(LIMIT)
    event = b"data: " + b"x" * 1_000_000 + b"\n\n"
    fed = 0
    with pytest.raises(EventTooLong):
        for at in range(0, len(event), 64):
            splitter.whole_events(event[at : at + 64])
            fed = at + 64
    assert LIMIT - 64 <= fed <= LIMIT


def test_events_before_one_that_is_too_long_still_come_out() -> None:
    splitter = EventSplitter(LIMIT)
    assert splitter.whole_events(b"data: a\n\ndata: " + b"x" * 2 * LIMIT) == b"data: a\n\n"
    with pytest.raises(EventTooLong):
        splitter.whole_events(b"x")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data:  two spaces\n\n", b" two spaces"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata:b\r\r", b"a\nb"),
        (b"event: x\r\nid: 1\r\ndata: a\r\nretry: 5\r\n\r\n", b"a"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b": data: not\n\n", None),
        (b"database: not\n\n", None),
        (b"event: ping\n\n", None),
        (b"", None),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data


def test_a_block_splits_into_its_events() -> None:
    events = [b": c\n\n", b"data: a\r\n\r\n", b"data: b\r\r", b"data: c\n\r\n"]
    assert split_events(b"".join(events)) == events
    assert split_events(b"".join(events) + b"data: unfinished") == [*events, b"data: unfinished"]
    assert split_events(b"") == []
