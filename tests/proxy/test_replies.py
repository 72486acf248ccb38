"""Heads, final chunks and errors, byte by byte."""

import json
from decimal import Decimal
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from accounting.contract.errors import (
    Failure,
    HeadTooLarge,
    InsufficientCredit,
    InvalidKey,
    ProviderFailed,
    Unavailable,
)
from accounting.contract.usage_event import TokenUsage
from proxy import replies
from proxy.usage_scanner import StreamScanner
from tests.proxy.test_usage_scanner import USAGE, chunk, usage_chunk, whole

REQUEST_ID = b"req_01M7XTB5K0BQWXPK2ACC0N1J1V"
TOKENS = TokenUsage(12, 7)


def data(event: bytes) -> Any:
    """The decoded data of the one event there is; figures with a point are exact."""
    assert event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2
    return json.loads(event[6:], parse_float=Decimal)


def test_the_head_of_a_plain_answer() -> None:
    assert replies.plain_head(REQUEST_ID, 42, 12_345, b"there", b"x-a: 1\r\n", False) == (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 42\r\n"
        b"x-request-id: " + REQUEST_ID + b"\r\nx-credits-used: 0.012345\r\nx-model-used: there\r\n"
        b"x-a: 1\r\n\r\n"
    )
    assert b"\r\nconnection: close\r\n\r\n" in replies.plain_head(REQUEST_ID, 0, 0, b"m", b"", True)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("close", [True, False])
def test_the_head_of_a_stream(chunked: bool, close: bool) -> None:
    head = replies.stream_head(REQUEST_ID, b"there", b"", chunked, close)
    assert head.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
    assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1
    assert (b"\r\ntransfer-encoding: chunked\r\n" in head) is chunked
    assert (b"\r\nconnection: close\r\n" in head) is close
    assert b"\r\nx-model-used: there\r\n" in head and REQUEST_ID in head
    assert b"credits" not in head and b"content-length" not in head


@pytest.mark.parametrize(
    ("failure", "status_line"),
    [
        (InvalidKey(), b"HTTP/1.1 401 Unauthorized\r\n"),
        (HeadTooLarge(), b"HTTP/1.1 431 Request Header Fields Too Large\r\n"),
        (Unavailable(), b"HTTP/1.1 503 Service Unavailable\r\n"),
        (InsufficientCredit(metadata={"a": "1"}), b"HTTP/1.1 402 Payment Required\r\n"),
    ],
)
def test_an_error_is_a_whole_answer(failure: Failure, status_line: bytes) -> None:
    head, _, body = replies.error_reply(failure, "req_1", False).partition(b"\r\n\r\n")
    assert head.startswith(status_line)
    lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert int(lines[b"content-length"]) == len(body)
    assert lines[b"x-request-id"] == b"req_1"
    assert b"connection" not in lines
    error = json.loads(body)["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    for name, value in failure.headers():
        assert lines[name.encode()] == value.encode()


def test_an_error_without_a_request() -> None:
    reply = replies.error_reply(InvalidKey(), None, True, b"x-ratelimit: 1\r\n")
    assert b"x-request-id" not in reply
    assert b"\r\nx-ratelimit: 1\r\nconnection: close\r\n\r\n{" in reply


def test_a_status_without_a_name() -> None:
    failure = ProviderFailed()
    failure.status = 529
    assert replies.error_reply(failure, None, False).startswith(b"HTTP/1.1 529 Error\r\n")


def test_the_final_chunk_carries_the_provider_s_own_usage() -> None:
    usage = {**USAGE, "cost": 1.50, "completion_tokens_details": {"reasoning_tokens": 3}}
    _, scanner = whole(chunk("a") + usage_chunk(usage))
    event = replies.final_chunk(scanner, TOKENS, 12_345)
    assert data(event) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [],
        "usage": json.loads(json.dumps(usage), parse_float=Decimal),
        "credits_used": Decimal("0.012345"),
    }
    ChatCompletionChunk.model_validate_json(event[6:])


def test_without_usage_the_final_chunk_says_that_it_is_estimated() -> None:
    _, scanner = whole(chunk("a"))
    event = replies.final_chunk(scanner, TOKENS, 0)
    assert data(event)["usage"] == {**USAGE, "estimated": True}
    assert data(event)["credits_used"] == 0
    ChatCompletionChunk.model_validate_json(event[6:])


@pytest.mark.parametrize(
    "stream", [b"", chunk("a", id=None, created=None, model=None), chunk("a", id="", model="")]
)
def test_a_final_chunk_stands_without_what_the_provider_left_out(stream: bytes) -> None:
    _, scanner = whole(stream)
    found = ChatCompletionChunk.model_validate_json(replies.final_chunk(scanner, TOKENS, 1)[6:])
    assert found.id and found.choices == []


def test_ids_of_any_kind_are_given_back_as_they_came() -> None:
    _, scanner = whole(chunk("a", id={"x": ["é\n"]}, created=1.5, model=7))
    found = data(replies.final_chunk(scanner, TOKENS, 1))
    assert (found["id"], found["created"], found["model"]) == ({"x": ["é\n"]}, Decimal("1.5"), 7)


@pytest.mark.parametrize(
    ("charge", "text"),
    [(0, "0"), (1, "0.000001"), (1_000_000, "1"), (9_000_000_000_000_000, "9000000000")],
)
def test_credits_are_exact_wherever_they_stand(charge: int, text: str) -> None:
    scanner = StreamScanner(1000, True)
    assert f"x-credits-used: {text}\r\n".encode() in replies.plain_head(
        REQUEST_ID, 1, charge, b"m", b"", False
    )
    assert b'"credits_used":' + text.encode() + b"}" in replies.final_chunk(scanner, TOKENS, charge)
    assert replies.credits_comment(charge) == f": credits_used={text}\n\n".encode()


def test_an_error_event_says_all_at_once() -> None:
    """Clients read no further than an error: usage and credits must be in the same event."""
    _, scanner = whole(chunk("a") + usage_chunk())
    event = replies.error_event(scanner, TOKENS, 5, ProviderFailed('broke "off"\nhere'))
    found = data(event)
    assert found["error"] == {
        "message": 'broke "off"\nhere',
        "type": "api_error",
        "param": None,
        "code": "provider_error",
    }
    assert found["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    assert (found["usage"], found["credits_used"], found["id"]) == (
        USAGE,
        Decimal("0.000005"),
        "chatcmpl-1",
    )


def test_the_last_words() -> None:
    assert replies.DONE == b"data: [DONE]\n\n"
    assert replies.LAST_CHUNK == b"0\r\n\r\n"
    assert replies.CONTINUE == b"HTTP/1.1 100 Continue\r\n\r\n"
