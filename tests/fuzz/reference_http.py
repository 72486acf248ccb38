"""Requests read by RFC 9112 alone: slow, whole, and stricter than any parser has to be.

Written from the grammar, with nothing of the product in it, as the second reading against
which the product's is held: what it accepts and this does not, or reads otherwise, is how
requests are smuggled.
"""

import re
from typing import NamedTuple

_START = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[!-~\x80-\xff \t]*)?)")
_SIZE = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[!-~\x80-\xff \t]*)?")
_SINGLE = (b"host", b"content-length", b"content-type", b"authorization", b"expect")


class Refused(Exception):
    """Not what the grammar allows, or ambiguous."""


class More(Exception):
    """Fine so far; more bytes are needed. The argument says of what."""


class Message(NamedTuple):
    method: bytes
    path: bytes
    headers: dict[bytes, bytes]
    body: bytes
    http_1_0: bool
    may_keep: bool
    start: int
    end: int


class Reading(NamedTuple):
    messages: list[Message]
    ending: str  # `refused`, or what more bytes would belong to: `head`, `body`


def read(data: bytes) -> Reading:
    """All requests on one connection, as far as they can be trusted."""
    messages: list[Message] = []
    at = 0
    while True:
        try:
            messages.append(_message(data, at))
        except Refused:
            return Reading(messages, "refused")
        except More as more:
            return Reading(messages, str(more))
        at = messages[-1].end


def _message(data: bytes, at: int) -> Message:
    if data.startswith(b"\r\n", at):
        at += 2
    start = at
    line, at = _line(data, at, "head")
    found = _START.fullmatch(line)
    if not found:
        raise Refused
    fields, at = _fields(data, at, "head")
    old = found[3] == b"0"
    headers = _combined(fields)
    if not old and b"host" not in headers:
        raise Refused
    body, at = _body(data, at, headers, old)
    options = {word.strip().lower() for word in headers.get(b"connection", b"").split(b",")}
    may_keep = not old and b"close" not in options
    return Message(found[1], _path(found[2]), headers, body, old, may_keep, start, at)


def _line(data: bytes, at: int, within: str) -> tuple[bytes, int]:
    end = data.find(b"\r\n", at)
    line = data[at : end if end >= 0 else None]
    if b"\n" in line or b"\r" in line[: None if end >= 0 else -1]:
        raise Refused
    if end < 0:
        raise More(within)
    return line, end + 2


def _fields(data: bytes, at: int, within: str) -> tuple[list[tuple[bytes, bytes]], int]:
    found = []
    while True:
        line, at = _line(data, at, within)
        if not line:
            return found, at
        field = _FIELD.fullmatch(line)
        if not field:
            raise Refused
        found.append((field[1].lower(), field[2].rstrip(b" \t")))


def _combined(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in headers and name in _SINGLE:
            raise Refused
        headers[name] = headers[name] + b", " + value if name in headers else value
    return headers


def _body(data: bytes, at: int, headers: dict[bytes, bytes], old: bool) -> tuple[bytes, int]:
    length = headers.get(b"content-length")
    coding = headers.get(b"transfer-encoding")
    if coding is not None:
        if old or length is not None or coding.lower() != b"chunked":
            raise Refused
        return _chunks(data, at)
    if length is None:
        return b"", at
    if not re.fullmatch(rb"[0-9]+", length):
        raise Refused
    if len(data) - at < int(length):
        raise More("body")
    return data[at : at + int(length)], at + int(length)


def _chunks(data: bytes, at: int) -> tuple[bytes, int]:
    body = b""
    while True:
        line, at = _line(data, at, "body")
        found = _SIZE.fullmatch(line)
        if not found:
            raise Refused
        size = int(found[1], 16)
        if not size:
            _, at = _fields(data, at, "body")
            return body, at
        chunk = data[at : at + size]
        tail = data[at + size : at + size + 2]
        if not b"\r\n".startswith(tail):
            raise Refused
        if len(tail) < 2:
            raise More("body")
        body += chunk
        at += size + 2


def _path(target: bytes) -> bytes:
    absolute = re.fullmatch(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*([^?]*)(?:\?.*)?", target)
    return absolute[1] if absolute else target.split(b"?")[0]
