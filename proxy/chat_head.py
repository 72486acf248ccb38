"""[2] The fields of a chat completion that a gateway must know, as they are decoded."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

_Count = Annotated[int, Meta(ge=1, le=100_000_000)]
_Choices = Annotated[int, Meta(ge=1, le=128)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class Tool(Struct):
    type: str | None = None


class ChatHead(Struct):
    """The fields that decide routing, holds and the form of the answer."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Raw
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    n: _Choices | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    tools: list[Tool] | None = None
    # The whole body, each key once; set by `parse`, whatever a body may say under this name.
    fields: Any = msgspec.field(name="", default=None)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_audio(self) -> bool:
        return self.modalities is not None and "audio" in self.modalities
