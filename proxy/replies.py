"""[9] Answers and errors as the client's dialect expects them: bytes, built once.

Pure. Heads for plain and streamed answers, the final chunk with its credits, in-band errors.
"""

import http

import msgspec
from msgspec import Raw

from accounting.contract.errors import Failure
from accounting.contract.money import format_credits
from accounting.contract.usage_event import TokenUsage
from proxy.usage_scanner import StreamScanner

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FREE = " Nothing was charged."  # true of an error status, not of an error within a stream
_CLOSE = b"connection: close\r\n"
_REASONS = {status.value: status.phrase.encode() for status in http.HTTPStatus}


def plain_head(
    request_id: bytes, length: int, charge_ucr: int, served: bytes, extra: bytes, close: bool
) -> bytes:
    """The head of a plain JSON answer. `extra`: rate and fallback header lines."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"x-request-id: %b\r\nx-credits-used: %b\r\nx-model-used: %b\r\n%b%b\r\n"
        % (
            length,
            request_id,
            format_credits(charge_ucr).encode(),
            served,
            extra,
            _CLOSE if close else b"",
        )
    )


def stream_head(
    request_id: bytes, served: bytes, extra: bytes, chunked: bool, close: bool
) -> bytes:
    """The head of a streamed answer; without `chunked` (HTTP/1.0) it ends by closing."""
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
        b"x-accel-buffering: no\r\n%bx-request-id: %b\r\nx-model-used: %b\r\n%b%b\r\n"
        % (
            b"transfer-encoding: chunked\r\n" if chunked else b"",
            request_id,
            served,
            extra,
            _CLOSE if close else b"",
        )
    )


def error_reply(failure: Failure, request_id: str | None, close: bool, extra: bytes = b"") -> bytes:
    """A whole error answer in the OpenAI envelope."""
    body = failure.body(request_id)
    lines = b"".join(
        [f"{name}: {value}\r\n".encode("latin-1") for name, value in failure.headers()]
    )
    identity = f"x-request-id: {request_id}\r\n".encode() if request_id else b""
    return (
        b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b%b%b%b\r\n%b"
        % (
            failure.status,
            _REASONS.get(failure.status, b"Error"),
            len(body),
            identity,
            lines,
            extra,
            _CLOSE if close else b"",
            body,
        )
    )


def head_of(answer: bytes) -> bytes:
    """An answer without its body, as HEAD wants it."""
    return answer[: answer.index(b"\r\n\r\n") + 4]


def final_chunk(scanner: StreamScanner, tokens: TokenUsage, charge_ucr: int) -> bytes:
    """The last event before `[DONE]`: usage and what the answer cost, in credits."""
    return b"data: " + _encode(_closing(scanner, tokens, charge_ucr)) + b"\n\n"


def length_chunk(scanner: StreamScanner, choices: int) -> bytes:
    """Tells that every choice ended for its length."""
    event = _framed(scanner)
    event["choices"] = [
        {"index": index, "delta": {}, "finish_reason": "length"} for index in range(choices)
    ]
    return b"data: " + _encode(event) + b"\n\n"


def credits_comment(charge_ucr: int) -> bytes:
    """For clients that asked for no extra event: an SSE comment every parser skips."""
    return f": credits_used={format_credits(charge_ucr)}\n\n".encode()


def error_event(
    scanner: StreamScanner, tokens: TokenUsage, charge_ucr: int, failure: Failure
) -> bytes:
    """An in-band error that ends a stream, with usage and credits: clients read no further."""
    event = _closing(scanner, tokens, charge_ucr)
    event["error"] = {
        "message": failure.text.removesuffix(_FREE),
        "type": failure.type,
        "param": None,
        "code": failure.code,
    }
    event["choices"] = [{"index": 0, "delta": {}, "finish_reason": "error"}]
    return b"data: " + _encode(event) + b"\n\n"


def _closing(scanner: StreamScanner, tokens: TokenUsage, charge_ucr: int) -> dict[str, object]:
    return {
        **_framed(scanner),
        "usage": _usage(scanner, tokens),
        "credits_used": Raw(format_credits(charge_ucr).encode()),
    }


def _framed(scanner: StreamScanner) -> dict[str, object]:
    """Keeps the upstream's id, created and model, so that every client parses it."""
    head = scanner.chunk_head
    return {
        "id": (head.id if head else None) or "chatcmpl-tollgate",
        "object": "chat.completion.chunk",
        "created": (head.created if head else None) or 0,
        "model": (head.model if head else None) or "",
        "choices": [],
    }


def _usage(scanner: StreamScanner, tokens: TokenUsage) -> object:
    if scanner.usage_raw:
        return Raw(scanner.usage_raw)
    return {
        "prompt_tokens": tokens.input,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.input + tokens.output,
        "estimated": True,
    }
