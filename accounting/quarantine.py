"""Usage events that cannot be posted: kept with their bytes and what they took, never dropped.

Owns the table `quarantine`. Their charge has left the balance in Redis and is in no ledger, so
every comparison of the two counts it until an operator has resolved the row.
"""

import logging
import time
from typing import Any

from accounting.usage_entries import Defect

_QUIET_SECONDS = 60.0
_log = logging.getLogger("tollgate.accounting")


class Alarm:
    """A log line when events go to quarantine, and at most one a minute while they do."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __repr__(self) -> str:
        return f"<Alarm quiet until {self._quiet_until:.0f}>"

    def raised(self, so_far: int) -> None:
        """Some more went there; `so_far` in all since the process began."""
        now = time.monotonic()
        if now >= self._quiet_until:
            _log.error("usage events go to quarantine: %d so far", so_far)
            self._quiet_until = now + _QUIET_SECONDS


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
