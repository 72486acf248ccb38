"""The model and the real stores, led through the same operations and compared after each.

An operation takes three whole numbers, whatever they are, and makes something sensible of them:
so histories can be drawn by hypothesis, or by a seeded generator, and repeated from either.
"""

import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
from redis.asyncio import Redis

from accounting import (
    deltas,
    expiry,
    reckoning,
    restoring,
    reversals,
    usage_posting,
    usage_records,
    withdrawals,
)
from accounting.contract.errors import Conflict
from accounting.contract.identifiers import new_id
from accounting.contract.usage_event import UsageEvent
from accounting.usage_entries import StreamId
from accounting.usage_stream import read_range
from tests.accounting.books import assert_agree, post, started
from tests.accounting.failpoints import SEEN, Failpoints, FaultyConnection, faulty
from tests.accounting.ledger_model import NEVER, Grant, Model
from tests.accounting.scene import Boot, Tenant

KINDS = ["trial", "promo", "rollover", "plan", "topup"]
HOUR = 3300  # seconds in which everything here happens, which are over
ALWAYS = 86_400.0  # any hold may be from before any expiry
OPERATIONS = [
    *["grant", "admit", "admit", "admit", "settle", "settle", "settle", "abort"],
    *["post", "post", "crash", "duplicate", "revise", "reverse"],
    *["sweep", "sweep", "refund", "claw_back", "restore", "crash_sweep"],
]


class World:
    """One workspace in the stores, and the model of it."""

    def __init__(self, tenant: Tenant, boot: Boot) -> None:
        self.tenant, self.boot = tenant, boot
        self.now = time.time()
        self.model = Model(self.now)
        self.open: dict[str, UsageEvent] = {}
        self.told: dict[str, UsageEvent] = {}
        self.read: list[Any] = []  # entries posted before
        self.after = StreamId(0, 0)

    @classmethod
    async def make(cls, pool: asyncpg.Pool, redis: Redis) -> "World":
        """On whatever shard: what others left on its stream is passed over."""
        world = cls(await Tenant.make(pool, redis), Boot(redis))
        [snapshot] = await reckoning.snapshots(redis, [world.tenant.id])
        world.after = snapshot.position
        return world

    async def do(self, operation: str, a: int, b: int, c: int) -> None:
        """One operation, and the comparison."""
        await getattr(self, operation)(a, b, c)
        await self.compare()

    def _instant(self, n: int) -> float:
        """A whole second of that hour: no expiry is so fresh that a sweep may not see it yet."""
        return int(self.now) - HOUR - 200 + n % HOUR

    # What workers do

    async def admit(self, hold: int, at: int, _c: int) -> None:
        hold = 1 + hold % 400
        instant = self._instant(at)
        event = self.tenant.event(0, hold_ucr=hold, **started(_when(instant)))
        admitted = await self.boot.admit(self.tenant, hold)
        assert admitted == self.model.admit(event.request_id, hold)
        if admitted:
            self.open[event.request_id] = event

    async def settle(self, which: int, charge: int, _c: int) -> None:
        if self.open:
            name = list(self.open)[which % len(self.open)]
            event = self.open.pop(name)
            charge %= event.hold_ucr + 1
            event = msgspec.structs.replace(
                event, charge_ucr=charge, settlement="exact" if charge else "void"
            )
            await self.boot.settle(self.tenant, event)
            self.model.settle(name, event.started_at_us / 1e6, charge)
            self.told[name] = event

    async def abort(self, which: int, _b: int, _c: int) -> None:
        await self.settle(which, 0, 0)

    async def revise(self, which: int, charge: int, _c: int) -> None:
        """A worker tells an exchange anew; what that takes must be there."""
        if self.told:
            name = list(self.told)[which % len(self.told)]
            event = self.told[name]
            charge %= min(400, event.charge_ucr + self.model.free) + 1
            event = msgspec.structs.replace(
                event,
                charge_ucr=charge,
                hold_ucr=max(charge, event.hold_ucr),
                revision=event.revision + 1,
                replaces_ucr=event.charge_ucr,
            )
            await self.boot.tell_again(self.tenant, event)
            self.model.revise(name, charge)
            self.told[name] = event

    # What accounting does

    async def _next(self, count: int) -> list[Any]:
        entries = await read_range(
            self.tenant.redis, self.tenant.shard, self.after, StreamId(2**60, 0)
        )
        return entries[: 1 + count % len(entries)] if entries else []

    async def _posted(self, entries: list[Any]) -> None:
        self.model.post(len(entries))
        self.read += entries
        self.after = entries[-1].id
        await self._deltas()

    async def _deltas(self) -> None:
        await deltas.apply_pending(self.tenant.pool, self.tenant.redis, self.tenant.id)

    async def post(self, count: int, _b: int, _c: int) -> None:
        if entries := await self._next(count):
            await post(self.tenant.pool, *entries)
            await self._posted(entries)

    async def crash(self, count: int, at: int, answered: int) -> None:
        """Posting is killed somewhere; whether it had been done only the books can tell."""
        if not (entries := await self._next(count)):
            return
        points = Failpoints(1 + at % 25, bool(answered % 2))
        with suppress(*SEEN):
            async with self.tenant.pool.acquire() as connection:
                today = datetime.now(UTC).date()
                await usage_posting.post(FaultyConnection(points, connection), entries, today)
        if await self._watermark() >= entries[-1].id:
            await self._posted(entries)

    async def _watermark(self) -> StreamId:
        async with self.tenant.pool.acquire() as connection:
            return await usage_records.watermark(connection, self.tenant.shard)

    async def duplicate(self, first: int, count: int, _c: int) -> None:
        """What was posted is delivered once more, together with what was not."""
        if self.read:
            start = first % len(self.read)
            again = self.read[start : start + 1 + count % 5]
            again.reverse()
            await post(self.tenant.pool, *again)

    # What operators and time do

    async def grant(self, kind: int, amount: int, expires: int) -> None:
        amount, name = 1 + amount % 1500, KINDS[kind % len(KINDS)]
        taken = {one.expires for one in self.model.grants.values()}
        at = NEVER if expires % 3 == 0 else self._instant(expires)
        while at in taken and at != NEVER:
            at += 1  # sweeping takes them in the order of their expiry
        given = await self.tenant.give(name, amount, None if at == NEVER else _when(at))
        self.model.grant(Grant(given.id, name, amount, at))

    async def sweep(self, _a: int, _b: int, _c: int) -> None:
        await expiry.sweep(self.tenant.pool, self.tenant.redis, ALWAYS)
        self.model.sweep()

    async def crash_sweep(self, at: int, answered: int, _c: int) -> None:
        """A sweep is killed somewhere, and another one follows until nothing moves any more."""
        points = Failpoints(1 + at % 30, bool(answered % 2))
        with suppress(*SEEN):
            stores = faulty(points, self.tenant.pool, self.tenant.redis)
            await expiry.sweep(*stores, ALWAYS)
        for _ in range(3):
            await expiry.sweep(self.tenant.pool, self.tenant.redis, ALWAYS)
            self.model.sweep()
        await self._deltas()

    def _any_grant(self, which: int) -> str | None:
        names = list(self.model.grants)
        return names[which % len(names)] if names else None

    async def refund(self, which: int, amount: int, _c: int) -> None:
        if name := self._any_grant(which):
            amount = 1 + amount % 500
            refunded = True
            try:
                await self._withdraw(name, "refund", amount)
            except Conflict:
                refunded = False
            assert refunded == self.model.refund(name, amount)

    async def claw_back(self, which: int, only_sometimes: int, _c: int) -> None:
        name = self._any_grant(which)
        if name and only_sometimes % 4 == 0:
            taken = await self._withdraw(name, "clawback", None)
            assert taken == self.model.claw_back(name)

    async def _withdraw(self, grant_id: str, kind: Any, amount: int | None) -> int:
        pool, redis = self.tenant.pool, self.tenant.redis
        name = new_id("op")
        done = await withdrawals.withdraw(pool, redis, name, grant_id, kind, amount)
        assert await withdrawals.withdraw(pool, redis, name, grant_id, kind, amount) == done
        return done.taken_ucr

    async def reverse(self, which: int, charge: int, _c: int) -> None:
        posted = [name for name, one in self.model.requests.items() if one.charge]
        if posted:
            name = posted[which % len(posted)]
            charge %= self.model.requests[name].charge
            pool, redis, ref = self.tenant.pool, self.tenant.redis, new_id("op")
            for _ in range(2):
                await reversals.reverse(pool, redis, name, charge, source_ref=ref)
            self.model.reverse(name, charge)

    async def restore(self, _a: int, _b: int, _c: int) -> None:
        pool, redis, ref = self.tenant.pool, self.tenant.redis, new_id("op")
        parents = self.model.restorable()
        done = await restoring.restore(pool, redis, self.tenant.id, ref)
        assert done.restored_ucr == sum(parent.forfeited for parent in parents)
        for parent in parents:
            parent.restored = True
        rows = await pool.fetch(
            "select id, amount_ucr, expires_at from grants where parent_id = any($1)",
            [parent.id for parent in parents],
        )
        for grant_id, amount, expires in rows:
            at = NEVER if expires is None else expires.timestamp()
            self.model.grant(Grant(grant_id, "restored", amount, at))

    # Both alike?

    async def compare(self) -> None:
        """To the micro-credit, in every figure there is."""
        wallet, model = await self.tenant.wallet(), self.model
        alike("balance and held", (wallet.balance, wallet.held), (model.balance, model.held))
        found = {
            one.id: (one.remaining_ucr, one.consumed_ucr, one.forfeited_ucr, one.refunded_ucr)
            for one in (await self.tenant.grants()).values()
        }
        expected = {
            one.id: (one.left, one.consumed, one.forfeited, one.refunded)
            for one in model.grants.values()
        }
        alike("left, consumed, forfeited and refunded of grants", found, expected)
        rows = await self.tenant.pool.fetch(
            "select request_id, charge_ucr, revision from usage_records where workspace_id = $1",
            self.tenant.id,
        )
        posted = [one for one in model.requests.values() if one.posted is not None]
        charged = {one.id: (one.charge, one.posted) for one in posted}
        alike("charges", {row[0]: (row[1], row[2]) for row in rows}, charged)
        if self.told:
            alike("spent", await self.tenant.spent(), model.spent)

    async def settle_all(self) -> None:
        """Nothing in flight, on the stream or left of what expired: the books must be clean."""
        while self.open:
            await self.settle(0, 0, 0)
        while self.model.stream:
            await self.post(10**6 - 1, 0, 0)
        for _ in range(2):
            await self.sweep(0, 0, 0)
        await self.compare()
        await assert_agree(self.tenant)


def alike(what: str, found: Any, expected: Any) -> None:
    """What the stores say, and what the model does; of many figures, those that differ."""
    if isinstance(found, dict):
        names = {one for one in {*found, *expected} if found.get(one) != expected.get(one)}
        found = {one: found.get(one) for one in names}
        expected = {one: expected.get(one) for one in names}
    assert found == expected, f"{what}: {found}, expected {expected}"


def _when(instant: float) -> datetime:
    return datetime.fromtimestamp(instant, UTC)
