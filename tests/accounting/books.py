"""Post, and look at what the ledger says: shared by the tests of accounting."""

import itertools
from datetime import UTC, datetime
from typing import Any

import asyncpg
from redis.asyncio import Redis

from accounting import audit, audit_ledger, deltas, reckoning, usage_posting
from accounting.contract.identifiers import ulid
from accounting.contract.keyspace import EPOCH, stream_key
from accounting.contract.usage_event import UsageEvent, encode_event, join_events
from accounting.usage_entries import START, Entry, StreamId
from accounting.usage_posting import Posted
from accounting.usage_stream import read_range
from tests.accounting.scene import Tenant

LONGEST = 900.0
_positions = itertools.count(1)


def entry(tenant: Tenant, *events: UsageEvent) -> Entry:
    """A stream entry that never was on a stream."""
    body = join_events([encode_event(event) for event in events])
    return Entry(tenant.shard, StreamId(1000, next(_positions)), body)


async def post(pool: asyncpg.Pool, *entries: Entry, reason: str | None = None) -> Posted:
    async with pool.acquire() as connection:
        return await usage_posting.post(connection, entries, datetime.now(UTC).date(), reason)


async def on_stream(tenant: Tenant) -> list[Entry]:
    return await read_range(tenant.redis, tenant.shard, START, StreamId(2**60, 0))


async def post_stream(tenant: Tenant) -> Posted:
    """Post what is on the tenant's stream, trim it, and bring Redis up to the ledger."""
    posted = await post(tenant.pool, *await on_stream(tenant))
    await tenant.redis.xtrim(stream_key(tenant.shard), maxlen=0, approximate=False)
    await deltas.apply_pending(tenant.pool, tenant.redis)
    return posted


def started(at: datetime) -> dict[str, Any]:
    """The fields of an event whose exchange started then."""
    return {
        "request_id": "req_" + ulid(int(at.timestamp() * 1000)),
        "started_at_us": int(at.timestamp() * 1_000_000),
    }


async def assert_ledger_clean(pool: asyncpg.Pool) -> None:
    findings = await audit_ledger.check(pool, 86_400)
    assert [str(finding) for finding in findings if finding.drifted] == []


async def assert_clean(pool: asyncpg.Pool, redis: Redis) -> None:
    """The ledger, and Redis against it."""
    await redis.set(EPOCH, "filled")
    _assert_none_drifted(await audit.audit(pool, redis, LONGEST))


async def assert_agree(tenant: Tenant) -> None:
    """The ledger, and Redis against it as far as one workspace goes: quicker than all of it."""
    await assert_ledger_clean(tenant.pool)
    [found] = await reckoning.reckon(tenant.pool, tenant.redis, tenant.shard, [tenant.id])
    drifts = [audit.balance_drift(found), audit.held_drift(found), *audit.spent_drifts([found])]
    assert not any(drifts), drifts


def _assert_none_drifted(findings: list[audit_ledger.Finding]) -> None:
    drifted = [finding for finding in findings if finding.drifted]
    assert not drifted, drifted
