"""[7] Usage as providers report it, in the shapes it is decoded to."""

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct

MAX_COUNT = (1 << 31) - 1  # what the ledger's columns hold


class ProviderUsage(Struct):
    """Usage as OpenAI-compatible providers report it; any field may hold anything."""

    prompt_tokens: Any = None
    completion_tokens: Any = None
    total_tokens: Any = None
    prompt_tokens_details: Any = None
    completion_tokens_details: Any = None
    prompt_cache_hit_tokens: Any = None


class AnyAnswer(Struct):
    """An answer whose usage may be anything."""

    usage: Raw = Raw()


_Tokens = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class InputParts(Struct, gc=False):
    """Parts of `prompt_tokens`."""

    cached_tokens: _Tokens | None = None
    cache_write_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class OutputParts(Struct, gc=False):
    """Parts of `completion_tokens`."""

    reasoning_tokens: _Tokens | None = None
    audio_tokens: _Tokens | None = None


class RegularUsage(Struct):
    """Usage in the shape nearly every provider keeps to: read six times as fast."""

    prompt_tokens: _Tokens
    completion_tokens: _Tokens
    total_tokens: _Tokens = 0
    prompt_tokens_details: InputParts | None = None
    completion_tokens_details: OutputParts | None = None
    prompt_cache_hit_tokens: _Tokens = 0


class RegularAnswer(Struct):
    """An answer with regular usage."""

    usage: RegularUsage
