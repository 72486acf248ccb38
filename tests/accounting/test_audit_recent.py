"""The audit of what is new: clean, quick to see a fresh fault, and blind to what was proved."""

import asyncio

import asyncpg
import pytest
from redis.asyncio import Redis

from accounting import audit, audit_ledger, audit_recent, reversals
from accounting.audit_recent import RECENT
from tests.accounting.books import LONGEST, assert_clean, entry, post, post_stream
from tests.accounting.scene import Boot, Tenant, pool_on
from tests.accounting.test_audit import LEDGER_FAULTS, seeded
from tests.waiting import eventually

ONLY_BY_ALL = {"a rollup too many": {"A10"}, "a lost revision": {"A13"}}  # A6 sees the latter


async def recent(pool: asyncpg.Pool, redis: Redis) -> set[str]:
    findings = await audit.audit(pool, redis, LONGEST, recent=True)
    return {finding.name for finding in findings if finding.drifted}


def test_it_has_every_invariant() -> None:
    assert [one.name for one in RECENT] == [one.name for one in audit_ledger.INVARIANTS]


async def test_a_sound_system_is_clean_again_and_again(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        boot = Boot(redis_client)
        assert await audit_recent.mark(tenant.pool) is None
        marks = []
        for _ in range(4):
            assert await recent(tenant.pool, redis_client) == set()
            marks.append(await audit_recent.mark(tenant.pool))
            event = await boot.serve(tenant, 8)
            await tenant.give("promo", 5)
            await post_stream(tenant)
            pool, ref = tenant.pool, event.request_id
            await reversals.reverse(pool, redis_client, ref, 3, source_ref=ref)
        assert marks == sorted(marks)
        await assert_clean(tenant.pool, redis_client)


async def test_many_audits_at_once_note_it_once(database_url: str, redis_client: Redis) -> None:
    async with seeded(database_url, redis_client) as tenant:
        pool = tenant.pool
        found = await asyncio.gather(*(recent(pool, redis_client) for _ in range(4)))
        assert found == [set()] * 4
        assert await recent(pool, redis_client) == set()


async def all_is_old(tenant: Tenant) -> None:
    """As if everything so far had been posted an hour ago, and proved since."""
    for table, column in [
        ("journals", "posted_at"),
        ("usage_records", "recorded_at"),
        ("usage_revisions", "recorded_at"),
    ]:
        await tenant.pool.execute(f"update {table} set {column} = {column} - interval '1 hour'")
    assert await recent(tenant.pool, tenant.redis) == set()
    assert await audit_recent.mark(tenant.pool) is not None


@pytest.mark.parametrize("fault", LEDGER_FAULTS)
async def test_a_fault_in_what_is_new_is_caught(
    database_url: str, redis_client: Redis, fault: str
) -> None:
    sql, caught = LEDGER_FAULTS[fault]
    async with seeded(database_url, redis_client) as tenant:
        until = await tenant.pool.fetchval("select min(posted_at) from journals")
        async with tenant.pool.acquire() as connection:
            await audit_recent.advance(connection, until)
        assert await recent(tenant.pool, redis_client) == set()
        async with tenant.pool.acquire() as connection:
            await connection.execute("update audit_mark set proved_until = $1", until)
            await connection.execute("delete from audit_totals")
        await tenant.pool.execute(sql)
        found = await recent(tenant.pool, redis_client)
        assert caught - ONLY_BY_ALL.get(fault, set()) - {"R1"} <= found


async def test_what_was_proved_is_not_looked_at_again(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        await all_is_old(tenant)
        await tenant.pool.execute("delete from usage_records where charge_ucr = 60")
        assert "A6" not in await recent(tenant.pool, redis_client)
        findings = await audit.audit(tenant.pool, redis_client, LONGEST)
        assert "A6" in {finding.name for finding in findings if finding.drifted}
        fresh = entry(tenant, tenant.event(4))
        await post(tenant.pool, fresh)
        await tenant.pool.execute("delete from usage_records where charge_ucr = 4")
        assert "A6" in await recent(tenant.pool, redis_client)


async def test_what_is_being_posted_is_not_passed_over(
    database_url: str, redis_client: Redis
) -> None:
    """A transaction that began before an audit and commits after it lies behind the mark."""
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        slow = await asyncpg.connect(database_url)
        try:
            transaction = slow.transaction()
            await transaction.start()
            began = await slow.fetchval("select now()")
            for _ in range(3):
                assert await recent(pool, redis_client) <= {"R0"}
            mark = await audit_recent.mark(pool)
            assert mark is not None and mark < began
            await transaction.commit()
        finally:
            await slow.close()
        await eventually(lambda: _marked_after(pool, redis_client, began), 10)
        assert (await tenant.wallet()).balance == 100


async def _marked_after(pool: asyncpg.Pool, redis: Redis, instant: object) -> bool:
    await recent(pool, redis)
    return (await audit_recent.mark(pool)) > instant  # type: ignore[operator]
