"""[2] What a chat completion asks for, as far as a gateway must know; sans-IO.

Reads model, stream flag and output ceiling; bounds what the request can use; edits the body
as little as needed: the model's name at the provider, and a wish for usage in streams.
Messages pass through as the bytes they came in.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from accounting.contract.errors import (
    InvalidJson,
    InvalidRequest,
    MissingParameter,
    UnboundedCost,
)

_Count = Annotated[int, Meta(ge=1, le=100_000_000)]
_Choices = Annotated[int, Meta(ge=1, le=128)]
_MEDIA = (b'"image_url"', b'"input_audio"', b'"file"', b'"video_url"', b"\\u00")
_TEMPLATE_ALLOWANCE = 32  # tokens
_TOOLS_ALLOWANCE = 1024
_PARAM = re.compile(r"at `\$\.?([^`]*)`")


class StreamOptions(Struct):
    include_usage: bool | None = None


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
    web_search_options: Raw = Raw()

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_audio(self) -> bool:
        return self.modalities is not None and "audio" in self.modalities


_heads = msgspec.json.Decoder(ChatHead)
_fields = msgspec.json.Decoder(dict[str, Raw])
_any = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode
_WITH_USAGE = Raw(b'{"include_usage":true}')


def parse(body: bytes) -> ChatHead:
    """Read a chat completion's head. Raises InvalidJson, MissingParameter, InvalidRequest."""
    try:
        head = _heads.decode(body)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson() from None
    if bytes(head.messages)[:1] != b"[":
        raise InvalidRequest("`messages` must be a list.", param="messages")
    if bytes(head.web_search_options) not in (b"", b"null"):
        raise UnboundedCost("Searches have no price here.", param="web_search_options")
    if head.service_tier not in (None, "auto", "default", "flex"):
        raise UnboundedCost("Only the default service tier is priced.", param="service_tier")
    return head


def _explained(text: str) -> InvalidRequest:
    if "missing required field" in text:
        name = text.split("`")[1]
        return MissingParameter(f"`{name}` is required.", param=name)
    found = _PARAM.search(text)
    param = found.group(1) if found and found.group(1) else None
    return InvalidRequest(f"{text}.", param=param)


def input_bound(body: bytes, context_tokens: int) -> int:
    """The most tokens the input can be: a token is at least a byte of text.

    What is not text (images, audio, files) is bounded by the model's context alone. What
    providers add unseen (chat templates, instructions for tools) gets an allowance.
    """
    bound = len(body) + (_TOOLS_ALLOWANCE if b'"tools"' in body else _TEMPLATE_ALLOWANCE)
    if bound >= context_tokens or has_media(body):
        return context_tokens
    return bound


def has_media(body: bytes) -> bool:
    """Whether a message may carry more than text. Escaped ASCII is looked at decoded."""
    for mark in _MEDIA:
        if mark in body:
            return mark != _MEDIA[-1] or _hides_media(body)
    return False


def _hides_media(body: bytes) -> bool:
    plain = _encode(_any.decode(body))
    return any(mark in plain for mark in _MEDIA[:-1])


def output_bound(head: ChatHead, model_max: int) -> int:
    """The most tokens all choices together can be: the request's ceiling, else the model's."""
    asked = max(head.max_tokens or 0, head.max_completion_tokens or 0)
    ceiling = min(asked, model_max) if asked else model_max
    return ceiling * (head.n or 1)


def body_for(body: bytes, head: ChatHead, model: str) -> bytes:
    """The body for a target that calls the model `model`; each key once, as it was read."""
    fields = _fields.decode(body)
    if model != head.model:
        fields["model"] = Raw(_encode(model))
    if head.stream and not head.wants_usage:
        options = fields.get("stream_options")
        fields["stream_options"] = _with_usage(bytes(options) if options is not None else b"null")
    return _encode(fields)


def _with_usage(options: bytes) -> Raw:
    if options == b"null":
        return _WITH_USAGE
    found = _fields.decode(options)
    found["include_usage"] = Raw(b"true")
    return Raw(_encode(found))
