"""Usage read from answers as they pass: golden figures per provider, and streams cut anywhere."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accounting.contract.usage_event import TokenUsage
from proxy.provider_usage import estimate_input, estimate_output, read_answer, token_usage
from proxy.sse import EventTooLong, event_data, split_events
from proxy.usage_scanner import StreamScanner
from tests.proxy.golden_usage import GOLDEN

LIMIT = 2_000_000
USAGE = {"prompt_tokens": 12, "completion_tokens": 7, "total_tokens": 19}
TOKENS = TokenUsage(input=12, output=7)
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_usage(name: str) -> None:
    reported, tokens = GOLDEN[name]
    assert token_usage(json.dumps(reported).encode()) == tokens


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b"null",
        b"[]",
        b"5",
        b"",
        b"{",
        b'{"total_tokens":5}',
        b'{"prompt_tokens":null,"completion_tokens":null}',
        b'{"prompt_tokens":"12"}',
        b'{"prompt_tokens":true}',
        b'{"prompt_tokens":1e999}',
        b'{"prompt_tokens":{}}',
        b'{"prompt_tokens":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_usage_that_says_nothing(raw: bytes) -> None:
    assert token_usage(raw) is None


def test_huge_counts_stay_within_what_the_ledger_holds() -> None:
    tokens = token_usage(b'{"prompt_tokens":99999999999999999999999,"completion_tokens":1e300}')
    assert tokens == TokenUsage(2**31 - 1, 2**31 - 1)


_numbers = st.one_of(st.none(), st.integers(-5, 50), st.integers(), st.floats(-9, 99), st.text())
_details = st.dictionaries(
    st.sampled_from(["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens"]),
    _numbers,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt_tokens": _numbers,
            "completion_tokens": _numbers,
            "total_tokens": _numbers,
            "prompt_cache_hit_tokens": _numbers,
            "prompt_tokens_details": st.one_of(_details, _numbers),
            "completion_tokens_details": st.one_of(_details, _numbers),
        },
    )
)
def test_no_detail_exceeds_what_it_is_part_of(reported: dict[str, Any]) -> None:
    tokens = token_usage(json.dumps(reported).encode())
    if tokens is None:
        return
    assert min(tuple(getattr(tokens, field) for field in tokens.__struct_fields__)) >= 0
    assert tokens.cached_input + tokens.cache_write + tokens.audio_input <= tokens.input
    assert max(tokens.reasoning, tokens.audio_output) <= tokens.output < 2**31
    assert tokens.input < 2**31


# Plain answers


def test_a_plain_answer_tells_its_usage() -> None:
    body = json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode()
    assert read_answer(body) == (TOKENS, True)


@pytest.mark.parametrize("usage", [b"", b',"usage":null', b',"usage":{}', b',"usage":[]'])
def test_a_plain_answer_without_usage(usage: bytes) -> None:
    assert read_answer(b'{"id":null%b}' % usage) == (None, True)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_answer(body: bytes) -> None:
    assert read_answer(body) == (None, False)


@pytest.mark.parametrize(("size", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (400, 100)])
def test_input_is_estimated_from_bytes(size: int, tokens: int) -> None:
    assert estimate_input(size) == tokens


def test_output_is_estimated_from_what_was_relayed() -> None:
    assert estimate_output(0, 0, 0) == 0
    assert estimate_output(100, 1, 100) == 0  # the opening chunk has no content
    assert estimate_output(100 + 3 * 101, 4, 100) == 3  # a block is a token at least
    assert estimate_output(100 + 500, 2, 100) == 100  # more bytes are more tokens


# Streams


def chunk(content: str | None = None, **fields: Any) -> bytes:
    """A content chunk as OpenAI sends it."""
    delta = {} if content is None else {"content": content}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        **fields,
    }
    return sse(body)


def sse(body: object) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def usage_chunk(usage: object = USAGE) -> bytes:
    return chunk(choices=[], usage=usage)


def run(pieces: list[bytes], strip_nulls: bool = True) -> tuple[bytes, StreamScanner]:
    """What a client gets of reads from a provider, as an exchange drives the scanner."""
    scanner = StreamScanner(LIMIT, strip_nulls)
    relayed = b""
    for piece in pieces:
        relayed += scanner.pass_on(piece)
        if scanner.done or scanner.failed is not None:
            break
    else:
        relayed += scanner.finish()
    return relayed, scanner


def whole(stream: bytes, strip_nulls: bool = True) -> tuple[bytes, StreamScanner]:
    return run([stream], strip_nulls)


def state(scanner: StreamScanner) -> tuple[object, ...]:
    """What is read of a stream, and may not depend on how it was cut."""
    return (scanner.usage, scanner.usage_raw, scanner.done, scanner.failed, scanner.finished)


CONTENT = chunk("Hel") + chunk("lo", usage=None)
STREAMS: dict[str, tuple[bytes, bytes, TokenUsage | None]] = {  # in, out, usage
    "usage in a chunk of its own": (
        CONTENT + usage_chunk() + DONE,
        chunk("Hel") + chunk("lo"),
        TOKENS,
    ),
    "usage in the last content chunk": (
        chunk("Hel") + chunk("lo", usage=USAGE) + DONE,
        chunk("Hel") + chunk("lo"),
        TOKENS,
    ),
    "usage in every chunk, rising": (
        chunk("Hel", usage={**USAGE, "completion_tokens": 1, "total_tokens": 13})
        + chunk("lo", usage=USAGE)
        + DONE,
        chunk("Hel") + chunk("lo"),
        TOKENS,
    ),
    "usage zero": (
        chunk("a") + usage_chunk({"prompt_tokens": 0, "completion_tokens": 0}) + DONE,
        chunk("a"),
        TokenUsage(),
    ),
    "usage null": (
        chunk("a", usage=None) + usage_chunk(None) + DONE,
        chunk("a") + chunk(choices=[]),
        None,
    ),
    "usage empty": (chunk("a") + usage_chunk({}) + DONE, chunk("a"), None),
    "usage missing": (chunk("a") + DONE, chunk("a"), None),
    "spaces around": (
        b'data: {"choices": [{"delta": {}}], "usage": null}\n\n'
        b'data: {"usage": null, "choices": [{"delta": {}}]}\n\n'
        b'data: {"choices": [ ], "usage" : {"prompt_tokens": 12, "completion_tokens": 7}}\n\n'
        b"data: [DONE]\n\n",
        b'data: {"choices": [{"delta": {}}]}\n\ndata: {"choices": [{"delta": {}}]}\n\n',
        TOKENS,
    ),
    "no space after the colon": (
        (CONTENT + usage_chunk() + DONE).replace(b"data: ", b"data:"),
        (chunk("Hel") + chunk("lo")).replace(b"data: ", b"data:"),
        TOKENS,
    ),
    "CR LF": (
        (CONTENT + usage_chunk() + DONE).replace(b"\n", b"\r\n"),
        (chunk("Hel") + chunk("lo")).replace(b"\n", b"\r\n"),
        TOKENS,
    ),
    "CR": (
        (CONTENT + usage_chunk() + DONE).replace(b"\n", b"\r"),
        (chunk("Hel") + chunk("lo")).replace(b"\n", b"\r"),
        TOKENS,
    ),
    "comments between": (
        b": ping\n\n" + chunk("a") + b": PROCESSING\n\n" + usage_chunk() + b": bye\n\n" + DONE,
        b": ping\n\n" + chunk("a") + b": PROCESSING\n\n: bye\n\n",
        TOKENS,
    ),
    "several lines of data": (
        chunk("a")
        + b'data: {"choices":[],\ndata: "usage":\ndata: {"prompt_tokens":12,\n'
        + b'data: "completion_tokens":7}}\n\n'
        + DONE,
        chunk("a"),
        TOKENS,
    ),
    "several lines of data that stay": (
        b'data: {"choices":[\ndata: {"delta":{"content":"a"}}],"usage":{"prompt_tokens":12,\n'
        b'data: "completion_tokens":7}}\n\n' + DONE,
        b'data: {"choices":[ {"delta":{"content":"a"}}]}\n\n',
        TOKENS,
    ),
    "words that mean something elsewhere": (
        chunk('say "usage":{"prompt_tokens":1}, then [DONE], then {"error":{"message":"x"}}')
        + chunk('data: [DONE]\n\n,"usage":null')
        + usage_chunk()
        + DONE,
        chunk('say "usage":{"prompt_tokens":1}, then [DONE], then {"error":{"message":"x"}}')
        + chunk('data: [DONE]\n\n,"usage":null'),
        TOKENS,
    ),
    "characters of several bytes": (
        b'data: {"choices":[{"delta":{"content":"\xf0\x9f\x98\x80\xe2\x82\xac\xc3\xa9"}}]}\n\n'
        + usage_chunk()
        + DONE,
        b'data: {"choices":[{"delta":{"content":"\xf0\x9f\x98\x80\xe2\x82\xac\xc3\xa9"}}]}\n\n',
        TOKENS,
    ),
    "broken UTF-8": (
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n' + usage_chunk() + DONE,
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        TOKENS,
    ),
    "a name that is no UTF-8": (
        b'data: {"choices":[{}],"\xff":1,"usage":{"prompt_tokens":12,"completion_tokens":7}}\n\n',
        b'data: {"choices":[{}],"\xff":1,"usage":{"prompt_tokens":12,"completion_tokens":7}}\n\n',
        TOKENS,
    ),
    "ids null, empty and of any kind": (
        chunk("a", id=None, created=None, model=None)
        + chunk("b", id={"x": [1]}, created="now", model=7)
        + chunk("c", id="", usage=USAGE)
        + DONE,
        chunk("a", id=None, created=None, model=None)
        + chunk("b", id={"x": [1]}, created="now", model=7)
        + chunk("c", id=""),
        TOKENS,
    ),
    "not JSON": (
        b"data: hello\n\n" + usage_chunk() + b"data: [1]\n\n" + DONE,
        b"data: hello\n\ndata: [1]\n\n",
        TOKENS,
    ),
    "an error that is none": (
        chunk("a", error=None) + chunk("b", error="") + chunk("c", error={}) + usage_chunk() + DONE,
        chunk("a", error=None) + chunk("b", error="") + chunk("c", error={}),
        TOKENS,
    ),
    "an error event": (
        chunk("a") + sse({"error": {"message": "overloaded", "code": 529}}),
        chunk("a"),
        None,
    ),
    "an error event with usage": (
        chunk("a") + sse({"error": {"message": "overloaded"}, "usage": USAGE, "choices": []}),
        chunk("a"),
        TOKENS,
    ),
    "no [DONE]": (CONTENT + usage_chunk(), chunk("Hel") + chunk("lo"), TOKENS),
    "no blank line after [DONE]": (
        CONTENT + usage_chunk() + DONE[:-2],
        chunk("Hel") + chunk("lo"),
        TOKENS,
    ),
    "no blank line after the usage": (chunk("a") + usage_chunk()[:-1], chunk("a"), TOKENS),
    "cut within a chunk": (chunk("a") + chunk("b")[:-20], chunk("a"), None),
    "nothing": (b"", b"", None),
    "[DONE] alone": (DONE, b"", None),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_in_one_read(name: str) -> None:
    stream, expected, usage = STREAMS[name]
    relayed, scanner = whole(stream)
    assert relayed == expected
    assert scanner.usage == usage
    assert scanner.done is stream.rstrip().endswith(b"[DONE]")


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("strip_nulls", [True, False])
def test_a_stream_cut_at_every_offset_is_the_same_stream(name: str, strip_nulls: bool) -> None:
    stream, _, _ = STREAMS[name]
    relayed, scanner = whole(stream, strip_nulls)
    for place in range(1, len(stream)):
        in_two, scanner_in_two = run([stream[:place], stream[place:]], strip_nulls)
        assert in_two == relayed
        assert state(scanner_in_two) == state(scanner)
    single, scanner_of_bytes = run([bytes([byte]) for byte in stream], strip_nulls)
    assert single == relayed
    assert state(scanner_of_bytes) == state(scanner)


def test_a_client_that_asked_keeps_its_nulls() -> None:
    stream = CONTENT + chunk("!", usage=USAGE) + usage_chunk() + DONE
    relayed, scanner = whole(stream, strip_nulls=False)
    assert relayed == CONTENT + chunk("!", usage=None)  # one usage: the proxy's own at the end
    assert scanner.usage == TOKENS


def test_the_rewritten_chunk_keeps_every_field() -> None:
    fields = {"system_fingerprint": "fp", "nested": {"usage": USAGE, "x": [1, 2.50, "é"]}}
    relayed, _ = whole(chunk("a", usage=USAGE, **fields) + DONE)
    data = event_data(relayed)
    assert data is not None
    assert json.loads(data) == {**json.loads(chunk("a")[6:]), **fields}


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"message": "overloaded", "code": 529}, "overloaded"),
        ({"message": None}, "unknown error"),
        ({"code": "x"}, "unknown error"),
        ("plainly wrong", '"plainly wrong"'),
        ({"message": {"en": "x"}}, '{"message":{"en":"x"}}'),
        (True, "true"),
    ],
)
def test_an_error_event_ends_the_stream(error: object, text: str) -> None:
    relayed, scanner = whole(chunk("a") + sse({"error": error}) + chunk("never") + DONE)
    assert relayed == chunk("a")
    assert scanner.failed == text
    assert not scanner.finished


def test_usage_after_done_counts_where_it_comes_in_the_same_read() -> None:
    relayed, scanner = whole(chunk("a") + DONE + usage_chunk() + chunk("never"))
    assert relayed == chunk("a")
    assert scanner.usage == TOKENS


def test_usage_of_no_use_does_not_replace_what_is_known() -> None:
    _, scanner = whole(
        usage_chunk() + usage_chunk({"prompt_tokens": None}) + usage_chunk([]) + DONE
    )
    assert scanner.usage == TOKENS
    assert json.loads(scanner.usage_raw) == USAGE


def test_the_usage_given_on_is_one_line() -> None:
    _, scanner = whole(b'data: {"choices":[],"usage":{"prompt_tokens":1,\ndata: "x":2}}\n\n')
    assert b"\n" not in scanner.usage_raw
    assert json.loads(scanner.usage_raw) == {"prompt_tokens": 1, "x": 2}


@pytest.mark.parametrize(
    ("stream", "finished"),
    [
        (chunk("a"), False),
        (chunk("a") + chunk(choices=[{"delta": {}, "finish_reason": "stop"}]), True),
        (chunk('"finish_reason":"stop"'), False),
        (chunk(choices=[{"delta": {}, "finish_reason": "stop"}]) + b": ping\n\n", True),
        (chunk("a", usage=USAGE), False),  # a running total; more was to come
        (chunk("a") + usage_chunk(), True),
        (chunk("a") + DONE, True),
        (b"", False),
    ],
)
def test_whether_an_answer_came_to_its_end(stream: bytes, finished: bool) -> None:
    _, scanner = run(split_events(stream))
    assert scanner.finished is finished


def test_a_finish_reason_counts_though_an_empty_chunk_follows_it() -> None:
    stream = chunk("a") + chunk(choices=[{"delta": {}, "finish_reason": "stop"}])
    for after in (b"\n\n", chunk(choices=[])):
        _, scanner = run([stream, after])
        assert scanner.finished


@pytest.mark.parametrize("other", [b"", chunk("b"), chunk("b", usage=USAGE), b"data: []\n\n"])
@pytest.mark.parametrize("null", [b'{"usage":null}', b'{"usage" : null, "choices": []}'])
def test_what_a_null_is_next_to_changes_nothing(null: bytes, other: bytes) -> None:
    event = b"data: " + null + b"\n\n"
    for first, second in ((event, other), (other, event), (event, event)):
        assert run([first, second])[0] == run([first + second])[0]


def test_the_first_chunk_with_a_choice_stands_for_all() -> None:
    opening = chunk(choices=[], id="", created=0, model="")  # as some filters announce themselves
    first = chunk("")
    _, scanner = run([b": ping\n\n" + opening, first + chunk("x" * 400)])
    assert scanner.chunk_head is not None
    assert (scanner.chunk_head.id, scanner.chunk_head.model) == ("chatcmpl-1", "m")
    assert scanner.envelope == len(first)


def test_an_answer_of_usage_alone_still_names_itself() -> None:
    _, scanner = whole(usage_chunk() + DONE)
    assert scanner.chunk_head is not None
    assert scanner.chunk_head.id == "chatcmpl-1"


def test_output_of_an_unmetered_stream_is_estimated_without_envelopes() -> None:
    events = [chunk(""), *[chunk("word", usage={"cost": 1}) for _ in range(50)]]
    _, scanner = run([*events, DONE])
    assert scanner.usage is None
    assert scanner.events == 51
    assert scanner.estimate_output() == 50  # four letters each, whatever surrounds them


def test_an_event_of_a_megabyte_passes_within_the_limit() -> None:
    event = chunk("x" * 1_000_000)
    stream = event + usage_chunk() + DONE
    relayed, scanner = run([stream[at : at + 65536] for at in range(0, len(stream), 65536)])
    assert relayed == event
    assert scanner.usage == TOKENS


def test_an_event_beyond_the_limit_is_refused() -> None:
    scanner = StreamScanner(100_000, True)
    event = chunk("x" * 1_000_000)
    with pytest.raises(EventTooLong):
        for at in range(0, len(event), 65536):
            scanner.pass_on(event[at : at + 65536])


# Random streams, cut at random

_texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(['"usage":{"prompt_tokens":9}', "[DONE]", '"error":{"a":1}', ',"usage":null']),
)
_figures = st.one_of(
    st.none(),
    st.just(USAGE),
    st.fixed_dictionaries({"prompt_tokens": st.integers(0, 9), "completion_tokens": st.just(1)}),
)
_events = st.one_of(
    st.builds(lambda text: chunk(text), _texts),
    st.builds(lambda text, usage: chunk(text, usage=usage), _texts, _figures),
    st.builds(lambda usage: usage_chunk(usage), _figures),
    st.builds(lambda text: chunk(text, id=None, **{"x\\": text}), _texts),
    st.sampled_from(
        [
            b": ping\n\n",
            b"data: not json\n\n",
            b"event: ping\n\n",
            b'data: {"choices":null,"usage":0}\n\n',
            b'data: {"choices":[{}],"error":null}\n\n',
        ]
    ),
)
_ends = st.sampled_from([b"", DONE, sse({"error": {"message": "no"}}), chunk("cut")[:-9]])


@settings(deadline=None)
@given(
    st.lists(_events, max_size=8),
    _ends,
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.booleans(),
    st.lists(st.integers(0, 3000), max_size=20),
)
@example([chunk("[DONE]")], DONE, b"\n", True, [])
def test_random_streams_cut_at_random(
    events: list[bytes], end: bytes, line_end: bytes, strip_nulls: bool, places: list[int]
) -> None:
    if line_end == b"\r":  # what the last CR ends shows only when more comes
        end = end or DONE
    stream = (b"".join(events) + end).replace(b"\n", line_end)
    relayed, scanner = whole(stream, strip_nulls)
    bounds = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(bounds)]
    in_pieces, scanner_in_pieces = run(pieces, strip_nulls)
    assert in_pieces == relayed
    assert state(scanner_in_pieces) == state(scanner)
    expected = [shown for event in events for shown in shown_of(event)]
    got = [event_data(event) for event in split_events(relayed)]
    assert [decoded(data) for data in got if data is not None] == expected


def shown_of(event: bytes) -> list[object]:
    """What a client may see of an event: the simplest model of the scanner."""
    data = event_data(event)
    if data is None:
        return []
    body = decoded(data)
    if not isinstance(body, dict):
        return [body]
    usage = body.pop("usage", None)
    return [body] if body.get("choices") or usage is None else []


def decoded(data: bytes) -> object:
    try:
        body = json.loads(data)
    except ValueError:
        return data
    if isinstance(body, dict) and body.get("usage", 0) is None:
        del body["usage"]
    return body


# Large blocks: looked through another way, to the same end


@pytest.mark.parametrize("content", ["", "x" * 30, "many words " * 400, "data: \n\n" * 500])
@pytest.mark.parametrize("nulls", [b"", b',"usage":null'])
def test_a_large_block_is_read_as_its_events_are(content: str, nulls: bytes) -> None:
    text = json.dumps(content).encode()
    event = b'data: {"choices":[{"delta":{"content":%b},"finish_reason":"x"}]%b}\n\n' % (
        text,
        nulls,
    )
    events = [event] * (1 + 40_000 // len(event))
    tail = b'data: {"choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode()
    at_once, in_turn = StreamScanner(LIMIT, True), StreamScanner(LIMIT, True)
    got = at_once.pass_on(b"".join([*events, tail, DONE]))
    assert got == b"".join(in_turn.pass_on(one) for one in [*events, tail, DONE])
    assert got == b"".join(events).replace(nulls, b"")
    for scanner in (at_once, in_turn):
        assert (scanner.usage, scanner.done) == (TOKENS, True)
        assert scanner.relayed_bytes == len(got)
    if b"data: \\n" not in text:
        assert at_once.events == in_turn.events == len(events)


def test_an_answer_that_ends_in_a_large_block_is_finished() -> None:
    scanner = StreamScanner(LIMIT, False)
    chunk = b'data: {"choices":[{"delta":{"content":"%b"},"finish_reason":%b}]}\n\n'
    scanner.pass_on(chunk % (b"x" * 40_000, b"null"))
    assert not scanner.finished
    scanner.pass_on(chunk % (b"x" * 40_000, b'"stop"'))
    assert scanner.finished
