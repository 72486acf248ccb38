"""What a chat completion asks for: wrong types by name, bounds that hold, edits that are few."""

import json
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from accounting.contract.errors import (
    Failure,
    InvalidJson,
    InvalidRequest,
    MissingParameter,
    UnboundedCost,
    UnknownParameter,
)
from proxy.chat_head import ChatHead
from proxy.request_head import body_for, has_audio, input_bound, output_bound, parse

MESSAGES = [{"role": "user", "content": "Hi"}]
CONTEXT = 100_000


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()


def said(model: str) -> Raw:
    """A model's name as a body says it."""
    return Raw(msgspec.json.encode(model))


def head(**fields: Any) -> ChatHead:
    return parse(body(**fields))


def sent(raw: bytes, model: str = "m") -> bytes:
    """What goes upstream."""
    return body_for(parse(raw), said(model))


def refusal(raw: bytes) -> Failure:
    with pytest.raises(Failure) as caught:
        parse(raw)
    assert caught.value.status == 400
    assert json.loads(caught.value.body())["error"]["message"]
    return caught.value


def test_the_least_a_request_must_say() -> None:
    found = head()
    assert (found.model, found.stream, found.wants_usage, found.wants_audio) == (
        "m", None, False, False,
    )  # fmt: skip
    assert bytes(found.messages) == json.dumps(MESSAGES).encode()


def test_all_that_is_read() -> None:
    found = head(
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=5,
        max_completion_tokens=6,
        n=2,
        modalities=["text", "audio"],
        service_tier="default",
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    assert found.stream is found.wants_usage is found.wants_audio is True
    assert (found.max_tokens, found.max_completion_tokens, found.n) == (5, 6, 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"messages": {}}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream": []}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 100_000_001}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": {}}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "1"}, "n"),
        ({"modalities": "text"}, "modalities"),
        ({"modalities": ["text", 5]}, "modalities"),
        ({"service_tier": 5}, "service_tier"),
        ({"tools": {}}, "tools"),
        ({"tools": [5]}, "tools"),
        ({"tools": [{"type": 5}]}, "tools"),
    ],
)
def test_a_wrong_type_is_named(fields: dict[str, Any], param: str) -> None:
    failure = refusal(body(**fields))
    assert isinstance(failure, InvalidRequest)
    assert (failure.code, failure.param) == ("invalid_request", param)


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_parameter_is_named(missing: str) -> None:
    fields = {"model": "m", "messages": MESSAGES}
    del fields[missing]
    failure = refusal(json.dumps(fields).encode())
    assert isinstance(failure, MissingParameter)
    assert failure.param == missing


@pytest.mark.parametrize("raw", [b"[]", b"null", b"5", b'"x"', b"true"])
def test_what_is_no_object_is_no_request(raw: bytes) -> None:
    failure = refusal(raw)
    assert (failure.code, failure.param) == ("invalid_request", None)


@pytest.mark.parametrize(
    "value",
    [
        b"NaN", b"Infinity", b"-Infinity", b"nan", b"01", b"1.", b".5", b"+1", b"1.2.3", b"--1",
        b"", b"tru", b"undefined", b"1}{", b"'x'", b'"open', b"{", b"[", b"}",
        b'"\x01"', b'"a\nb"', b'"\\q"', b'"\\u12"', b'"\\ud800"',
        b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\xf8\x88\x80\x80"',
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", [b"temperature", b"messages"])
def test_what_is_not_json_is_refused_wherever_it_stands(value: bytes, key: bytes) -> None:
    raw = body()[:-1] + b', "%b": %b}' % (key, value)
    assert isinstance(refusal(raw), InvalidJson)


@pytest.mark.parametrize(
    "raw", [b"", b" ", b"{", b"\xef\xbb\xbf" + body(), body() + b"x", body()[:-1] + b",}", b"\xff"]
)
def test_broken_bodies(raw: bytes) -> None:
    assert isinstance(refusal(raw), InvalidJson)


def test_a_key_that_is_not_utf_8() -> None:
    assert isinstance(refusal(body()[:-1] + b',"\xff":1}'), InvalidJson)


@pytest.mark.parametrize("depth", [1_000, 10_000, 1_000_000])
@pytest.mark.parametrize("key", [b"messages", b"other", b"stream_options"])
def test_json_nested_too_deep_is_refused(depth: int, key: bytes) -> None:
    nested = b"[" * depth + b"]" * depth
    raw = b'{"model":"m","messages":[%b],"%b":%b}' % (b"", key, nested)
    assert refusal(raw).status == 400


def test_whatever_was_read_can_be_sent_however_deep_the_stack() -> None:
    """A body nested as deep as could just be read must not fail once it is admitted."""
    deepest = 0
    for depth in range(100, sys.getrecursionlimit() + 100):
        raw = b'{"model":"m","messages":[],"x":%b,"stream":true,"stream_options":{"y":%b}}' % (
            (b"[" * depth + b"]" * depth,) * 2
        )
        try:
            found = parse(raw)
        except InvalidJson:
            break
        deepest = depth

        def from_below(frames: int, raw: bytes = raw, found: ChatHead = found) -> bytes:
            return from_below(frames - 1) if frames else body_for(found, said("n"))

        if depth % 50 == 0:
            assert from_below(30).startswith(b'{"model":"n"')
    assert deepest
    assert from_below(30).startswith(b'{"model":"n"')


# What costs cannot be bounded


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"web_search_options": {}}, "web_search_options"),
        ({"search_parameters": {"mode": "auto"}}, "search_parameters"),
        ({"enable_search": True}, "enable_search"),
        ({"plugins": [{"id": "web"}]}, "plugins"),
        ({"best_of": 5}, "best_of"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"tools": [{"type": "function"}, {"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "builtin_function", "function": {"name": "$web_search"}}]}, "tools"),
    ],
)
def test_what_has_no_price_is_refused(fields: dict[str, Any], param: str) -> None:
    failure = refusal(body(**fields))
    assert isinstance(failure, UnboundedCost)
    assert failure.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"web_search_options": None},
        {"enable_search": False},
        {"service_tier": None},
        {"service_tier": "auto"},
        {"service_tier": "flex"},
        {"tools": None},
        {"tools": []},
        {"tools": [{"function": {}}, {"type": "custom"}]},
    ],
)
def test_what_is_switched_off_costs_nothing(fields: dict[str, Any]) -> None:
    assert head(**fields).model == "m"


@pytest.mark.parametrize(
    "name", ["Max_Tokens", "MAX_TOKENS", "N", "Model", "\u017ftream", "Enable_Search"]
)
def test_a_name_that_another_parser_takes_for_ours_is_refused(name: str) -> None:
    """Some providers match names whatever their case: the hold would be for another request."""
    failure = refusal(body(max_tokens=1, **{name: 5}))
    assert isinstance(failure, UnknownParameter)
    assert failure.param == name


def test_a_repeated_key_is_sent_once_as_it_was_priced() -> None:
    raw = b'{"model":"a","max_tokens":1,"messages":[1],"model":"m","max_tokens":900,"messages":[]}'
    found = parse(raw)
    assert (found.model, found.max_tokens, bytes(found.messages)) == ("m", 900, b"[]")
    assert sent(raw) == b'{"model":"m","max_tokens":900,"messages":[]}'


def test_repeated_stream_options_are_sent_once() -> None:
    raw = body(stream=True)[:-1] + (
        b',"stream_options":{"include_usage":false,"include_usage":true,"x":1,"x":2}}'
    )
    assert parse(raw).wants_usage
    assert sent(raw).count(b"include_usage") == 1
    assert json.loads(sent(raw))["stream_options"] == {"include_usage": True, "x": 2}


# Bounds


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, 1000),
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 10}, 10),
        ({"max_tokens": 10, "max_completion_tokens": 20}, 20),
        ({"max_tokens": 20, "max_completion_tokens": 10}, 20),
        ({"max_tokens": 5000}, 1000),
        ({"max_tokens": None, "n": 3}, 3000),
        ({"max_tokens": 10, "n": 128}, 1280),
        ({"max_tokens": 1, "n": 1}, 1),
    ],
)
def test_the_output_bound(fields: dict[str, Any], bound: int) -> None:
    assert output_bound(head(**fields), 1000) == bound


def bound(raw: bytes, context_tokens: int = CONTEXT) -> int:
    return input_bound(raw, parse(raw), context_tokens)


def test_the_input_bound_is_the_body_and_an_allowance() -> None:
    raw = body()
    assert bound(raw) == len(raw) + 32
    for tools in ({"tools": [{"type": "function"}]}, {"functions": []}):
        assert bound(body(**tools)) == len(body(**tools)) + 1024
    hidden = raw.replace(b'"model"', b'"t\\u006fols":[],"model"')
    assert bound(hidden) == len(hidden) + 1024
    assert bound(raw, 50) == 50
    assert bound(raw, len(raw) + 32) == len(raw) + 32


@settings(deadline=None)
@given(st.text(), st.booleans())
def test_no_tokenizer_counts_more_than_the_bound(text: str, ascii_only: bool) -> None:
    """A token is at least one byte of the text, and JSON never shortens a text."""
    fields = {"model": "m", "messages": [{"content": text}]}
    raw = json.dumps(fields, ensure_ascii=ascii_only)
    try:
        encoded = raw.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text
        return
    assert bound(encoded, 10**9) >= len(text.encode("utf-8", "replace"))


MEDIA = [
    {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    {"type": "file", "file": {"file_id": "f"}},
    {"type": "video_url", "video_url": {"url": "x"}},
    {"type": "video", "video": ["x"]},
]


@pytest.mark.parametrize("part", MEDIA)
@pytest.mark.parametrize("escape", [False, True])
def test_media_is_bounded_by_the_context(part: dict[str, Any], escape: bool) -> None:
    raw = body(messages=[{"role": "user", "content": [part]}])
    if escape:
        for word in part:
            raw = raw.replace(f'"{word}'.encode(), f'"\\u{ord(word[0]):04X}{word[1:]}'.encode())
        for name in MEDIA:
            raw = raw.replace(f'"{name["type"]}"'.encode(), f'"\\u{ord(name["type"][0]):04x}{name["type"][1:]}"'.encode())  # fmt: skip # noqa: E501
        assert f'"{part["type"]}"'.encode() not in raw
        assert bound(raw) == CONTEXT


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "assistant", "audio": {"id": "audio_1"}}]},
        {"extra_body": {"google": {"cached_content": "cachedContents/1"}}},
    ],
)
def test_what_the_provider_keeps_is_bounded_by_the_context(fields: dict[str, Any]) -> None:
    assert bound(body(**fields)) == CONTEXT


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": 'the word "image_url", and "file"'}]},
        {"messages": [{"role": "user", "content": "escaped: \\u0022image_url\\u0022 é \u007f"}]},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    ],
)
def test_text_about_media_is_text(fields: dict[str, Any]) -> None:
    raw = body(**fields)
    assert bound(raw) < len(raw) + 2000


@pytest.mark.parametrize("value", [b"1e999", b'"\\ud800"', b"[" * 5000 + b"]" * 5000])
def test_what_cannot_be_looked_into_is_refused(value: bytes) -> None:
    raw = b'{"model":"m","messages":["\\u0041",%b]}' % value
    with pytest.raises(InvalidJson):
        bound(raw)


# Large bodies: read another way, to the same end

LONG_TEXT = {"role": "user", "content": "Lorem ipsum dolor sit amet. " * 1000}
MANY_QUOTES = {"role": "user", "content": ["quoted"] * 4000}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True, "stream_options": {"x": 1}, "max_tokens": 7, "n": 2},
        {"tools": [{"type": "function"}], "unknown": {"a": [1, 2]}},
        {"model": 5},
        {"model": ""},
        {"messages": None},
        {"messages": "text"},
        {"stream": "true"},
        {"stream_options": {"include_usage": "yes"}},
        {"max_tokens": 0},
        {"tools": [{"type": 5}]},
        {"tools": [{"type": "web_search"}]},
        {"plugins": [1]},
        {"Max_Tokens": 1},
    ],
)
def test_a_large_body_is_understood_as_a_small_one(fields: dict[str, Any]) -> None:
    def understood(**padding: Any) -> Any:
        raw = body(**{**padding, **fields})
        try:
            found = parse(raw)
        except Failure as failure:
            return failure.code, failure.param, str(failure)
        read = msgspec.structs.asdict(found)
        for name in ("fields", "messages"):
            del read[name]
        return read, len(found.fields) - len(padding)

    assert understood(messages=[LONG_TEXT]) == understood(messages=MESSAGES)
    assert understood(x=["y"] * 9000) == understood(x=[])


def test_a_large_body_without_messages() -> None:
    failure = refusal(json.dumps({"model": "m", "x": "y" * 20_000}).encode())
    assert (failure.code, failure.param) == ("missing_parameter", "messages")


@pytest.mark.parametrize("padding", [[LONG_TEXT], [MANY_QUOTES], [LONG_TEXT, MANY_QUOTES]])
@pytest.mark.parametrize("part", [*MEDIA, {"type": "text", "audio": {"id": "a"}}])
def test_media_is_found_wherever_it_stands(
    padding: list[dict[str, Any]], part: dict[str, Any]
) -> None:
    message = {"role": "user", "content": [part]}
    for messages in ([message, *padding], [*padding, message], [*padding, message, *padding]):
        raw = body(messages=messages)
        assert bound(raw, CONTEXT * 10) == CONTEXT * 10
        assert has_audio(raw) == ("input_audio" in part)
        escaped = raw.replace(b'"%b"' % next(iter(part)).encode(), b'"t\\u0079pe"')
        assert bound(escaped, CONTEXT * 10) == CONTEXT * 10
        assert has_audio(escaped)
    without = body(messages=padding)
    assert bound(without, CONTEXT * 10) == len(without) + 32
    assert not has_audio(without)


@pytest.mark.parametrize("padding", [LONG_TEXT, MANY_QUOTES])
def test_tools_are_found_in_a_large_body(padding: dict[str, Any]) -> None:
    for raw in (
        body(messages=[padding], tools=[{"type": "function"}]),
        json.dumps({"functions": [], "model": "m", "messages": [padding]}).encode(),
    ):
        assert bound(raw, CONTEXT * 10) == len(raw) + 1024


def test_a_large_body_is_sent_as_it_came() -> None:
    raw = b'{"a":1,"model":"m","messages":[{"x" : "%b"}],"temperature":0.10}' % (b"y" * 20_000)
    assert sent(raw) == raw
    assert sent(raw, "n") == raw.replace(b'"m"', b'"n"', 1)


# What is sent


def test_a_plain_body_is_sent_as_it_came() -> None:
    raw = b'{"model":"m","messages":[{"role" : "user"}],"temperature":0.10,"x":"\\u00e9\xc3\xa9"}'
    assert sent(raw) == raw


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": None, "x": [1]}}, {"include_usage": True, "x": [1]}),
        ({"stream_options": {"x": 1, "include_usage": True}}, {"x": 1, "include_usage": True}),
    ],
)
def test_streams_are_asked_for_their_usage(options: dict[str, Any], expected: Any) -> None:
    raw = body(stream=True, **options)
    assert json.loads(sent(raw)) == {**json.loads(raw), "stream_options": expected}


def test_without_a_stream_its_options_stay_as_they_are() -> None:
    raw = body(stream=False, stream_options={"include_usage": False})
    assert json.loads(sent(raw)) == json.loads(raw)


def test_each_target_gets_its_own_model() -> None:
    raw = body(stream=True)
    found = parse(raw)
    for model in ("first", 'se"cond', "m"):
        assert json.loads(body_for(found, said(model)))["model"] == model


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(), _json, max_size=5),
    st.sampled_from([None, True, False]),
    st.sampled_from([None, {}, {"include_usage": True}, {"include_usage": False, "y": 1}]),
    st.booleans(),
)
def test_only_what_must_be_changed_is(
    more: dict[str, Any], stream: bool | None, options: Any, ascii_only: bool
) -> None:
    fields = {
        **more,
        "model": "m",
        "messages": MESSAGES,
        "stream": stream,
        "stream_options": options,
    }
    text = json.dumps(fields, ensure_ascii=ascii_only, separators=(",", ":"))
    try:
        raw = text.encode()
        found = parse(raw)
    except (UnicodeEncodeError, Failure):
        return  # lone surrogates; names that happen to be ours
    expected = {**json.loads(text), "model": "there"}
    if stream:
        expected["stream_options"] = {**(options or {}), "include_usage": True}
    assert json.loads(body_for(found, said("there"))) == expected
    assert parse(body_for(found, said("m"))).max_tokens == found.max_tokens


def test_a_body_may_not_smuggle_in_what_was_read_of_it() -> None:
    raw = body(**{"": {"model": "free"}, "fields": {"model": "free"}})
    assert json.loads(sent(raw)) == json.loads(raw)
