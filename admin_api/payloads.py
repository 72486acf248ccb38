"""Bodies in, answers out: the JSON types, and how a body that does not fit is refused.

Amounts are exact: an amount is taken from the body's own characters and answered as a JSON
number of at most eight decimal places; no float is in between.
"""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from accounting.contract.errors import (
    InvalidJson,
    InvalidRequest,
    MissingParameter,
    UnknownParameter,
)
from accounting.contract.money import MoneyError, format_usd, parse_usd
from accounting.contract.settings import Secret

_END = r"(?![\s\S])"  # the very end: `$` would let a line break through
_AMOUNT = re.compile(r'(?:"(-?\d[\d.]*)"|(-?\d[\d.]*(?:[eE][+-]?\d{1,3})?))', re.ASCII)
_AMOUNT_LENGTH = 40
_LAST_YEAR = 9000  # near the end of its range a datetime cannot be moved to UTC
_PATH = re.compile(r"^(.*?)(?: - at `(?:key in )?(.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)

S = TypeVar("S", bound=Struct)


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of every request body; any mutation may carry its idempotency key here."""

    idempotency_key: str | None = None


class Usd:
    """An amount on its way out: µcr inside, US dollars as an exact JSON number outside."""

    __slots__ = ("ucr",)

    def __init__(self, ucr: int) -> None:
        self.ucr = ucr

    def __repr__(self) -> str:
        return f"Usd({format_usd(self.ucr)})"


Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=128,
        pattern=r"^(?=.*\S)[^\x00-\x1f\x7f]+" + _END,
        description="1 to 128 characters, not all blank, no control characters",
    ),
]
Email = Annotated[
    str,
    Meta(
        max_length=254,
        pattern=r"^[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+" + _END,
        description="an e-mail address",
    ),
]
Amount = Annotated[
    msgspec.Raw,
    Meta(
        description="US dollars: a JSON number, or the same as a string; at most 8 decimal places",
        extra_json_schema={"type": ["number", "string"]},
    ),
]
OptionalAmount = Annotated[
    msgspec.Raw,
    Meta(
        description="US dollars: a JSON number, or the same as a string; at most 8 decimal places",
        extra_json_schema={"type": ["number", "string", "null"]},
    ),
]
Instant = Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset")]


def decode(body: bytes, kind: type[S]) -> S:
    """A body as its type; no body at all is an empty object. Raises InvalidRequest."""
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson from None


def _refusal(text: str) -> InvalidRequest:
    """The decoder's complaint as a failure that names the parameter."""
    match = _PATH.match(text)
    complaint, path = (match[1], match[2] or "$") if match else (text, "$")
    parent = path.removeprefix("$").removeprefix(".")
    if missing := _MISSING.fullmatch(complaint):
        param = _join(parent, missing[1])
        return MissingParameter(f"The parameter `{param}` is required.", param=param)
    if unknown := _UNKNOWN.fullmatch(complaint):
        param = _join(parent, unknown[1])
        return UnknownParameter(f"There is no parameter `{param}`.", param=param)
    if "matching regex" in complaint:
        complaint = "not in the expected form"
    if not parent:
        return InvalidRequest(f"The body does not fit: {complaint}.")
    return InvalidRequest(f"`{parent}`: {complaint}.", param=parent)


def _join(parent: str, field: str) -> str:
    return f"{parent}.{field}" if parent else field


def null_amount() -> msgspec.Raw:
    """The default of an `OptionalAmount` field."""
    return msgspec.Raw(b"null")


def is_null(amount: msgspec.Raw) -> bool:
    return bytes(amount).strip() == b"null"


def amount_ucr(raw: msgspec.Raw, param: str, *, low_ucr: int, high_ucr: int) -> int:
    """An amount of a body in µcr, within bounds. Raises InvalidRequest naming `param`."""
    try:
        amount = parse_usd(_plain(bytes(raw)))
    except MoneyError as error:
        raise InvalidRequest(f"`{param}`: {error}.", param=param) from None
    if not low_ucr <= amount <= high_ucr:
        bounds = f"{format_usd(low_ucr)} and {format_usd(high_ucr)}"
        raise InvalidRequest(f"`{param}`: expected between {bounds} US dollars.", param=param)
    return amount


def _plain(raw: bytes) -> Decimal:
    text = raw.decode("ascii", "replace").strip()
    match = _AMOUNT.fullmatch(text) if len(text) <= _AMOUNT_LENGTH else None
    if match is None:
        raise MoneyError("expected an amount in US dollars")
    try:
        return Decimal(match[1] or match[2])
    except ArithmeticError:
        raise MoneyError("expected an amount in US dollars") from None


def future(at: datetime | None, param: str) -> datetime | None:
    """An instant that is yet to come. Raises InvalidRequest naming `param`."""
    if at is not None and (at <= datetime.now(UTC) or at.year > _LAST_YEAR):
        raise InvalidRequest(f"`{param}`: expected an instant to come.", param=param)
    return at


def _outward(value: Any) -> Any:
    if isinstance(value, Usd):
        return msgspec.Raw(format_usd(value.ucr).encode())
    if isinstance(value, Secret):
        return value.reveal()
    raise TypeError(f"{type(value).__name__} has no JSON form")


encode = msgspec.json.Encoder(enc_hook=_outward).encode


def schema_of(kind: type) -> dict[str, Any]:
    """The JSON schema of the types of ours that msgspec does not know."""
    if kind is Usd:
        return {"type": "number", "description": "US dollars, exact, at most 8 decimal places"}
    if kind is Secret:
        return {"type": "string", "description": "shown once"}
    raise TypeError(f"{kind.__name__} has no JSON schema")
