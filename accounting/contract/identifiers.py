"""Ids: prefixed ULIDs. The first 48 bits are the time, so a request's day is in its id."""

import os
import time
from datetime import UTC, date, datetime

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]  # ten bits at a time
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}


def ulid(at_ms: int | None = None) -> str:
    """26 characters of Crockford base 32: 48 bits of milliseconds, 80 random bits."""
    at_ms = time.time_ns() // 1_000_000 if at_ms is None else at_ms
    number = (at_ms << 80) | int.from_bytes(os.urandom(10), "big")
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])


def new_id(prefix: str) -> str:
    """`ws_…`, `key_…`, `req_…`: a fresh id."""
    return f"{prefix}_{ulid()}"


def time_ms(identifier: str) -> int:
    """Milliseconds since the epoch at which an id was made. Raises ValueError if malformed."""
    letters = identifier.rpartition("_")[2]
    if len(letters) != 26 or not all(letter in _VALUES for letter in letters):
        raise ValueError("not an id of ours")
    value = 0
    for letter in letters[:10]:
        value = value * 32 + _VALUES[letter]
    if value >> 48:
        raise ValueError("not an id of ours")
    return value


def day_of(identifier: str) -> date:
    """The UTC day of an id: which partition its row lives in."""
    return datetime.fromtimestamp(time_ms(identifier) / 1000, UTC).date()
