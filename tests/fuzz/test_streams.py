"""Streams of any bytes: the same to the client however they are cut, and nothing lost but usage.

The model splits events as the WHATWG specification does and reads them with Python's json.
"""

import json
import re
from typing import Any

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from accounting.contract.usage_event import TokenUsage
from proxy.provider_usage import token_usage
from proxy.sse import EventTooLong
from proxy.usage_scanner import StreamScanner
from tests.fuzz.effort import search
from tests.fuzz.http_grammar import CUTS, cut

LIMIT = 1024
_BOUNDARY = re.compile(rb"(?:\r\n|\r(?!\n)|\n)(?:\r\n|\r(?!\n)|\n)")
_NULL = re.compile(rb'"usage"\s*:\s*null|[\s,]')
_LINE_END = re.compile(rb"\r\n|\r|\n")


# Streams by grammar

_words = st.one_of(
    st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(
        ["[DONE]", '"usage":{"prompt_tokens":1}', ',"usage":null', '"error":1', "data: [DONE]\n\n"]
    ),
)
_figures = st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99)}
)
_usage = st.one_of(st.none(), _figures, st.sampled_from([{}, [], 0, "", "null", True]))
_choice = st.fixed_dictionaries(
    {},
    optional={
        "index": st.just(0),
        "delta": st.fixed_dictionaries({}, optional={"content": _words, "usage": st.none()}),
        "finish_reason": st.sampled_from([None, "stop"]),
        "usage": st.one_of(st.none(), _figures),
    },
)
_chunks = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.none(), _words),
        "usage": _usage,
        "choices": st.one_of(st.lists(_choice, max_size=2), st.sampled_from([None, "", {}, [5]])),
        "error": st.sampled_from([None, False, 0, "", {}, [], "no", {"message": "no"}]),
        "extra": st.one_of(_words, st.none()),
        "x-usage": st.none(),
    },
)
_separators = st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", " :"), (",\n", ":\n")])


@st.composite
def _events(draw: st.DrawFn) -> bytes:
    """One whole event, in whatever form."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(
            st.sampled_from([b": ping\n\n", b"event: ping\n\n", b"\n\n", b"data\n\n", b"\n"])
        )
    if kind == 1:
        junk = [b"data: hello\n\n", b"data: {\n\n", b"data: [1]\n\n", b'data: "usage"\n\n']
        return draw(st.sampled_from([*junk, b'data: {"a":1,"usage":null\n\n', b"\xef\xbb\xbf"]))
    chunk = draw(_chunks)
    if draw(st.booleans()):
        chunk = dict(reversed(chunk.items()))
    text = json.dumps(chunk, separators=draw(_separators), ensure_ascii=draw(st.booleans()))
    prefix = draw(st.sampled_from([b"data: ", b"data:", b"data:  "]))
    lines = [prefix + line for line in text.encode("utf-8", "replace").split(b"\n")]
    before = draw(st.sampled_from([[]] * 4 + [[b"event: x"], [b"id: 1"], [b": comment"]]))
    return b"\n".join([*before, *lines]) + b"\n\n"


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    stream = b"".join(draw(st.lists(_events(), max_size=6)))
    done = [b"data: [DONE]\n\n", b"data: [DONE]\n", b"data: [DONE]"]
    stream += draw(st.sampled_from([b"", *done, b'data: {"choices":[]}', b"data: x", b"id: 1\n"]))
    stream = stream.replace(b"\n", draw(st.sampled_from([b"\n"] * 3 + [b"\r\n", b"\r"])))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(stream)))
        word = [b"\r", b"\n", b"\r\n", b"\0", b"\xff", b'"', b"}", b"a" * 2 * LIMIT]
        stream = stream[:at] + draw(st.sampled_from(word)) + stream[at + draw(st.integers(0, 2)) :]
    return stream


# What a client may see of one


class Model:
    """The whole stream read at once."""

    def __init__(self, stream: bytes) -> None:
        self.shown: list[object] = []
        self.untouched: list[bytes] = []
        self.usage: TokenUsage | None = None
        self.end = len(stream)  # what follows `[DONE]` or an error is for nobody
        at = 0
        for found in _BOUNDARY.finditer(stream):
            if found.end() == len(stream) and stream.endswith(b"\r"):
                break  # a half of CR LF, perhaps
            event, at = stream[at : found.end()], found.end()
            if self._ends(event):
                self.end = at
                return
        rest = stream[at:].strip(b"\r\n")
        data = data_of(rest)
        if data is not None and (data.startswith(b"[DONE]") or isinstance(decoded(data), dict)):
            self._ends(rest + b"\n\n")

    def _ends(self, event: bytes) -> bool:
        data = data_of(event)
        if b'"usage"' not in event and (data is None or not data.startswith(b"[DONE]")):
            self.untouched.append(event.strip(b"\r\n"))
        if data is None:
            return False
        if data.startswith(b"[DONE]"):
            return True
        chunk = decoded(data)
        if isinstance(chunk, dict):
            if chunk.get("error") not in (None, False, 0, "", {}, []):
                self._note(chunk.get("usage"))
                del self.untouched[len(self.untouched) - (b'"usage"' not in event) :]
                return True
            usage = chunk.get("usage")
            self._note(usage)
            if usage is not None and chunk.get("choices") in (None, []):
                return False
        self.shown.append(plain(chunk))
        return False

    def _note(self, usage: object) -> None:
        if usage is not None:
            self.usage = token_usage(json.dumps(usage).encode()) or self.usage

    def assert_shows(self, relayed: bytes) -> None:
        out = [relayed[start:end] for start, end in spans(relayed)]
        data = [data_of(event) for event in out]
        assert [plain(decoded(one)) for one in data if one is not None] == self.shown
        rest = iter([event.strip(b"\r\n") for event in out])
        assert all(event in rest for event in filter(None, self.untouched)), (
            "an event was changed or lost"
        )


def spans(stream: bytes) -> list[tuple[int, int]]:
    """Where its events start and end; there may be empty lines after the last."""
    ends = [found.end() for found in _BOUNDARY.finditer(stream)]
    assert not stream[ends[-1] if ends else 0 :].strip(b"\r\n")
    return list(zip([0, *ends], ends, strict=False))


def data_of(event: bytes) -> bytes | None:
    lines = []
    for line in _LINE_END.split(event):
        name, colon, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" ") if colon else b"")
    return b"\n".join(lines) if lines else None


def decoded(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except ValueError:
        return data


def plain(value: Any) -> Any:
    """Without any `usage`, wherever it is null or was taken out; junk without what looks so."""
    if isinstance(value, dict):
        kept = {name: plain(inner) for name, inner in value.items() if inner is not None}
        return {name: inner for name, inner in kept.items() if name != "usage"} | (
            {"usage": kept["usage"]} if "choices" not in value and "usage" in kept else {}
        )
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return _NULL.sub(b"", value) if isinstance(value, bytes) else value


# What the scanner makes of it


def run(pieces: list[bytes], strip: bool, limit: int = LIMIT) -> tuple[bytes, StreamScanner]:
    """As `Relay` drives it."""
    scanner = StreamScanner(limit, strip)
    relayed = b""
    for piece in pieces:
        relayed += scanner.pass_on(piece)
        assert len(scanner._splitter._kept) <= limit
        if scanner.done or scanner.failed is not None:
            break
    else:
        relayed += scanner.finish()
    assert len(relayed) == scanner.relayed_bytes
    return relayed, scanner


def read(relayed: bytes, scanner: StreamScanner) -> tuple[object, ...]:
    """What no cut may change; empty lines between events are nobody's."""
    events = [relayed[start:end].strip(b"\r\n") for start, end in spans(relayed)]
    events = [event for event in events if event]
    return events, scanner.usage, scanner.usage_raw, scanner.done, scanner.failed


@search(200)
@given(_streams(), CUTS, st.booleans())
@example(b'data: {"a":1,"choices":[{"usage" :null}]}\n\ndata: [DONE]\n\n', [42], True)
def test_any_stream_cut_anywhere_is_the_same_stream(
    stream: bytes, places: list[int], strip: bool
) -> None:
    model = Model(stream)
    stream = stream[: model.end]
    relayed, scanner = run([stream], strip, limit=10 * LIMIT)
    model.assert_shows(relayed)
    assert scanner.usage == model.usage
    event(f"usage {scanner.usage is not None}, done {scanner.done}, failed {scanner.failed!r}")
    for pieces in (cut(stream, places), [stream[n : n + 1] for n in range(len(stream))]):
        assert read(*run(pieces, strip, limit=10 * LIMIT)) == read(relayed, scanner)


@search(100)
@given(st.lists(st.one_of(st.binary(max_size=20), _events()), max_size=8), CUTS, st.booleans())
def test_any_bytes_are_passed_on(parts: list[bytes], places: list[int], strip: bool) -> None:
    stream = b"".join(parts)
    stream = stream[: Model(stream).end]
    assert read(*run(cut(stream, places), strip)) == read(*run([stream], strip))


@search(50)
@given(
    st.lists(_events(), max_size=4),
    st.sampled_from([b"data: ", b": ", b"", b'data: {"usage":', b"\r"]),
    st.integers(1, 700),
    st.sampled_from([b"x", b"data: [DONE]", b" ", b"\0", b'"usage"']),
)
def test_an_endless_line_takes_no_more_than_its_bound(
    before: list[bytes], start: bytes, step: int, filling: bytes
) -> None:
    stream = b"".join(before)
    if Model(stream).end < len(stream):
        return
    endless = start + filling * (5 * LIMIT)
    steps = [endless[n : n + step] for n in range(0, len(endless), step)]
    _, scanner = run([stream], True)
    if not scanner.done and scanner.failed is None:
        with pytest.raises(EventTooLong):
            run([stream, *steps], True)
