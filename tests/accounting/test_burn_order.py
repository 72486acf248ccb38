"""Twenty random grants and ten thousand usages: each is paid by whom the oracle says.

The oracle knows one rule: of the grants that may pay, the first in burn order pays first.
"""

import random
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from redis.asyncio import Redis

from accounting.contract.identifiers import ulid
from accounting.contract.usage_event import UsageEvent
from tests.accounting.books import assert_ledger_clean, entry, post
from tests.accounting.ledger_model import NEVER, ORDER
from tests.accounting.scene import Tenant, pool_on

GRANTS, USAGES = 20, 10_000
MINUTES = 55
KINDS = [kind for kind in ORDER if kind != "restored"]  # these come from other grants only


class Purse:
    """What is left of one grant."""

    def __init__(self, kind: str, expires: float, grant_id: str, left: int) -> None:
        self.rank = (ORDER.index(kind), expires, grant_id)
        self.expires, self.id, self.left = expires, grant_id, left


def pay(purses: list[Purse], at: float, amount: int) -> tuple[list[tuple[str, int]], int]:
    """Who pays how much, in order; and what nobody can pay."""
    paid = []
    while amount and any(purse.left for purse in purses):
        able = [purse for purse in purses if purse.left]
        first = min(able, key=lambda purse: (purse.expires <= at, purse.rank))
        taken = min(amount, first.left)
        first.left -= taken
        amount -= taken
        paid.append((first.id, taken))
    return paid, amount


def usage(tenant: Tenant, at: datetime, charge: int) -> UsageEvent:
    moment = int(at.timestamp() * 1000)
    return tenant.event(charge, request_id=f"req_{ulid(moment)}", started_at_us=moment * 1000)


@pytest.mark.parametrize("seed", [1, random.randrange(10**6)])
async def test_every_usage_is_paid_by_the_right_grants(
    database_url: str, redis_client: Redis, seed: int
) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        start = datetime.now(UTC) - timedelta(minutes=MINUTES + 2)
        purses = []
        for _ in range(GRANTS):
            kind, amount = chance.choice(KINDS), chance.randrange(1, 1_000_000)
            ends = chance.choice([None, start + timedelta(minutes=chance.uniform(0, MINUTES))])
            grant = await tenant.give(kind, amount, ends)
            purses.append(Purse(kind, ends.timestamp() if ends else NEVER, grant.id, amount))
        expected, owed, left = {}, 0, USAGES
        while left:
            size = min(left, chance.randrange(1, 1500))
            left -= size
            instants = [start + timedelta(minutes=chance.uniform(0, MINUTES)) for _ in range(size)]
            events = [usage(tenant, at, chance.randrange(1, 2000)) for at in instants]
            await post(pool, *(entry(tenant, *events[n : n + 100]) for n in range(0, size, 100)))
            for event in sorted(events, key=lambda one: (one.started_at_us, one.request_id)):
                at = event.started_at_us / 1e6
                expected[event.request_id], short = pay(purses, at, event.charge_ucr)
                owed += short
        rows = await pool.fetch("select request_id, burns from usage_records")
        found = {row[0]: msgspec.json.decode(row[1], type=list[tuple[str, int]]) for row in rows}
        assert found == expected
        remaining = {one.id: one.remaining_ucr for one in (await tenant.grants()).values()}
        assert remaining == {purse.id: purse.left for purse in purses}
        sql = (
            "select coalesce(sum(debits_ucr - credits_ucr), 0) from ledger_accounts where kind = $1"
        )
        assert await pool.fetchval(sql, "receivable") == owed
        await assert_ledger_clean(pool)
