"""Request ids: `req_` and a ULID, made cheaply.

Ids of one millisecond share 60 random bits and count on from a random start, as the ULID
specification has it for ids that sort in the order made: 0.4 µs instead of 1.3. The bits come
from a generator seeded by the operating system: ids must be unique, not secret.
"""

import random

from accounting.contract.identifiers import ulid

_LETTERS = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [bytes((high, low)) for high in _LETTERS for low in _LETTERS]  # ten bits at a time
_COUNT_BITS = 20
_LAST = (1 << _COUNT_BITS) - 1


class RequestIds:
    """`next(now_ns)` gives 30 bytes, e.g. `req_01M7XTB5K0BQWXPK2ACC0N1J1V`."""

    def __init__(self) -> None:
        self._bits = random.Random(random.SystemRandom().getrandbits(256)).getrandbits
        self._millisecond = -1
        self._shared = b""
        self._count = 0

    def next(self, now_ns: int) -> bytes:
        """An id of the moment `now_ns`, in nanoseconds since the epoch."""
        millisecond = now_ns // 1_000_000
        if millisecond != self._millisecond or self._count == _LAST:
            self._renew(millisecond)
        self._count = count = self._count + 1
        return self._shared + _PAIRS[count >> 10] + _PAIRS[count & 1023]

    def _renew(self, millisecond: int) -> None:
        bits = self._bits(60)
        middle = b"".join([_PAIRS[bits >> shift & 1023] for shift in range(50, -1, -10)])
        self._shared = b"req_" + ulid(millisecond)[:10].encode() + middle
        self._millisecond = millisecond
        self._count = self._bits(_COUNT_BITS - 1)  # the lower half: room to count on
