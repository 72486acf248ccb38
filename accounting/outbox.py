"""What people are to be told, written in the SQL transaction of the fact itself.

Owns the table `outbox`; who is told, and how, is for those that read it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec


class Told(NamedTuple):
    """A fact of a workspace: its type (`grant.issued`), what it says, the journal behind it."""

    workspace_id: str
    journal_id: int | None
    type: str
    body: dict[str, Any]


async def tell(connection: Any, told: Sequence[Told]) -> None:
    """Write facts, inside the caller's SQL transaction."""
    await connection.execute(
        "insert into outbox (workspace_id, journal_id, type, body)"
        " select * from unnest($1::text[], $2::bigint[], $3::text[], $4::jsonb[])",
        [one.workspace_id for one in told],
        [one.journal_id for one in told],
        [one.type for one in told],
        [msgspec.json.encode(one.body).decode() for one in told],
    )
