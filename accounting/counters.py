"""What accounting has done since it started, as plain numbers, ready to be shown as metrics."""

from msgspec import Struct


class Counters(Struct):
    """Counts since the start, except `lag_ms` and `owned_shards`, which are of this moment."""

    batches: int = 0
    entries: int = 0
    events: int = 0
    duplicates: int = 0
    quarantined: int = 0
    refused: int = 0  # tries of an entry that Postgres would not take
    outages: int = 0  # times a store was lost
    deltas: int = 0
    expired_ucr: int = 0
    rebuilds: int = 0
    reaped: int = 0  # worker boots whose host was taken to be lost
    owned_shards: int = 0
    lag_ms: int = 0  # from an entry's arrival on the stream to its commit, of the last batch
