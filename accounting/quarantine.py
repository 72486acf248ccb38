"""Usage events that cannot be posted: kept with their bytes and what they took, never dropped.

Owns the table `quarantine`. Their charge has left the balance in Redis and is in no ledger, so
every comparison of the two counts it until an operator has resolved the row.
"""

from typing import Any

from accounting.usage_entries import Defect


async def put(connection: Any, defects: list[Defect]) -> int:
    """Keep defects, each once however often its entry is delivered; how many were new."""
    rows = await connection.fetch(
        "insert into quarantine (shard, stream_id, position, reason, workspace_id, key_id,"
        " request_id, charge_ucr, body) select * from unnest($1::smallint[], $2::text[],"
        " $3::int[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::bytea[])"
        " on conflict do nothing returning id",
        [one.shard for one in defects],
        [one.stream_id for one in defects],
        [one.position for one in defects],
        [one.reason for one in defects],
        [one.workspace_id for one in defects],
        [one.key_id for one in defects],
        [one.request_id for one in defects],
        [one.charge_ucr for one in defects],
        [one.body for one in defects],
    )
    return len(rows)
