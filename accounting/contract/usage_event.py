"""What was used: token counts, the immutable usage event, and its codec.

An event is written once, by the worker that served the exchange, and read once by
accounting. Events travel as one MessagePack list per stream entry.
"""

import msgspec
from msgspec import Struct

SCHEMA = 1


class TokenUsage(Struct, frozen=True, array_like=True):
    """Token counts. `cached_input`, `cache_write`, `audio_input` are parts of `input`;
    `reasoning` and `audio_output` are parts of `output`."""

    input: int = 0
    output: int = 0
    cached_input: int = 0
    cache_write: int = 0
    reasoning: int = 0
    audio_input: int = 0
    audio_output: int = 0


class UsageEvent(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One exchange as billed. Amounts in µcr, times in µs since the epoch or µs of length.

    `settlement`: `exact` (the provider's figures), `estimated` (from what was relayed) or
    `void` (nothing delivered, charge 0). `outcome`: `completed`, `client_left`,
    `provider_failed` or `cut`. `overrun_ucr` is cost beyond the hold, which nobody pays.

    An exchange told anew has a higher `revision`, and `replaces_ucr`, the charge told before:
    its settle took what is charged beyond that; less is given back by accounting.
    """

    schema: int
    request_id: str
    workspace_id: str
    key_id: str
    route: str
    model: str
    served_by: str
    price_version: str
    started_at_us: int
    charge_ucr: int
    hold_ucr: int
    overrun_ucr: int
    settlement: str
    outcome: str
    status: int
    streamed: bool
    fallback_depth: int
    tokens: TokenUsage
    total_us: int
    provider_us: int
    first_byte_us: int
    request_bytes: int
    answer_bytes: int
    revision: int = 0
    replaces_ucr: int = 0

    @property
    def taken_ucr(self) -> int:
        """What the settle of this event took from the balance, µcr."""
        return max(0, self.charge_ucr - self.replaces_ucr)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_event_decoder = msgspec.msgpack.Decoder(UsageEvent)


def encode_event(event: UsageEvent) -> bytes:
    return _encoder.encode(event)


def join_events(encoded: list[bytes]) -> bytes:
    """Encoded events as one MessagePack list, without decoding any."""
    return _encoder.encode([msgspec.Raw(one) for one in encoded])


def split_events(blob: bytes) -> list[bytes]:
    """The inverse of `join_events`. Raises msgspec.DecodeError on foreign bytes."""
    return [bytes(raw) for raw in _decoder.decode(blob)]


def decode_event(encoded: bytes) -> UsageEvent:
    """Raises msgspec.ValidationError for another schema version or a malformed event."""
    event = _event_decoder.decode(encoded)
    if event.schema != SCHEMA:
        raise msgspec.ValidationError(f"usage event schema {event.schema}, expected {SCHEMA}")
    if not 0 <= event.charge_ucr <= event.hold_ucr:
        raise msgspec.ValidationError("charge is negative or above its hold")
    return event
