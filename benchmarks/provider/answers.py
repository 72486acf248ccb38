"""What the stand-in provider says: the JSON of answers, stream chunks, usage and errors.

Pure functions from what was asked and the script to bytes. Leaves the order and timing
of events to `steps` and HTTP to `steps` and `connection`. One token is four bytes of
UTF-8 content, always, so that a test can predict every count.
"""

from __future__ import annotations

import base64
import itertools
import re
import struct
from functools import lru_cache
from typing import Literal, NamedTuple

import msgspec

from benchmarks.provider.framing import STAMP_PLACE
from benchmarks.provider.script import Script

BYTES_PER_TOKEN = 4
DEFAULT_TEXT = (
    "Hello from the sandbox provider! This answer was made on your own machine: no real "
    "provider was asked, and yet it was limited, held, priced and recorded like a real one."
)
MULTIBYTE_TEXT = "Grüße aus der Sandbox, 世界 — ça va? 🌍🚀 "
JUNK_ID = 'x"\\\n\u0000\u2028 }]}, data: [DONE] 🦄 ' + "j" * 300
CONSTANT_ID = "chatcmpl-constant"
OVERSIZED_LINE_BYTES = 1024 * 1024
EMBEDDING_DIMENSIONS = 8

ERROR_KINDS = {
    400: ("invalid_request_error", "bad_request", "The request is not valid."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "forbidden", "You may not use this resource."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached for requests."),
    500: ("server_error", "server_error", "The server had an error."),
    503: ("server_error", "overloaded", "The engine is currently overloaded."),
}

Kind = Literal["chat", "completion", "embedding"]


class Ask(NamedTuple):
    """One parsed request: what the answer depends on. Tokens are counts."""

    kind: Kind
    model: str
    script: Script
    stream: bool
    include_usage: bool
    ceiling: int | None
    prompt_tokens: int
    created: int
    inputs: int = 1
    dimensions: int = EMBEDDING_DIMENSIONS
    base64: bool = False


class Content(NamedTuple):
    """The text of an answer, in the pieces a stream sends, and what it counts as."""

    pieces: tuple[str, ...]
    completion_tokens: int
    finish_reason: str


def tokens_in(size_bytes: int) -> int:
    """Tokens that `size_bytes` bytes of UTF-8 count as."""
    return -(-size_bytes // BYTES_PER_TOKEN)


def text_of(size_bytes: int, source: str) -> str:
    """Exactly `size_bytes` bytes of UTF-8 made by repeating `source`."""
    raw = source.encode()
    cut = (raw * (size_bytes // len(raw) + 1))[:size_bytes].decode(errors="ignore")
    return cut + "." * (size_bytes - len(cut.encode()))


def whole_pieces(script: Script, stream: bool) -> list[str]:
    """The pieces a provider with no ceiling would answer."""
    source = MULTIBYTE_TEXT if script.split_utf8 else DEFAULT_TEXT
    if not stream:
        return [source if script.answer_bytes is None else text_of(script.answer_bytes, source)]
    words = re.findall(r"\S+\s*", source)
    if script.stamp:
        padding = "." * max(0, (script.chunk_bytes or 0) - len(STAMP_PLACE))
        return [STAMP_PLACE + padding] * (len(words) if script.chunks is None else script.chunks)
    if script.chunk_bytes is not None:
        count = len(words) if script.chunks is None else script.chunks
        return [text_of(script.chunk_bytes, source)] * count
    if script.chunks is not None:
        return list(itertools.islice(itertools.cycle(words), script.chunks))
    return words


@lru_cache(maxsize=1024)
def content_for(script: Script, stream: bool, ceiling: int | None) -> Content:
    """The content of an answer, cut at `ceiling` completion tokens if one was asked for."""
    pieces = whole_pieces(script, stream)
    size = sum(len(piece.encode()) for piece in pieces)
    limit = ceiling if script.obey_max else None
    finish_reason = "stop"
    if limit is not None and tokens_in(size) + script.reasoning_tokens > limit:
        pieces = cut_pieces(pieces, max(0, limit - script.reasoning_tokens) * BYTES_PER_TOKEN)
        size = sum(len(piece.encode()) for piece in pieces)
        finish_reason = "length"
    tokens = script.completion_tokens
    if tokens is None:
        tokens = tokens_in(size) + script.reasoning_tokens
    if limit is not None:
        tokens = min(tokens, limit)
    return Content(tuple(pieces), tokens, script.finish_reason or finish_reason)


def cut_pieces(pieces: list[str], size_bytes: int) -> list[str]:
    """The first `size_bytes` bytes of `pieces`, never half a character."""
    kept: list[str] = []
    for piece in pieces:
        raw = piece.encode()
        if len(raw) >= size_bytes:
            last = raw[:size_bytes].decode(errors="ignore")
            return [*kept, last] if last else kept
        kept.append(piece)
        size_bytes -= len(raw)
    return kept


def usage_object(ask: Ask, completion_tokens: int) -> dict[str, object]:
    """OpenAI's usage object for this answer, counting `completion_tokens`."""
    script = ask.script
    zero = script.usage == "zero"
    prompt = 0 if zero else ask.prompt_tokens
    completion = 0 if zero else completion_tokens
    usage: dict[str, object] = {"prompt_tokens": prompt}
    if ask.kind == "embedding":
        return usage | {"total_tokens": prompt}
    return usage | {
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": 0 if zero else script.cached_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0 if zero else script.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def identity(script: Script, unique: str) -> dict[str, object]:
    """The `id` member of an answer, in the scripted shape."""
    shapes: dict[str, dict[str, object]] = {
        "normal": {"id": unique},
        "null": {"id": None},
        "constant": {"id": CONSTANT_ID},
        "missing": {},
        "junk": {"id": JUNK_ID},
    }
    return shapes[script.id]


def plain_answer(ask: Ask, unique: str) -> bytes:
    """The whole JSON body of an answer that is not streamed."""
    content = content_for(ask.script, False, ask.ceiling)
    if ask.kind == "embedding":
        body: dict[str, object] = {"object": "list", "data": embeddings(ask), "model": ask.model}
    else:
        body = identity(ask.script, unique) | {
            "object": "chat.completion" if ask.kind == "chat" else "text_completion",
            "created": ask.created,
            "model": ask.model,
            "choices": [plain_choice(ask, content)],
        }
    if ask.script.usage == "null":
        body["usage"] = None
    elif ask.script.usage != "missing":
        body["usage"] = usage_object(ask, content.completion_tokens)
    if ask.kind != "embedding":
        body["system_fingerprint"] = "fp_standin"
    return msgspec.json.encode(body)


def plain_choice(ask: Ask, content: Content) -> dict[str, object]:
    """The one choice of a plain answer."""
    text = "".join(content.pieces)
    said: dict[str, object]
    if ask.kind == "chat":
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
    else:
        said = {"text": text}
    return {"index": 0} | said | {"logprobs": None, "finish_reason": content.finish_reason}


def embeddings(ask: Ask) -> list[dict[str, object]]:
    """One embedding per input, as floats or as base64 of little-endian 32-bit floats."""
    floats = [round(0.5 - step / (2 * ask.dimensions), 6) for step in range(ask.dimensions)]
    vector: object = floats
    if ask.base64:
        vector = base64.b64encode(struct.pack(f"<{len(floats)}f", *floats)).decode()
    return [
        {"object": "embedding", "index": index, "embedding": vector} for index in range(ask.inputs)
    ]


class ChunkWriter:
    """Writes the JSON of a stream's chunks; what all of them share is encoded once."""

    def __init__(self, ask: Ask, unique: str) -> None:
        self.ask = ask
        self.content = content_for(ask.script, True, ask.ceiling)
        shared = identity(ask.script, unique) | {
            "object": "chat.completion.chunk" if ask.kind == "chat" else "text_completion",
            "created": ask.created,
            "model": ask.model,
        }
        self.opening = msgspec.json.encode(shared)[:-1] + b',"choices":'
        self.closing = b',"usage":null}' if ask.include_usage else b"}"

    def role(self) -> bytes:
        """The first chunk of a chat stream."""
        return self.chunk({"delta": {"role": "assistant", "content": "", "refusal": None}})

    def piece(self, text: str, tokens_so_far: int) -> bytes:
        """One content chunk; `tokens_so_far` is reported only with `usage=every_chunk`."""
        usage = tokens_so_far if self.ask.script.usage == "every_chunk" else None
        if self.ask.kind == "chat":
            return self.chunk({"delta": {"content": text}}, usage=usage)
        return self.chunk({"text": text}, usage=usage)

    def finish(self) -> bytes:
        """The chunk that says why the answer ended."""
        carries = self.ask.script.usage in ("in_last_content_chunk", "every_chunk")
        usage = self.content.completion_tokens if carries else None
        said: dict[str, object] = {"delta": {}} if self.ask.kind == "chat" else {"text": ""}
        return self.chunk(said, self.content.finish_reason, usage)

    def chunk(
        self, said: dict[str, object], finish_reason: str | None = None, usage: int | None = None
    ) -> bytes:
        """A chunk with one choice, and a usage of `usage` completion tokens if given."""
        choice = {"index": 0} | said | {"finish_reason": finish_reason}
        closing = self.closing if usage is None else self._usage_closing(usage)
        return self.opening + msgspec.json.encode([choice]) + closing

    def usage(self) -> bytes:
        """The usage chunk: no choices, and the counts (or null, when scripted so)."""
        if self.ask.script.usage == "null":
            return self.opening + b'[],"usage":null}'
        return self.opening + b"[]" + self._usage_closing(self.content.completion_tokens)

    def sends_usage(self) -> bool:
        """Whether the stream has a usage chunk of its own before or after `[DONE]`."""
        shape = self.ask.script.usage
        if shape == "as_asked":
            return self.ask.include_usage
        return shape not in ("missing", "in_last_content_chunk")

    def _usage_closing(self, completion_tokens: int) -> bytes:
        usage = msgspec.json.encode(usage_object(self.ask, completion_tokens))
        return b',"usage":' + usage + b"}"


def error_body(status: int, message: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error envelope for an HTTP status."""
    nearest = status if status in ERROR_KINDS else (500 if status >= 500 else 400)
    kind, default_code, default_message = ERROR_KINDS[nearest]
    error = {
        "message": message or default_message,
        "type": kind,
        "param": None,
        "code": code or default_code,
    }
    return msgspec.json.encode({"error": error})


def model_list(models: tuple[str, ...], created: int) -> bytes:
    """The body of `GET /v1/models`."""
    data = [
        {"id": model, "object": "model", "created": created, "owned_by": "standin"}
        for model in models
    ]
    return msgspec.json.encode({"object": "list", "data": data})
