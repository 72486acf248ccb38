"""[2] What a chat completion asks for, as far as a gateway must know; sans-IO.

Reads model, stream flag and output ceiling; bounds what the request can use; edits the body
as little as needed: the model's name at the provider, and a wish for usage in streams.
Messages pass through as the bytes they came in.
"""

import re
from collections.abc import Iterable

import msgspec
from msgspec import Raw

from accounting.contract.errors import (
    InvalidJson,
    InvalidRequest,
    MissingParameter,
    UnboundedCost,
    UnknownParameter,
)
from proxy.chat_head import ChatHead

# One search each: a search of 1 kB costs about 0.4 µs, whatever it looks for.
_MEDIA = re.compile(
    rb'"(?:image_url|input_audio|file|video(?:_url)?|cached_content|audio"\s*:\s*\{[^{}]*"id)"'
)
_AUDIO = re.compile(rb'"input_audio"')
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
_LARGE = 16_384  # bytes; a larger body is looked through once or less, see `_is_named`
_BYTES_PER_HOP = 4096  # beyond more quotes than this a search is faster than hops
_TEMPLATE_ALLOWANCE = 32  # tokens
_TOOLS_ALLOWANCE = 1024
_PARAM = re.compile(r"at `\$\.?([^`]*)`")
_UNPRICED = frozenset(
    {"web_search_options", "search_parameters", "enable_search", "plugins", "best_of"}
)
_OFF = (b"null", b"false")

_heads = msgspec.json.Decoder(ChatHead)
_fields = msgspec.json.Decoder(dict[str, Raw])
_any = msgspec.json.Decoder()
_encode = msgspec.json.Encoder().encode
_WITH_USAGE = Raw(b'{"include_usage":true}')
_HEAD_FIELDS = frozenset(ChatHead.__struct_encode_fields__[:-1])
_KNOWN = _UNPRICED | _HEAD_FIELDS
_NO_MESSAGES = Raw(b"[]")


def parse(body: bytes) -> ChatHead:
    """Read a chat completion's head; nothing of the body needs to be decoded afterwards.

    Raises InvalidJson, MissingParameter, UnknownParameter, UnboundedCost, InvalidRequest.
    """
    try:
        if not body.isascii():
            body.decode()
        if len(body) < _LARGE:
            head = _heads.decode(body)
            fields = _fields.decode(body)
        else:
            fields = _fields.decode(body)
            head = _head_of(fields)
        head.fields = fields
        if head.stream:
            fields["stream_options"] = _with_usage(fields.get("stream_options"))
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson() from None
    if bytes(memoryview(head.messages)[:1]) != b"[":
        raise InvalidRequest("`messages` must be a list.", param="messages")
    _refuse_unbounded(head)
    return head


def _head_of(fields: dict[str, Raw]) -> ChatHead:
    """The head of a large body, read from what is not its messages: 1 MB is parsed once."""
    small = {name: fields[name] for name in _HEAD_FIELDS if name in fields}
    messages = small.get("messages")
    if messages is not None:
        small["messages"] = _NO_MESSAGES
    head = _heads.decode(_encode(small))
    if messages is not None:
        head.messages = messages
    return head


def _refuse_unbounded(head: ChatHead) -> None:
    """What has no price here; and names that some parsers read as ours, whatever their case."""
    fields = head.fields
    names = "".join(fields)
    if not (names.islower() and names.isascii()):
        _refuse_look_alikes(fields)
    if not _UNPRICED.isdisjoint(fields):
        for name in sorted(_UNPRICED.intersection(fields)):
            if bytes(fields[name]) not in _OFF:
                raise UnboundedCost(f"`{name}` has no price here.", param=name)
    if head.service_tier not in (None, "auto", "default", "flex"):
        raise UnboundedCost("Only the default service tier is priced.", param="service_tier")
    for tool in head.tools or ():
        if tool.type not in (None, "function", "custom"):
            raise UnboundedCost("Only tools of the caller's own are priced.", param="tools")


def _refuse_look_alikes(names: Iterable[str]) -> None:
    for name in names:
        if name not in _KNOWN and name.casefold() in _KNOWN:
            raise UnknownParameter(f"`{name[:100]}` is not a parameter.", param=name[:100])


def _explained(text: str) -> InvalidRequest:
    if "missing required field" in text:
        name = text.split("`")[1]
        return MissingParameter(f"`{name}` is required.", param=name)
    found = _PARAM.search(text)
    param = found.group(1).partition("[")[0] or None if found else None
    return InvalidRequest(f"{text}.", param=param)


def input_bound(body: bytes, head: ChatHead, context_tokens: int) -> int:
    """The most tokens the input can be: a token is at least a byte of text.

    What is not text (images, audio, files) or lies with the provider is bounded by the
    model's context alone. What providers add unseen (chat templates, instructions for tools)
    gets an allowance. Raises InvalidJson, seldom: see `has_media`.
    """
    if len(body) + _TEMPLATE_ALLOWANCE >= context_tokens:
        return context_tokens
    escapes = _escapes_ascii(body)
    tools = "tools" in head.fields or "functions" in head.fields
    bound = len(body) + (_TOOLS_ALLOWANCE if tools else _TEMPLATE_ALLOWANCE)
    if bound >= context_tokens or has_media(body, escapes):
        return context_tokens
    return bound


def has_media(body: bytes, escapes: bool) -> bool:
    """Whether there may be more than the text seen here. Escaped ASCII is looked at decoded.

    Raises InvalidJson where it cannot be decoded.
    """
    if escapes:
        try:
            body = _encode(_any.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise InvalidJson() from None
    return _is_named(_MEDIA, body)


def has_audio(body: bytes) -> bool:
    """Whether there may be sound in the input: some models price it apart.

    Escaped ASCII may say so, too; not looked at decoded, for more is held at worst.
    """
    if len(body) >= _LARGE:
        return _is_named(_AUDIO, body) or _escapes_ascii(body)
    # Backwards: 0.15 µs, forwards 0.5.
    return body.rfind(b'"input_audio"') >= 0 or _escapes_ascii(body)


def _is_named(names: re.Pattern[bytes], body: bytes) -> bool:
    """Whether one of `names`, each in quotes, is in `body`.

    A large body is mostly text, with few quotes for its size: to go from one to the next is
    memchr's work, 15 µs for 1 MB where a search takes 284.
    """
    at = 0
    if len(body) >= _LARGE:
        at = body.find(b'"')
        for _ in range(len(body) // _BYTES_PER_HOP):
            if at < 0 or names.match(body, at) is not None:
                return at >= 0
            at = body.find(b'"', at + 1)
    return at >= 0 and names.search(body, at) is not None


def _escapes_ascii(body: bytes) -> bool:
    """Whether ASCII is written as escapes. `rfind` skips: half the time of a search forward."""
    if len(body) >= _LARGE and body.find(b"\\") < 0:
        return False
    return body.rfind(b"\\u00") >= 0 and _ESCAPED_ASCII.search(body) is not None


def output_bound(head: ChatHead, model_max: int) -> int:
    """The most tokens all choices together can be: the request's ceiling, else the model's."""
    asked = max(head.max_tokens or 0, head.max_completion_tokens or 0)
    ceiling = min(asked, model_max) if asked else model_max
    return ceiling * (head.n or 1)


def body_for(head: ChatHead, model: Raw) -> bytes:
    """The body for a target that calls the model so; each key once, as it was read."""
    fields: dict[str, Raw] = head.fields
    fields["model"] = model
    return _encode(fields)


def _with_usage(options: Raw | None) -> Raw:
    if options is None or bytes(options) == b"null":
        return _WITH_USAGE
    found = _fields.decode(options)
    found["include_usage"] = Raw(b"true")
    return Raw(_encode(found))
