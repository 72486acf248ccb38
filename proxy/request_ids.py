"""Request ids: `req_` and a ULID, made cheaply.

The millisecond part is formatted once per millisecond, the random part comes from a
generator seeded by the operating system: ids must be unique, not secret.
"""

import base64
import random
import time

from accounting.contract.identifiers import ulid

_CROCKFORD = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789ABCDEFGHJKMNPQRSTVWXYZ"
)


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
        ten_bytes = self._bits(80).to_bytes(10, "big")
        return self._prefix + base64.b32encode(ten_bytes).translate(_CROCKFORD)
