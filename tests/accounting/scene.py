"""Workspaces, keys, usage and a stand-in for a proxy worker, for tests of accounting.

The stand-in admits and settles through the real scripts, so that what it leaves in Redis is
what a proxy leaves there.
"""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis

from accounting import deltas, grants, keys, workspaces
from accounting.contract import keyspace, scripts
from accounting.contract.figures import pack_figures, unpack_figures
from accounting.contract.identifiers import new_id
from accounting.contract.usage_event import (
    SCHEMA,
    TokenUsage,
    UsageEvent,
    encode_event,
    join_events,
)
from accounting.grants import Grant

PLENTY = 10**12
_numbers = itertools.count(1)


@asynccontextmanager
async def pool_on(url: str, size: int = 4) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(url, min_size=1, max_size=size) as pool:
        yield pool


def make_event(workspace_id: str, key_id: str, charge_ucr: int, **changes: Any) -> UsageEvent:
    """A completed exchange of now; `changes` replace fields."""
    event = UsageEvent(
        schema=SCHEMA,
        request_id=new_id("req"),
        workspace_id=workspace_id,
        key_id=key_id,
        route="chat/completions",
        model="gpt-4o-mini",
        served_by="openai/gpt-4o-mini",
        price_version="0123456789ab",
        started_at_us=time.time_ns() // 1000,
        charge_ucr=charge_ucr,
        hold_ucr=max(charge_ucr, 1),
        overrun_ucr=0,
        settlement="exact" if charge_ucr else "void",
        outcome="completed",
        status=200,
        streamed=True,
        fallback_depth=0,
        tokens=TokenUsage(input=100, output=20),
        total_us=500_000,
        provider_us=480_000,
        first_byte_us=90_000,
        request_bytes=700,
        answer_bytes=3000,
    )
    return msgspec.structs.replace(event, **changes)


class Tenant:
    """A workspace with one key."""

    def __init__(self, pool: asyncpg.Pool, redis: Redis, workspace_id: str, key_id: str) -> None:
        self.pool, self.redis = pool, redis
        self.id, self.key_id = workspace_id, key_id

    @classmethod
    async def make(
        cls, pool: asyncpg.Pool, redis: Redis, amount_ucr: int = 0, shard: int | None = None
    ) -> "Tenant":
        """With a topup of so much, if any, spendable at once; in a shard of choice."""
        workspace_id = new_id("ws")
        while shard is not None and keyspace.shard_of(workspace_id) != shard:
            workspace_id = new_id("ws")
        await workspaces.create(pool, redis, "Test", workspace_id=workspace_id)
        key = await keys.create(pool, redis, workspace_id, "key", keys.new_secret())
        tenant = cls(pool, redis, workspace_id, key.id)
        if amount_ucr:
            await tenant.give("topup", amount_ucr)
        return tenant

    @property
    def shard(self) -> int:
        return keyspace.shard_of(self.id)

    async def give(self, kind: str, amount_ucr: int, expires_at: Any = None) -> Grant:
        async with self.pool.acquire() as connection, connection.transaction():
            ref = f"test:{self.id}:{next(_numbers)}"
            grant = await grants.issue(connection, self.id, kind, amount_ucr, expires_at, ref)
        await deltas.apply_pending(self.pool, self.redis, self.id)
        return grant

    async def wallet(self) -> keyspace.Wallet:
        packed = await self.redis.hget(keyspace.workspace_key(self.id), "w")
        assert isinstance(packed, bytes)
        return msgspec.msgpack.decode(packed, type=keyspace.Wallet)

    async def spent(self) -> int:
        """What the key counts as spent."""
        packed = await self.redis.hget(keyspace.workspace_key(self.id), f"c:{self.key_id}")
        assert isinstance(packed, bytes)
        return msgspec.msgpack.decode(packed, type=keyspace.KeyCounters).spent_ucr

    async def grants(self) -> dict[str, Grant]:
        return {grant.id: grant for grant in await grants.list_all(self.pool, self.id)}

    def event(self, charge_ucr: int, **changes: Any) -> UsageEvent:
        return make_event(self.id, self.key_id, charge_ucr, **changes)


class Boot:
    """One boot of a proxy worker: leases of one, batches settled in sequence."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self.name = f"boot{next(_numbers)}"
        self._settled: dict[int, int] = {}
        self._open: dict[str, list[int]] = {}

    async def admit(self, tenant: Tenant, hold_ucr: int) -> bool:
        """Whether a hold of so much was granted."""
        mine = self._open.setdefault(tenant.key_id, [0, 0, 0])
        message = pack_figures(1, *mine, *[0] * 7, hold_ucr, 100, 1)
        reply = await scripts.call(
            self._redis,
            "lease",
            [keyspace.workspace_key(tenant.id), keyspace.leases_key(tenant.shard, self.name)],
            [self.name, tenant.key_id, tenant.id, message],
        )
        assert isinstance(reply, bytes), reply
        if unpack_figures(reply)[5] != 0:
            return False
        mine[0], mine[1], mine[2] = mine[0] + hold_ucr, mine[1] + 100, mine[2] + 1
        return True

    async def settle(self, tenant: Tenant, *events: UsageEvent) -> str:
        """Settle admitted exchanges of one tenant in one batch; the stream id."""
        mine = self._open[tenant.key_id]
        held = sum(event.hold_ucr for event in events)
        count = len(events)
        mine[0], mine[1], mine[2] = mine[0] - held, mine[1] - 100 * count, mine[2] - count
        charged = sum(event.taken_ucr for event in events)
        row = [1, tenant.key_id, held, charged, 100 * count, 20 * count, count]
        return await self._settle(tenant, row, events)

    async def tell_again(self, tenant: Tenant, event: UsageEvent) -> UsageEvent:
        """Settle an exchange anew: what it takes is held first, like any charge."""
        taken, count = event.taken_ucr, int(event.taken_ucr > 0)
        if taken:
            assert await self.admit(tenant, taken)
            mine = self._open[tenant.key_id]
            mine[0], mine[1], mine[2] = mine[0] - taken, mine[1] - 100, mine[2] - 1
        row = [1, tenant.key_id, taken, taken, 100 * count, 0, count]
        await self._settle(tenant, row, (event,))
        return event

    async def _settle(self, tenant: Tenant, row: list[Any], events: tuple[UsageEvent, ...]) -> str:
        number = self._settled[tenant.shard] = self._settled.get(tenant.shard, 0) + 1
        keys_ = [
            keyspace.stream_key(tenant.shard),
            keyspace.boots_key(tenant.shard),
            keyspace.workspace_key(tenant.id),
        ]
        body = join_events([encode_event(event) for event in events])
        figures = pack_figures(row[0], *row[2:])
        arguments = [self.name, number, body, row[1], figures]
        reply = await scripts.call(self._redis, "settle", keys_, arguments)
        return str(reply.decode())

    async def serve(self, tenant: Tenant, charge_ucr: int, **changes: Any) -> UsageEvent:
        """Admit and settle one exchange whose hold is its charge (at least 1 µcr)."""
        event = tenant.event(charge_ucr, **changes)
        assert await self.admit(tenant, event.hold_ucr)
        await self.settle(tenant, event)
        return event
