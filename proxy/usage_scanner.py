"""[7] What was used, read from answers as they pass; sans-IO.

`StreamScanner` lets whole events through as bytes and takes out only what the client is not
meant to see: the provider's usage chunk, `[DONE]`, an error. Constant work per block: three
searches, unless one of them hits. `read_answer` does the same for a plain JSON answer.
"""

import re
from typing import Any

import msgspec
from msgspec import Raw, Struct

from accounting.contract.usage_event import TokenUsage
from proxy.sse import EventSplitter, event_data, split_events

_BYTES_PER_TOKEN = 4
_MAX_COUNT = 1 << 40
_USAGE_VALUE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')


class InputDetails(Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None


class OutputDetails(Struct):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class ProviderUsage(Struct):
    """Usage as OpenAI-compatible providers report it."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    prompt_cache_hit_tokens: int | None = None


class _Usage(Struct):
    usage: Raw = Raw()


class _Chunk(Struct):
    id: Any = None
    created: Any = None
    model: Any = None
    choices: list[Raw] | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class _Error(Struct):
    message: str | None = None
    code: object = None


_chunks = msgspec.json.Decoder(_Chunk)
_answers = msgspec.json.Decoder(_Usage)
_usages = msgspec.json.Decoder(ProviderUsage)
_errors = msgspec.json.Decoder(_Error)


def token_usage(raw: bytes) -> TokenUsage | None:
    """The provider's usage object as token counts; None when it says nothing usable.

    Details never exceed what they are parts of. Some providers leave reasoning out of
    `completion_tokens` but not out of `total_tokens`: what the total adds is output.
    """
    try:
        usage = _usages.decode(raw)
    except msgspec.MsgspecError:
        return None
    if usage.prompt_tokens is None and usage.completion_tokens is None:
        return None
    prompt, output = _count(usage.prompt_tokens), _count(usage.completion_tokens)
    output = max(output, _count(usage.total_tokens) - prompt)
    inputs = usage.prompt_tokens_details or InputDetails()
    outputs = usage.completion_tokens_details or OutputDetails()
    cached = min(_count(inputs.cached_tokens) or _count(usage.prompt_cache_hit_tokens), prompt)
    written = min(_count(inputs.cache_write_tokens), prompt - cached)
    return TokenUsage(
        input=prompt,
        output=output,
        cached_input=cached,
        cache_write=written,
        reasoning=min(_count(outputs.reasoning_tokens), output),
        audio_input=min(_count(inputs.audio_tokens), prompt - cached - written),
        audio_output=min(_count(outputs.audio_tokens), output),
    )


def _count(number: int | None) -> int:
    return 0 if number is None else min(max(number, 0), _MAX_COUNT)


def estimate_input(request_bytes: int) -> int:
    """Input tokens where the provider gave no figure: four bytes to a token, rounded up."""
    return -(-request_bytes // _BYTES_PER_TOKEN)


def estimate_output(relayed_bytes: int, blocks: int, first_length: int) -> int:
    """Output tokens of a stream that gave no figure, from what was relayed of it.

    Each block after the first counts one token at least; beyond the envelope of a chunk
    (the length of the first, which has no content) four bytes count as one.
    """
    content = relayed_bytes - blocks * first_length
    return max(blocks - 1, -(-max(0, content) // _BYTES_PER_TOKEN), 0)


def read_answer(body: bytes) -> tuple[TokenUsage | None, bool]:
    """Usage of a plain JSON answer, and whether the body is a JSON object at all."""
    try:
        found = _answers.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, False
    return (token_usage(bytes(found.usage)) if _present(found.usage) else None), True


class StreamScanner:
    """One streamed answer on its way through.

    `strip_nulls`: the client did not ask for usage, so `"usage":null` is taken out too.
    After each `pass_on`: `usage`/`usage_raw` as last seen, `done` at `[DONE]`, `failed` with
    the provider's message at an error event, `envelope` once the first chunk has passed.
    """

    __slots__ = (
        "_last", "_splitter", "_strip_nulls", "blocks", "chunk_head", "done", "failed",
        "first_length", "relayed_bytes", "usage", "usage_raw",
    )  # fmt: skip

    def __init__(self, event_limit: int, strip_nulls: bool) -> None:
        self._splitter = EventSplitter(event_limit)
        self._strip_nulls = strip_nulls
        self.first_length = 0
        self._last = b""
        self.blocks = 0
        self.relayed_bytes = 0
        self.chunk_head: _Chunk | None = None
        self.usage: TokenUsage | None = None
        self.usage_raw = b""
        self.done = False
        self.failed: str | None = None

    def pass_on(self, data: bytes) -> bytes:
        """Bytes for the client out of bytes from the provider. Raises EventTooLong."""
        block = self._splitter.whole_events(data)
        if not block:
            return block
        if b'"usage"' in block:
            if self._strip_nulls:
                block = block.replace(b',"usage":null', b"")
            if _USAGE_VALUE.search(block):
                block = self._take_out(block)
        elif b"[DONE]" in block or b'"error"' in block:
            block = self._take_out(block)
        if b"[DONE]" in block or b'"error"' in block:
            block = self._take_out(block)
        if not block:
            return block
        if self.chunk_head is None:
            self._read_first(block)
        self.blocks += 1
        self.relayed_bytes += len(block)
        self._last = block
        return block

    @property
    def finished(self) -> bool:
        """The answer came to its end: usage, `[DONE]` or a finish reason was seen."""
        return self.done or self.usage is not None or bool(_FINISHED.search(self._last))

    def estimate_output(self) -> int:
        """Output tokens so far, from what was relayed."""
        return estimate_output(self.relayed_bytes, self.blocks, self.first_length)

    def _read_first(self, block: bytes) -> None:
        first = split_events(block)[0]
        chunk = _decode(event_data(first))
        if chunk is not None and chunk.choices is not None:
            self.chunk_head = chunk
            self.first_length = len(first)

    def _take_out(self, block: bytes) -> bytes:
        return b"".join([self._keep(event) for event in split_events(block)])

    def _keep(self, event: bytes) -> bytes:
        """The event as the client gets it; empty when it is not for the client."""
        if self.done or self.failed is not None:
            self._read_usage(event)
            return b""
        data = event_data(event)
        if data is None:
            return event
        if data.startswith(b"[DONE]"):
            self.done = True
            return b""
        chunk = _decode(data)
        if chunk is None:
            return event
        if _present(chunk.error):
            self.failed = _error_text(bytes(chunk.error))
            self._read_usage(event)
            return b""
        if not _present(chunk.usage):
            return event
        self._note_usage(bytes(chunk.usage))
        if self.chunk_head is None:
            self.chunk_head = chunk
        return _without_usage(event) if chunk.choices else b""

    def _read_usage(self, event: bytes) -> None:
        chunk = _decode(event_data(event))
        if chunk is not None and _present(chunk.usage):
            self._note_usage(bytes(chunk.usage))

    def _note_usage(self, raw: bytes) -> None:
        usage = token_usage(raw)
        if usage is not None:
            self.usage = usage
            self.usage_raw = raw.replace(b"\n", b" ").replace(b"\r", b" ")


def _present(raw: Raw) -> bool:
    return bytes(raw) not in (b"null", b"", b"false", b"{}")


def _decode(data: bytes | None) -> _Chunk | None:
    if not data:
        return None
    try:
        return _chunks.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _without_usage(event: bytes) -> bytes:
    """A content chunk that carries usage as well: the same chunk with `usage` null."""
    data = event_data(event) or b""
    fields: dict[str, Raw] = msgspec.json.decode(data, type=dict[str, Raw])
    fields["usage"] = Raw(b"null")
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def _error_text(raw: bytes) -> str:
    try:
        return _errors.decode(raw).message or "unknown error"
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return raw.decode("utf-8", "replace")[:500]
