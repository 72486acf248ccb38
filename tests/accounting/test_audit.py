"""The audit: clean on a live system under load, and no injected fault goes unseen."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import audit, expiry, reversals, usage_posting
from accounting.audit import as_json, as_text
from accounting.audit_ledger import INVARIANTS, Finding
from accounting.consumer import Consumer
from accounting.contract.keyspace import (
    EPOCH,
    STREAM_GROUP,
    KeyCounters,
    Wallet,
    stream_key,
    workspace_key,
)
from accounting.contract.settings import Secret, Settings
from accounting.counters import Counters
from accounting.store_states import StoreStates
from accounting.usage_entries import START, StreamId
from accounting.usage_stream import read_range
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on
from tests.waiting import eventually

LONGEST = 900.0
NAMES = [invariant.name for invariant in INVARIANTS] + ["R0", "R1", "R2", "R3", "R6"]


async def drifted(pool: asyncpg.Pool, redis: Redis) -> dict[str, str | None]:
    findings = await audit.audit(pool, redis, LONGEST)
    assert [finding.name for finding in findings] == NAMES
    return {finding.name: finding.first for finding in findings if finding.drifted}


async def post_everything(pool: asyncpg.Pool, redis: Redis, shard: int) -> None:
    entries = await read_range(redis, shard, START, StreamId(2**60, 0))
    async with pool.acquire() as connection:
        await usage_posting.post(connection, entries, datetime.now(UTC).date())


@asynccontextmanager
async def seeded(database_url: str, redis: Redis) -> AsyncIterator[Tenant]:
    """A tenant with some of everything behind it, posted but for the last exchange."""
    async with pool_on(database_url) as pool:
        await redis.set(EPOCH, "filled")
        tenant = await Tenant.make(pool, redis, 10_000)
        await tenant.give("trial", 50)
        await tenant.give("promo", 30, datetime.now(UTC) - timedelta(hours=1))
        boot = Boot(redis)
        for charge in (60, 0, 7):
            event = await boot.serve(tenant, charge)
        await post_everything(pool, redis, tenant.shard)
        event = await boot.serve(tenant, 21)
        await post_everything(pool, redis, tenant.shard)
        await reversals.reverse(pool, redis, event.request_id, 6, source_ref="op_seed")
        await expiry.sweep(pool, redis, LONGEST)
        await redis.xadd(stream_key(tenant.shard), {"e": b"garbage"})
        await post_everything(pool, redis, tenant.shard)
        assert await boot.admit(tenant, 40)
        await boot.serve(tenant, 9)
        yield tenant


async def test_a_sound_system_is_clean(database_url: str, redis_client: Redis) -> None:
    async with seeded(database_url, redis_client) as tenant:
        findings = await audit.audit(tenant.pool, redis_client, LONGEST)
        assert {f.name: f.checked for f in findings} == {
            "A1": 9 + 3,  # the house's accounts and the tenant's wallets
            "A2": 1,
            "A3": 3,
            "A4": 3,
            "A5": 3,
            "A6": 3,
            "A7": 1,
            "A10": 1,
            "A11": 5,
            "A12": 2,
            "A13": 1,
            "R0": 1,
            "R1": 1,
            "R2": 1,
            "R3": 5,
            "R6": 1,
        }
        assert [finding for finding in findings if finding.drifted] == []


LEDGER_FAULTS = {
    "a double transfer": (
        "insert into transfers select journal_id, 99, debit_id, credit_id, amount_ucr, grant_id,"
        " code from transfers where code = 10 limit 1",
        {"A1", "A5", "A6", "A12"},
    ),
    "a lost transfer": ("delete from transfers where code = 10", {"A1", "A5", "A6", "A12"}),
    "one side of an account": (
        "update ledger_accounts set debits_ucr = debits_ucr + 1 where kind = 'promo_cost'",
        {"A1", "A2"},
    ),
    "a wallet below zero": (
        "alter table ledger_accounts drop constraint no_wallet_below_zero;"
        "update ledger_accounts set debits_ucr = credits_ucr + 5 where kind = 'wallet_trial'",
        {"A1", "A2", "A3", "A4", "R1"},
    ),
    "a grant consumed by nothing": (
        "update grants set consumed_ucr = consumed_ucr + 3 where kind = 'topup'",
        {"A4", "A5"},
    ),
    "a grant that grew": (
        "update grants set amount_ucr = amount_ucr + 3 where kind = 'topup'",
        {"A4", "A5"},
    ),
    "a lost usage row": ("delete from usage_records where charge_ucr = 7", {"A6", "A10", "A12"}),
    "a changed charge": (
        "update usage_records set charge_ucr = charge_ucr + 1 where charge_ucr = 7",
        {"A6", "A10"},
    ),
    "a lost revision": ("delete from usage_revisions", {"A6", "A12", "A13"}),
    "wrong sources": (
        "update usage_records set burns = '[[\"grant_x\", 7]]' where charge_ucr = 7",
        {"A12"},
    ),
    "an expired grant that was forgotten": (
        "update grants set expires_at = now() - interval '1 day' where kind = 'topup'",
        {"A7"},
    ),
    "a rollup too many": (
        "insert into usage_hourly select workspace_id, hour + interval '1 hour', model, key_id,"
        " 1, 0, 0, 0, 0, 0, 0, 0, 0, 0 from usage_hourly",
        {"A10"},
    ),
    "a rollup's tokens": ("update usage_hourly set output_tokens = 0", {"A10"}),
    "a journal nobody was told of": ("delete from outbox where type = 'grant.expired'", {"A11"}),
}


@pytest.mark.parametrize("fault", LEDGER_FAULTS)
async def test_a_fault_in_the_ledger_is_caught(
    database_url: str, redis_client: Redis, fault: str
) -> None:
    sql, caught = LEDGER_FAULTS[fault]
    async with seeded(database_url, redis_client) as tenant:
        assert await drifted(tenant.pool, redis_client) == {}
        await tenant.pool.execute(sql)
        found = await drifted(tenant.pool, redis_client)
        money = caught | {"R3"} if fault == "a lost usage row" else caught
        assert set(found) == money
        if caught.isdisjoint({"A2", "A12"}):
            assert all(tenant.id in str(first) for first in found.values())


async def test_a_journal_without_its_delta_is_caught(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        await tenant.pool.execute("delete from redis_deltas where delta_id = 2")
        assert set(await drifted(tenant.pool, redis_client)) == {"A11"}


async def test_every_invariant_has_its_fault() -> None:
    caught = set().union(*(names for _sql, names in LEDGER_FAULTS.values()))
    assert {invariant.name for invariant in INVARIANTS} <= caught


async def change_wallet(tenant: Tenant, **changes: int) -> None:
    wallet = msgspec.structs.replace(await tenant.wallet(), **changes)
    await tenant.redis.hset(workspace_key(tenant.id), "w", msgspec.msgpack.encode(wallet))


async def test_faults_in_redis_are_caught(database_url: str, redis_client: Redis) -> None:
    async with seeded(database_url, redis_client) as tenant:
        key, pool = workspace_key(tenant.id), tenant.pool
        whole = await redis_client.hgetall(key)
        wallet: Wallet = await tenant.wallet()

        async def caught() -> dict[str, str | None]:
            found = await drifted(pool, redis_client)
            await redis_client.hset(key, mapping=whole)
            assert await drifted(pool, redis_client) == {}
            return found

        await change_wallet(tenant, balance=wallet.balance + 1)
        found = await caught()
        assert set(found) == {"R1"}
        assert f"{tenant.id}: Redis {wallet.balance + 1}, expected {wallet.balance}" in str(found)

        await change_wallet(tenant, held=wallet.held + 1)
        assert set(await caught()) == {"R2"}

        counters = msgspec.msgpack.decode(whole[f"c:{tenant.key_id}".encode()], type=KeyCounters)
        for change, name in [({"spent_ucr": 1}, "R6"), ({"held_ucr": 1}, "R2")]:
            other = msgspec.structs.replace(counters, **change)
            await redis_client.hset(key, f"c:{tenant.key_id}", msgspec.msgpack.encode(other))
            found = await caught()
            assert set(found) == {name}
            assert tenant.key_id in str(found[name])

        [lease] = [field for field in whole if field.startswith(b"l:")]
        await redis_client.hdel(key, lease)
        assert set(await caught()) == {"R2"}

        await redis_client.delete(key)
        assert set(await caught()) == {"R1", "R6"}

        await redis_client.delete(EPOCH)
        assert set(await drifted(pool, redis_client)) == {"R0"}


async def test_deltas_that_wait_are_no_drift(database_url: str, redis_client: Redis) -> None:
    async with seeded(database_url, redis_client) as tenant:
        before = await redis_client.hget(workspace_key(tenant.id), "w")
        await tenant.give("promo", 17)
        await redis_client.hset(workspace_key(tenant.id), "w", before)
        assert await drifted(tenant.pool, redis_client) == {}


async def test_a_lost_stream_is_caught(database_url: str, redis_client: Redis) -> None:
    async with seeded(database_url, redis_client) as tenant:
        await redis_client.xtrim(stream_key(tenant.shard), maxlen=0, approximate=False)
        assert set(await drifted(tenant.pool, redis_client)) == {"R1", "R6"}


async def test_a_watermark_beyond_what_is_posted_is_caught(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        await tenant.pool.execute("update stream_offsets set last_ms = last_ms + 60000")
        found = await drifted(tenant.pool, redis_client)
        assert set(found) == {"R1", "R3", "R6"}
        assert tenant.id in str(found["R3"])


async def test_a_pending_entry_that_is_gone_is_caught(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        stream = stream_key(tenant.shard)
        await redis_client.xgroup_create(stream, STREAM_GROUP, "0")
        await redis_client.xreadgroup(STREAM_GROUP, "shard", {stream: ">"})
        assert await drifted(tenant.pool, redis_client) == {}
        await redis_client.xtrim(stream, maxlen=0, approximate=False)
        assert "gone, not posted" in str((await drifted(tenant.pool, redis_client))["R3"])


async def test_quarantined_charges_count_until_resolved(
    database_url: str, redis_client: Redis
) -> None:
    async with seeded(database_url, redis_client) as tenant:
        boot = Boot(redis_client)
        event = tenant.event(11, hold_ucr=20)
        assert await boot.admit(tenant, 20)
        await boot.settle(tenant, msgspec.structs.replace(event, status=-1))
        assert await drifted(tenant.pool, redis_client) == {}
        await post_everything(tenant.pool, redis_client, tenant.shard)
        assert await tenant.pool.fetchval("select count(*) from quarantine") == 2
        assert await drifted(tenant.pool, redis_client) == {}
        await tenant.pool.execute("update quarantine set resolved_at = now()")
        assert set(await drifted(tenant.pool, redis_client)) == {"R1", "R6"}


async def test_usage_settled_again_after_a_rollback_counts_once(
    database_url: str, redis_client: Redis
) -> None:
    """Redis loses its last second: what was posted from it is settled again, and posted once."""
    async with seeded(database_url, redis_client) as tenant:
        before = await redis_client.hgetall(workspace_key(tenant.id))
        boot = Boot(redis_client)
        event = await boot.serve(tenant, 13)
        await post_everything(tenant.pool, redis_client, tenant.shard)
        await redis_client.delete(workspace_key(tenant.id))
        await redis_client.hset(workspace_key(tenant.id), mapping=before)
        assert "R1" in await drifted(tenant.pool, redis_client)
        again = Boot(redis_client)
        assert await again.admit(tenant, event.hold_ucr)
        await again.settle(tenant, event)
        assert await drifted(tenant.pool, redis_client) == {}
        await post_everything(tenant.pool, redis_client, tenant.shard)
        assert await drifted(tenant.pool, redis_client) == {}


async def test_it_is_exact_while_everything_moves(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    """Admitted, settled, posted, granted and expired meanwhile; audited again and again."""
    settings = Settings(
        database_url=Secret(database_url),
        redis_url=Secret(redis_url),
        accounting_wait_seconds=0.05,
        accounting_batch=20,
    )
    async with pool_on(database_url, size=8) as pool:
        await redis_client.set(EPOCH, "filled")
        tenants = [await Tenant.make(pool, redis_client, PLENTY, shard=n % 3) for n in range(6)]
        consumer = Consumer(settings, pool, redis_client, Counters(), StoreStates())
        consuming = asyncio.create_task(consumer.run())
        busy = True

        async def serve(seed: int) -> None:
            chance, boot = random.Random(seed), Boot(redis_client)
            while busy:
                tenant = chance.choice(tenants)
                hold = chance.randrange(1, 500)
                assert await boot.admit(tenant, hold)
                await boot.settle(tenant, tenant.event(chance.randrange(hold + 1), hold_ucr=hold))

        async def give() -> None:
            while busy:
                soon = datetime.now(UTC) - timedelta(seconds=1)
                await random.choice(tenants).give("trial", 1000, soon)
                await expiry.sweep(pool, redis_client, 0.0)

        load = [asyncio.create_task(task) for task in (serve(1), serve(2), give())]
        for _ in range(12):
            assert await drifted(pool, redis_client) == {}
        busy = False
        await asyncio.gather(*load)
        await eventually(lambda: _posted(redis_client))
        assert await drifted(pool, redis_client) == {}
        consumer.stop()
        await consuming


async def _posted(redis: Redis) -> bool:
    return not any([await redis.xlen(stream_key(shard)) for shard in range(3)])


def test_findings_are_shown_as_lines_and_as_json() -> None:
    findings = [Finding("A1", "totals", 12, 0, None), Finding("R1", "balances", 5, 2, "ws_1: …")]
    assert as_text(findings).splitlines() == [
        "ok    A1   totals: 12 checked",
        "DRIFT R1   balances: 5 checked, 2 drifted, first: ws_1: …",
    ]
    shown = msgspec.json.decode(as_json(findings))
    assert shown["drifted"] == 2
    assert shown["findings"][1] == findings[1]._asdict()
