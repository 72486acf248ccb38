"""[7] What providers say was used, as token counts; what is assumed when they say nothing.

Sans-IO and without state: usage objects in any shape, plain JSON answers, estimates.
"""

from typing import Any

import msgspec

from accounting.contract.usage_event import TokenUsage
from proxy.usage_shapes import (
    MAX_COUNT,
    AnyAnswer,
    InputParts,
    OutputParts,
    ProviderUsage,
    RegularAnswer,
    RegularUsage,
)

_BYTES_PER_TOKEN = 4

_regular_usages = msgspec.json.Decoder(RegularUsage)
_regular_answers = msgspec.json.Decoder(RegularAnswer)
_answers = msgspec.json.Decoder(AnyAnswer)
_usages = msgspec.json.Decoder(ProviderUsage)


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


_NO_INPUT_PARTS, _NO_OUTPUT_PARTS = InputParts(), OutputParts()


def _regular(usage: RegularUsage) -> TokenUsage:
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
    return int(min(max(number, 0), MAX_COUNT))


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


def is_beyond(tokens: int, relayed_bytes: int, events: int, envelope: int) -> bool:
    """Whether certainly more output than that was relayed.

    By both measures of the estimate: some providers send a letter in an event, others a
    kilobyte beside each token.
    """
    content = relayed_bytes - events * envelope
    return events - 1 > tokens and content > tokens * _BYTES_PER_TOKEN


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
