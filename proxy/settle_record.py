"""[8] What ends one hold, as the journal keeps it."""

import msgspec
from msgspec import Struct

_encode = msgspec.msgpack.Encoder().encode


class Settle(Struct, array_like=True):
    """What ends one hold. Amounts in µcr; `void_at_us` is the admission time of a void, or 0."""

    workspace_id: str
    key_id: str
    credits_ucr: int
    charge_ucr: int
    tokens_held: int
    tokens_used: int
    void_at_us: int
    event: bytes


settle_decoder = msgspec.msgpack.Decoder(Settle)


def encode_settle(settle: Settle) -> bytes:
    return _encode(settle)
