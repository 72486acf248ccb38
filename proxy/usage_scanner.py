"""[7] What was used, read from answers as they pass; sans-IO.

`StreamScanner` lets whole events through as bytes and takes out only what the client is not
meant to see: the provider's usage chunk, `[DONE]`, an error. Constant work per block: three
searches, unless one of them hits. `read_answer` does the same for a plain JSON answer.
"""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from accounting.contract.usage_event import TokenUsage
from proxy.sse import EventSplitter, event_data, split_events

_BYTES_PER_TOKEN = 4
_MAX_COUNT = (1 << 31) - 1  # what the ledger's columns hold
_USAGE_VALUE = re.compile(rb'"usage"(?!\s*:\s*null)')
# `,"usage":null` cannot be part of a text: a quote in JSON text has a backslash before it.
_USAGE_NULL = re.compile(
    rb',[ \t]*"usage"[ \t]*:[ \t]*null|(?<!\\)"usage"[ \t]*:[ \t]*null[ \t]*,[ \t]*'
)
_EMPTY_LIST = re.compile(rb"\[\s*\]")
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')


class ProviderUsage(Struct):
    """Usage as OpenAI-compatible providers report it; any field may hold anything."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    total_tokens: Any = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    prompt_cache_hit_tokens: Any = None


class _Usage(Struct):
    usage: Raw = Raw()


class _Chunk(Struct):
    id: Any = None
    created: Any = None
    model: Any = None
    choices: Raw = Raw()
    usage: Raw = Raw()
    error: Raw = Raw()


class _Choice(Struct):
    delta: Raw = Raw()


class _Delta(Struct):
    content: Any = None


class _Error(Struct):
    message: str | None = None


_Tokens = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]


class _InputParts(Struct, gc=False):
    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _OutputParts(Struct, gc=False):
    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class _RegularUsage(Struct):
    """Usage in the shape nearly every provider keeps to: read six times as fast."""

    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    total_tokens: _Tokens = 0
    prompt_tokens_details: _InputParts | None = None
    completion_tokens_details: _OutputParts | None = None
    prompt_cache_hit_tokens: _Tokens = 0


class _RegularAnswer(Struct):
    usage: _RegularUsage


_regular_usages = msgspec.json.Decoder(_RegularUsage)
_regular_answers = msgspec.json.Decoder(_RegularAnswer)
_chunks = msgspec.json.Decoder(_Chunk)
_answers = msgspec.json.Decoder(_Usage)
_usages = msgspec.json.Decoder(ProviderUsage)
_choices = msgspec.json.Decoder(list[_Choice])
_deltas = msgspec.json.Decoder(_Delta)
_errors = msgspec.json.Decoder(_Error)
_fields = msgspec.json.Decoder(dict[str, Raw])
_NULL = Raw(b"null")
_NO_USAGE = (b"", b"null")
_NO_ERROR = (b"", b"null", b"false", b"0", b'""', b"{}", b"[]")  # what clients take for none


def token_usage(raw: bytes) -> TokenUsage | None:
    """The provider's usage object as token counts; None when it says nothing usable.

    Details never exceed what they are parts of. Some providers leave reasoning out of
    `completion_tokens` but not out of `total_tokens`: what the total adds is output.
    """
    try:
        return _regular(_regular_usages.decode(raw))
    except msgspec.ValidationError:
        return _irregular(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


_NO_INPUT_PARTS, _NO_OUTPUT_PARTS = _InputParts(), _OutputParts()


def _regular(usage: _RegularUsage) -> TokenUsage:
    prompt, output = usage.prompt_tokens, usage.completion_tokens
    if usage.total_tokens > prompt + output:
        output = usage.total_tokens - prompt
    inputs = usage.prompt_tokens_details or _NO_INPUT_PARTS
    outputs = usage.completion_tokens_details or _NO_OUTPUT_PARTS
    cached = min(inputs.cached_tokens or usage.prompt_cache_hit_tokens, prompt)
    written = min(inputs.cache_write_tokens or 0, prompt - cached)
    return TokenUsage(
        prompt,
        output,
        cached,
        written,
        min(outputs.reasoning_tokens or 0, output),
        min(inputs.audio_tokens or 0, prompt - cached - written),
        min(outputs.audio_tokens or 0, output),
    )


def _irregular(raw: bytes) -> TokenUsage | None:
    """Any field may hold anything; what is no number counts as absent."""
    try:
        usage = _usages.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    prompt, output = _count(usage.prompt_tokens), _count(usage.completion_tokens)
    if prompt is None and output is None:
        return None
    total = _count(usage.total_tokens) or 0
    prompt = max(0, total - (output or 0)) if prompt is None else prompt
    output = max(output or 0, total - prompt)
    inputs, outputs = usage.prompt_tokens_details, usage.completion_tokens_details
    cached = min(
        _part(inputs, "cached_tokens") or _count(usage.prompt_cache_hit_tokens) or 0, prompt
    )
    written = min(_part(inputs, "cache_write_tokens"), prompt - cached)
    return TokenUsage(
        input=prompt,
        output=output,
        cached_input=cached,
        cache_write=written,
        reasoning=min(_part(outputs, "reasoning_tokens"), output),
        audio_input=min(_part(inputs, "audio_tokens"), prompt - cached - written),
        audio_output=min(_part(outputs, "audio_tokens"), output),
    )


def _count(number: Any) -> int | None:
    """A count within bounds; None for what is no number."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    return int(min(max(number, 0), _MAX_COUNT))


def _part(details: Any, name: str) -> int:
    return (_count(details.get(name)) or 0) if isinstance(details, dict) else 0


def estimate_input(request_bytes: int) -> int:
    """Input tokens where the provider gave no figure: four bytes to a token, rounded up."""
    return -(-request_bytes // _BYTES_PER_TOKEN)


def estimate_output(relayed_bytes: int, events: int, envelope: int) -> int:
    """Output tokens of a stream that gave no figure, from what was relayed of it.

    Each event after the first counts one token at least; beyond the envelope of a chunk
    (its length without content) four bytes count as one.
    """
    content = relayed_bytes - events * envelope
    return max(events - 1, -(-max(0, content) // _BYTES_PER_TOKEN), 0)


def read_answer(body: bytes) -> tuple[TokenUsage | None, bool]:
    """Usage of a plain JSON answer, and whether the body is a JSON object at all."""
    try:
        return _regular(_regular_answers.decode(body).usage), True
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _read_irregular_answer(body)


def _read_irregular_answer(body: bytes) -> tuple[TokenUsage | None, bool]:
    try:
        found = _answers.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, False
    return token_usage(bytes(found.usage)), True


class StreamScanner:
    """One streamed answer on its way through.

    `strip_nulls`: the client did not ask for usage, so `"usage":null` is taken out too.
    After each `pass_on`: `usage`/`usage_raw` as last seen, `done` at `[DONE]`, `failed` with
    the provider's message at an error event, `chunk_head` once a chunk has passed. What comes
    after `done` or `failed` is not for the client; no more needs to be passed on.
    """

    __slots__ = (
        "_closed", "_last", "_splitter", "_strip_nulls", "_twice", "_unread",
        "chunk_head", "done", "envelope", "events", "failed", "relayed_bytes", "usage", "usage_raw",
    )  # fmt: skip

    def __init__(self, event_limit: int, strip_nulls: bool) -> None:
        self._splitter = EventSplitter(event_limit)
        self._strip_nulls = strip_nulls
        self.envelope = 0
        self._twice = 0
        self._unread = 0  # bytes of the first chunk that say who speaks, not what
        self._last = b""
        self._closed = False  # the usage chunk that ends an answer has passed
        self.events = 0
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
        if self._strip_nulls:
            block = block.replace(b',"usage":null', b"")
        in_question = b"[DONE]" in block or b'"error"' in block
        if b'"usage"' in block:
            in_question = in_question or _USAGE_VALUE.search(block) is not None
            if self._strip_nulls and not in_question:
                in_question = b'"choices":[]' in block
                block = block if in_question else _without_nulls(block)
        if in_question:
            block = b"".join([self._keep(event) for event in split_events(block)])
            if not block:
                return block
        if not self.envelope:
            self._read_first(block)
        self.events += 1 if len(block) < self._twice else max(1, block.count(b"data:"))
        self.relayed_bytes += len(block)
        if not block.startswith(b":"):
            self._last = block
        return block

    def finish(self) -> bytes:
        """At a clean end: the last event, should it be whole but for its blank line."""
        rest = self._splitter.rest().strip(b"\r\n")
        data = event_data(rest)
        if data is None or not (data.startswith(b"[DONE]") or _decode(data)):
            return b""
        return self.pass_on(rest + b"\n\n")

    @property
    def finished(self) -> bool:
        """The answer came to its end: `[DONE]`, its usage chunk or a finish reason was seen."""
        return self.done or self._closed or bool(_FINISHED.search(self._last))

    def estimate_output(self) -> int:
        """Output tokens so far, from what was relayed."""
        return estimate_output(self.counted_bytes, self.events, self.envelope)

    @property
    def counted_bytes(self) -> int:
        """Relayed bytes as far as they can be content."""
        return self.relayed_bytes - self._unread

    def _read_first(self, block: bytes) -> None:
        """The first chunk with a choice tells what all have in common."""
        for event in split_events(block):
            chunk = _decode(event_data(event))
            if chunk is not None and _has_choices(chunk):
                self.chunk_head = chunk
                self.envelope, content = _without_content(event, bytes(chunk.choices))
                self._unread = 0 if content else len(event) - self.envelope
                self._twice = 2 * self.envelope
                return

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
        if bytes(chunk.error) not in _NO_ERROR:
            self.failed = _error_text(bytes(chunk.error))
            self._read_usage(event)
            return b""
        if bytes(chunk.usage) in _NO_USAGE:
            return self._keep_without_usage(event, chunk)
        self._note_usage(bytes(chunk.usage))
        if _has_choices(chunk):
            return _without_usage(data, self._strip_nulls)
        self._closed = True
        if self.chunk_head is None:
            self.chunk_head = chunk
        return b""

    def _keep_without_usage(self, event: bytes, chunk: _Chunk) -> bytes:
        """A usage chunk that says null is as little for the client as one with figures."""
        if not self._strip_nulls or not bytes(chunk.usage):
            return event
        return _without_nulls(event) if _has_choices(chunk) else b""

    def _read_usage(self, event: bytes) -> None:
        chunk = _decode(event_data(event))
        if chunk is not None:
            self._note_usage(bytes(chunk.usage))

    def _note_usage(self, raw: bytes) -> None:
        usage = token_usage(raw)
        if usage is not None:
            self.usage = usage
            self.usage_raw = raw.replace(b"\n", b" ").replace(b"\r", b" ")


def _without_content(event: bytes, choices: bytes) -> tuple[int, bool]:
    """Bytes of a chunk like this one, were its content empty; and whether this one's is not."""
    try:
        delta = bytes(_choices.decode(choices)[0].delta)
        content = bool(_deltas.decode(delta).content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, IndexError):
        return len(event), False
    return len(event) - len(delta) + len(b'{"content":""}'), content


def _without_nulls(block: bytes) -> bytes:
    """Without `"usage":null`, which a client that asked for no usage does not expect."""
    block = block.replace(b',"usage":null', b"")
    return _USAGE_NULL.sub(b"", block) if b'"usage"' in block else block


def _has_choices(chunk: _Chunk) -> bool:
    choices = bytes(chunk.choices)
    return choices not in (b"", b"null") and not _EMPTY_LIST.fullmatch(choices)


def _decode(data: bytes | None) -> _Chunk | None:
    if not data:
        return None
    try:
        return _chunks.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _without_usage(data: bytes, drop: bool) -> bytes:
    """A content chunk that carries usage as well: the same chunk, with `usage` null or gone."""
    fields = _fields.decode(data.replace(b"\n", b" "))  # in JSON a line's end is but space
    if drop:
        del fields["usage"]
    else:
        fields["usage"] = _NULL
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def _error_text(raw: bytes) -> str:
    try:
        return _errors.decode(raw).message or "unknown error"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return raw.decode("utf-8", "replace")
