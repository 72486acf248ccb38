"""One row per exchange in `usage_records`, written once; and the offsets of what was written.

Owns the tables `usage_records` and `stream_offsets`. A request id is inserted once, whatever
was delivered how often: the insert says how many rows were new, and rollups count those alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from accounting import rollups
from accounting.postings import Burns
from accounting.usage_entries import START, Billed, StreamId

_TYPES = {
    "day": "date",
    "request_id": "text",
    "workspace_id": "text",
    "key_id": "text",
    "route": "text",
    "model": "text",
    "served_by": "text",
    "price_version": "text",
    "started_at": "timestamptz",
    "charge_ucr": "bigint",
    "hold_ucr": "bigint",
    "overrun_ucr": "bigint",
    "settlement": "text",
    "outcome": "text",
    "status": "smallint",
    "streamed": "boolean",
    "fallback_depth": "smallint",
    "input_tokens": "integer",
    "output_tokens": "integer",
    "cached_input_tokens": "integer",
    "cache_write_tokens": "integer",
    "reasoning_tokens": "integer",
    "audio_input_tokens": "integer",
    "audio_output_tokens": "integer",
    "total_us": "bigint",
    "provider_us": "bigint",
    "first_byte_us": "bigint",
    "request_bytes": "bigint",
    "answer_bytes": "bigint",
    "revision": "smallint",
    "burns": "jsonb",
    "journal_id": "bigint",
    "stream_id": "text",
}
_NAMES = ", ".join(_TYPES)
_ARRAYS = ", ".join(f"${n}::{kind}[]" for n, kind in enumerate(_TYPES.values(), start=1))
_INSERT = (
    f"with fresh as (insert into usage_records ({_NAMES}) select * from unnest({_ARRAYS})"  # noqa: S608
    " on conflict do nothing returning *),"
    f" rolled as ({rollups.ADD.format(rows='fresh')}) select count(*) from fresh"
)


class Record(NamedTuple):
    """A billed event, with what paid for it; both None when nothing was charged."""

    billed: Billed
    burns: Burns | None
    journal_id: int | None


def _row(record: Record) -> tuple[Any, ...]:
    event, day, started_at, _shard, stream_id, _position, _late = record.billed
    tokens = event.tokens
    burns = record.burns
    return (
        day,
        event.request_id,
        event.workspace_id,
        event.key_id,
        event.route,
        event.model,
        event.served_by,
        event.price_version,
        started_at,
        event.charge_ucr,
        event.hold_ucr,
        event.overrun_ucr,
        event.settlement,
        event.outcome,
        event.status,
        event.streamed,
        event.fallback_depth,
        tokens.input,
        tokens.output,
        tokens.cached_input,
        tokens.cache_write,
        tokens.reasoning,
        tokens.audio_input,
        tokens.audio_output,
        event.total_us,
        event.provider_us,
        event.first_byte_us,
        event.request_bytes,
        event.answer_bytes,
        event.revision,
        None if burns is None else msgspec.json.encode(burns).decode(),
        record.journal_id,
        stream_id,
    )


async def insert(connection: Any, records: Iterable[Record]) -> int:
    """Insert rows and add them to the rollups; how many were new. Partitions must exist."""
    columns = zip(*map(_row, records), strict=True)
    return int(await connection.fetchval(_INSERT, *columns))


async def known(connection: Any, billed: Sequence[Billed]) -> dict[str, int]:
    """Which of these request ids are recorded already, and as which revision."""
    rows = await connection.fetch(
        "select u.request_id, u.revision from usage_records u"
        " join unnest($1::date[], $2::text[]) as x(day, request_id)"
        " on u.day = x.day and u.request_id = x.request_id",
        [one.day for one in billed],
        [one.event.request_id for one in billed],
    )
    return dict(rows)


async def advance(connection: Any, positions: dict[int, StreamId]) -> None:
    """Note how far each shard's stream is posted; never backwards."""
    shards = sorted(positions)
    await connection.execute(
        "insert into stream_offsets as o (shard, last_ms, last_seq)"
        " select * from unnest($1::smallint[], $2::bigint[], $3::bigint[])"
        " on conflict (shard) do update set last_ms = excluded.last_ms,"
        " last_seq = excluded.last_seq, moved_at = now()"
        " where (o.last_ms, o.last_seq) < (excluded.last_ms, excluded.last_seq)",
        shards,
        [positions[shard].ms for shard in shards],
        [positions[shard].seq for shard in shards],
    )


async def watermark(connection: Any, shard: int) -> StreamId:
    """The last entry of a shard that is posted, and with it all before it."""
    row = await connection.fetchrow(
        "select last_ms, last_seq from stream_offsets where shard = $1", shard
    )
    return StreamId(*row) if row else START
