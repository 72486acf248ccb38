"""A batch into the ledger: exactly once, all or nothing, every micro-credit explained."""

import asyncio
import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import audit_ledger, usage_entries, usage_posting
from accounting.contract.identifiers import new_id, ulid
from accounting.contract.usage_event import TokenUsage, UsageEvent, encode_event, join_events
from accounting.postings import PRIORITIES
from accounting.usage_entries import Entry, StreamId
from accounting.usage_posting import Posted
from tests.accounting.scene import PLENTY, Tenant, make_event, pool_on

LATER = datetime(2100, 1, 1, tzinfo=UTC)
_positions = itertools.count(1)


def entry(tenant: Tenant, *events: UsageEvent) -> Entry:
    body = join_events([encode_event(event) for event in events])
    return Entry(tenant.shard, StreamId(1000, next(_positions)), body)


async def post(pool: asyncpg.Pool, *entries: Entry, reason: str | None = None) -> Posted:
    async with pool.acquire() as connection:
        return await usage_posting.post(connection, entries, datetime.now(UTC).date(), reason)


async def clean(pool: asyncpg.Pool) -> bool:
    findings = await audit_ledger.check(pool, 86_400)
    assert [finding for finding in findings if finding.drifted] == []
    return True


async def column(pool: asyncpg.Pool, sql: str) -> list[Any]:
    return [row[0] for row in await pool.fetch(sql)]


async def test_a_batch_is_one_journal_per_workspace(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        one, two = [await Tenant.make(pool, redis_client, 1000) for _ in range(2)]
        posted = await post(
            pool, entry(one, one.event(10), one.event(20)), entry(one, one.event(5), two.event(7))
        )
        assert posted == Posted(new=4)
        journals = await column(pool, "select workspace_id from journals where kind = 'usage'")
        assert sorted(journals) == sorted([one.id, two.id])
        assert [grant.remaining_ucr for grant in (await one.grants()).values()] == [965]
        assert [grant.remaining_ucr for grant in (await two.grants()).values()] == [993]
        assert await clean(pool)


async def test_a_row_carries_the_whole_event(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        tokens = TokenUsage(100, 20, 30, 4, 5, 6, 7)
        event = tenant.event(
            10, tokens=tokens, hold_ucr=99, overrun_ucr=3, settlement="estimated",
            outcome="client_left", fallback_depth=2, streamed=False,
        )  # fmt: skip
        await post(pool, entry(tenant, event))
        row = dict(await pool.fetchrow("select * from usage_records"))
        [grant] = await tenant.grants()
        assert row.pop("burns") == f'[["{grant}", 10]]'
        assert row.pop("started_at") == datetime.fromtimestamp(event.started_at_us / 1e6, UTC)
        for field in UsageEvent.__struct_fields__:
            if field not in {"schema", "tokens", "started_at_us", "replaces_ucr"}:
                assert row[field] == getattr(event, field), field
        for field in TokenUsage.__struct_fields__:
            assert row[f"{field}_tokens"] == getattr(tokens, field)


async def test_what_is_delivered_again_is_posted_once(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        first = entry(tenant, tenant.event(10), tenant.event(20))
        assert await post(pool, first) == Posted(new=2)
        assert await post(pool, first) == Posted(duplicates=2)
        again = usage_entries.read(first, datetime.now(UTC).date())[0][0].event
        both = entry(tenant, again, tenant.event(4))
        assert await post(pool, both) == Posted(new=1, duplicates=1)
        assert [grant.remaining_ucr for grant in (await tenant.grants()).values()] == [966]
        assert await clean(pool)


async def test_a_request_twice_in_one_batch_is_posted_once(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        event = tenant.event(10)
        posted = await post(pool, entry(tenant, event, event), entry(tenant, event))
        assert posted == Posted(new=1, duplicates=2)
        assert await clean(pool)


async def test_two_consumers_with_the_same_entries_post_them_once(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url, size=8) as pool:
        tenants = [await Tenant.make(pool, redis_client, PLENTY) for _ in range(3)]
        entries = [entry(tenant, *(tenant.event(7) for _ in range(5))) for tenant in tenants * 4]
        found = await asyncio.gather(*(post(pool, *entries) for _ in range(4)))
        assert sorted(posted.new for posted in found) == [0, 0, 0, 60]
        assert await clean(pool)


async def test_a_void_is_recorded_and_costs_nothing(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        await post(pool, entry(tenant, tenant.event(0, status=502, outcome="provider_failed")))
        row = await pool.fetchrow("select requests, errors, charge_ucr from usage_hourly")
        assert tuple(row) == (1, 1, 0)
        assert await column(pool, "select journal_id from usage_records") == [None]
        assert await column(pool, "select id from journals where kind = 'usage'") == []
        assert await clean(pool)


async def test_rollups_are_per_hour_model_and_key(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)

        def at(moment: datetime, **changes: Any) -> UsageEvent:
            request_id = "req_" + ulid(int(moment.timestamp() * 1000))
            started = int(moment.timestamp()) * 1_000_000
            event = tenant.event(3, request_id=request_id, started_at_us=started)
            return msgspec.structs.replace(event, **changes)

        await post(pool, entry(tenant, at(now), at(now + timedelta(minutes=59))))
        await post(pool, entry(tenant, at(now), at(now, model="other"), at(now, key_id="other")))
        await post(pool, entry(tenant, at(now - timedelta(seconds=1))))
        rows = await pool.fetch(
            "select hour, model, key_id, requests, input_tokens, charge_ucr from usage_hourly"
            " order by 1, 2, 3"
        )
        model, key = "gpt-4o-mini", tenant.key_id
        assert [tuple(row) for row in rows] == [
            (now - timedelta(hours=1), model, key, 1, 100, 3),
            (now, model, key, 3, 300, 9),
            (now, model, "other", 1, 100, 3),
            (now, "other", key, 1, 100, 3),
        ]
        assert await clean(pool)


async def test_a_charge_beyond_the_wallet_becomes_a_receivable(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 10)
        await post(pool, entry(tenant, tenant.event(25)))
        owed = "select debits_ucr - credits_ucr from ledger_accounts where kind = 'receivable'"
        assert await column(pool, owed) == [15]
        types = "select type from outbox order by id"
        assert await column(pool, types) == ["grant.issued", "grant.exhausted", "wallet.overdrawn"]
        assert await clean(pool)


async def test_events_that_cannot_be_posted_go_to_quarantine_and_the_rest_does_not(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        stranger = make_event(new_id("ws"), "key", 9)
        batch = [
            entry(tenant, tenant.event(1), stranger, tenant.event(2, status=-5)),
            Entry(tenant.shard, StreamId(1000, next(_positions)), b"garbage"),
            entry(tenant, tenant.event(4)),
        ]
        assert await post(pool, *batch) == Posted(new=2, quarantined=3)
        assert await post(pool, *batch) == Posted(duplicates=2)
        rows = await pool.fetch(
            "select position, workspace_id, charge_ucr from quarantine order by stream_id, position"
        )
        assert [tuple(row) for row in rows] == [
            (1, stranger.workspace_id, 9),
            (2, tenant.id, 2),
            (-1, None, None),
        ]
        assert await clean(pool)


async def test_a_condemned_entry_is_kept_whole(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        one = entry(tenant, tenant.event(1), tenant.event(2))
        assert await post(pool, one, reason="refused") == Posted(quarantined=2)
        assert await column(pool, "select sum(charge_ucr) from quarantine") == [3]
        assert await column(pool, "select request_id from usage_records") == []


async def test_offsets_move_with_the_money_and_never_back(
    database_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        first, second = entry(tenant, tenant.event(1)), entry(tenant, tenant.event(2))
        offsets = "select last_seq from stream_offsets"
        await post(pool, second)
        await post(pool, first)
        assert await column(pool, offsets) == [second.id.seq]


async def test_a_failing_batch_leaves_nothing(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        await pool.execute(
            "create function refuse() returns trigger language plpgsql as"
            " $$ begin raise check_violation; end $$;"
            "create trigger refuse before insert on transfers execute function refuse()"
        )
        one = entry(tenant, tenant.event(1))
        with pytest.raises(asyncpg.CheckViolationError):
            await post(pool, one)
        for table in ("usage_records", "usage_hourly", "stream_offsets"):
            assert await column(pool, f"select count(*) from {table}") == [0]
        assert await clean(pool)
        await pool.execute("drop trigger refuse on transfers")
        assert await post(pool, one) == Posted(new=1)


async def test_a_day_without_a_partition_gets_one(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 1000)
        at = datetime.now(UTC) - timedelta(days=20)
        request_id = "req_" + ulid(int(at.timestamp() * 1000))
        event = tenant.event(
            1, request_id=request_id, started_at_us=int(at.timestamp() * 1_000_000)
        )
        assert await post(pool, entry(tenant, event)) == Posted(new=1)
        assert await column(pool, "select day from usage_records") == [at.date()]


@pytest.mark.parametrize("seed", [1, 2, random.randrange(10**6)])
async def test_random_histories_agree_with_the_simplest_model(
    database_url: str, redis_client: Redis, seed: int
) -> None:
    """Grants of every kind, batches of any size: each grant ends with what the model says."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        start = datetime.now(UTC) - timedelta(minutes=50)
        left: dict[str, tuple[int, float, str, int]] = {}  # priority, expiry, id, µcr
        owed = 0
        for _ in range(20):
            kind = chance.choice([kind for kind in PRIORITIES if kind != "restored"])
            expires = chance.choice([None, start + timedelta(minutes=chance.randrange(60))])
            grant = await tenant.give(kind, chance.randrange(1, 20_000), expires)
            repaid = min(owed, grant.amount_ucr)
            owed -= repaid
            ends = expires.timestamp() if expires else float("inf")
            left[grant.id] = (PRIORITIES[kind], ends, grant.id, grant.amount_ucr - repaid)
            events = []
            for _ in range(chance.randrange(40)):
                at = start + timedelta(seconds=chance.randrange(3000))
                events.append(
                    tenant.event(
                        chance.randrange(1, 800),
                        request_id="req_" + ulid(int(at.timestamp() * 1000)),
                        started_at_us=int(at.timestamp() * 1_000_000),
                    )
                )
            await post(pool, *(entry(tenant, event) for event in events))
            for event in sorted(events, key=lambda e: (e.started_at_us, e.request_id)):
                owed += charge(left, event.started_at_us / 1_000_000, event.charge_ucr)
        found = {grant.id: grant.remaining_ucr for grant in (await tenant.grants()).values()}
        assert found == {grant_id: one[3] for grant_id, one in left.items()}
        assert await clean(pool)


def charge(left: dict[str, tuple[int, float, str, int]], at: float, amount: int) -> int:
    """Take from the first grant that may pay until nothing is due; what nobody can pay."""
    while amount:
        able = [one for one in left.values() if one[3]]
        if not able:
            return amount
        best = min(able, key=lambda one: (one[1] <= at, one))
        taken = min(amount, best[3])
        left[best[2]] = (*best[:3], best[3] - taken)
        amount -= taken
    return 0
