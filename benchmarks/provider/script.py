"""What one request asks the stand-in provider to do: the fields and how they are written.

Owns the `Script` and its three spellings: keyword arguments, the `k=v; k=v` text of
the `x-standin` header, and the `[[standin k=v; k=v]]` directive inside a model name or
a prompt. Leaves what a field does on the wire to `answers`, `steps` and `pace`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import msgspec

MAX_CHUNKS = 1_000_000
MAX_BYTES = 64 * 1024 * 1024
MAX_DELAY_MS = 3_600_000

UsageShape = Literal[
    "as_asked",
    "normal",
    "missing",
    "zero",
    "null",
    "in_last_content_chunk",
    "every_chunk",
    "late_after_done",
]
IdShape = Literal["normal", "null", "constant", "missing", "junk"]
Encoding = Literal["chunked", "content_length", "close"]
Fault = Literal[
    "none",
    "reset_before_head",
    "reset_mid_stream",
    "eof_mid_stream",
    "end_mid_stream",
    "eof_without_done",
    "error_event",
    "hang_before_head",
    "hang_mid_stream",
    "garbage",
    "garbage_json",
    "html",
    "oversized_line",
    "truncated_body",
]


class ScriptError(ValueError):
    """A script names an unknown field or gives it a value it cannot take."""


class Script(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True, omit_defaults=True):
    """How one answer is given; every field has the default of a well-behaved provider.

    Compared and hashed by identity, so that a script is a cheap cache key: equal texts
    give the same object (see `amended`). The table of meanings is in the package
    docstring. `*_ms` are milliseconds, `*_bytes` bytes, `*_tokens` tokens,
    `retry_after` seconds.
    """

    delay_ms: float = 0.0
    first_chunk_delay_ms: float = 0.0
    chunk_delay_ms: float = 0.0
    chunks: int | None = None
    chunk_bytes: int | None = None
    answer_bytes: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    obey_max: bool = True
    usage: UsageShape = "as_asked"
    id: IdShape = "normal"
    status: int | None = None
    retry_after: int | None = None
    fault: Fault = "none"
    fault_after: int | None = None
    crlf: bool = False
    comments: bool = False
    no_space: bool = False
    split_utf8: bool = False
    split_events: bool = False
    coalesce: bool = False
    stamp: bool = False
    encoding: Encoding | None = None
    finish_reason: str | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse values outside the bounds that keep one request's cost bounded."""
        bounds = {
            "delay_ms": (0, MAX_DELAY_MS),
            "first_chunk_delay_ms": (0, MAX_DELAY_MS),
            "chunk_delay_ms": (0, MAX_DELAY_MS),
            "chunks": (0, MAX_CHUNKS),
            "chunk_bytes": (0, MAX_BYTES),
            "answer_bytes": (0, MAX_BYTES),
            "fault_after": (0, MAX_CHUNKS),
            "status": (400, 599),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"`{name}` must lie between {low} and {high}")


DEFAULT_SCRIPT = Script()
DIRECTIVE = re.compile(r"\[\[standin\s+([^\]]*)\]\]")


def script_from(fields: Mapping[str, object], base: Script = DEFAULT_SCRIPT) -> Script:
    """`base` with `fields` over it; raises `ScriptError` on an unknown field or value."""
    merged = msgspec.to_builtins(base) | dict(fields)
    try:
        return msgspec.convert(merged, Script, strict=False)
    except msgspec.ValidationError as problem:
        raise ScriptError(str(problem)) from problem


@lru_cache(maxsize=1024)
def amended(base: Script, text: str) -> Script:
    """`base` with the `k=v; k=v` fields of `text` over it; raises `ScriptError`."""
    fields: dict[str, object] = {}
    for part in text.replace(",", ";").split(";"):
        name, equals, value = part.strip().partition("=")
        if not name:
            continue
        if not equals:
            raise ScriptError(f"`{name}` has no value")
        fields[name.strip()] = value.strip()
    return script_from(fields, base)


def split_directive(text: str) -> tuple[str, str | None]:
    """`text` without its last `[[standin …]]` directive, and that directive's fields."""
    found = DIRECTIVE.findall(text)
    return (DIRECTIVE.sub("", text).strip(), found[-1]) if found else (text, None)
