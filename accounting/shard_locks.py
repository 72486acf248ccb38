"""Who posts which shard: advisory locks of one Postgres session, shared out evenly.

Theory of operation. A shard is posted by the session that holds its lock, and over that same
session. When the session ends, for whatever reason, Postgres rolls back what it was doing and
frees its locks in one step: so nobody can post a shard that somebody else has taken over.
Each session also holds a place in the round, by which the others count how many they are.
"""

from typing import Any

from accounting.contract.settings import SHARDS

_SHARD, _PLACE = 0x70_6C_67_03, 0x70_6C_67_04  # classes of advisory locks
_PLACES = 1024


class ShardLocks:
    """The shards of one session. Valid as long as its connection is."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.held: set[int] = set()
        self.short = False  # fewer than others have: some are about to be given up

    def __repr__(self) -> str:
        return f"<ShardLocks {sorted(self.held)}>"

    async def join(self) -> None:
        """Take a place in the round. Called once, before `share`."""
        taken = await self._try_locks(_PLACE, range(_PLACES), 1)
        if not taken:
            raise AssertionError(f"more than {_PLACES} sessions share the shards")

    async def share(self) -> set[int]:
        """Give up what is beyond a fair share, take what is free up to it; what is held now."""
        places = await self._connection.fetchval(
            "select count(*) from pg_locks where locktype = 'advisory' and classid = $1"
            " and database = (select oid from pg_database where datname = current_database())",
            _PLACE,
        )
        fair = -(-SHARDS // max(1, places))
        for shard in sorted(self.held)[fair:]:
            await self._connection.execute("select pg_advisory_unlock($1, $2)", _SHARD, shard)
            self.held.discard(shard)
        if len(self.held) < fair:
            free = [shard for shard in range(SHARDS) if shard not in self.held]
            self.held |= await self._try_locks(_SHARD, free, fair - len(self.held))
        self.short = len(self.held) < SHARDS // max(1, places)
        return set(self.held)

    async def _try_locks(self, kind: int, wanted: Any, most: int) -> set[int]:
        rows = await self._connection.fetch(
            "select n from unnest($1::int[]) as n where pg_try_advisory_lock($2, n) limit $3",
            list(wanted),
            kind,
            most,
        )
        return {row[0] for row in rows}
