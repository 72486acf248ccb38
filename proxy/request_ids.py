"""Request ids: `req_` and a ULID, made cheaply.

The millisecond part is formatted once per millisecond, the random part comes from a
generator seeded by the operating system: ids must be unique, not secret.
"""

import random
import time

from accounting.contract.identifiers import ulid

_LETTERS = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [bytes((high, low)) for high in _LETTERS for low in _LETTERS]  # ten bits at a time


class RequestIds:
    """`next()` gives 30 bytes, e.g. `req_01M7XTB5K0BQWXPK2ACC0N1J1V`."""

    def __init__(self) -> None:
        self._bits = random.Random(random.SystemRandom().getrandbits(256)).getrandbits
        self._millisecond = 0
        self._prefix = b""

    def next(self) -> bytes:
        now = time.time_ns() // 1_000_000
        if now != self._millisecond:
            self._millisecond = now
            self._prefix = b"req_" + ulid(now)[:10].encode()
        bits = self._bits(80)
        return b"%b%b%b%b%b%b%b%b%b" % (
            self._prefix,
            _PAIRS[bits >> 70],
            _PAIRS[bits >> 60 & 1023],
            _PAIRS[bits >> 50 & 1023],
            _PAIRS[bits >> 40 & 1023],
            _PAIRS[bits >> 30 & 1023],
            _PAIRS[bits >> 20 & 1023],
            _PAIRS[bits >> 10 & 1023],
            _PAIRS[bits & 1023],
        )
