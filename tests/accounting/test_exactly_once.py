"""However often, in whatever order and to how many an entry is delivered: it counts once.

And what is no usage event at all is set aside with an alarm, and hinders nothing behind it.
"""

import asyncio
import logging
import random
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import usage_posting
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import stream_key
from accounting.contract.money import MAX_UCR
from accounting.contract.usage_event import SCHEMA, UsageEvent, encode_event
from accounting.usage_entries import Entry
from tests.accounting.books import assert_agree, assert_clean, on_stream, post
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on
from tests.accounting.test_consumer import consuming, settings_for
from tests.waiting import eventually


async def told_again(boot: Boot, tenant: Tenant, event: UsageEvent, charge_ucr: int) -> None:
    again = msgspec.structs.replace(
        event, charge_ucr=charge_ucr, hold_ucr=PLENTY, revision=1, replaces_ucr=event.charge_ucr
    )
    await boot.tell_again(tenant, again)


@pytest.mark.parametrize("seed", [1, 2, random.randrange(10**6)])
async def test_several_times_out_of_order_to_two_consumers_at_once(
    database_url: str, redis_client: Redis, seed: int
) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with pool_on(database_url, size=6) as pool:
        tenants = [await Tenant.make(pool, redis_client, PLENTY, shard=5) for _ in range(4)]
        boot, charged = Boot(redis_client), 0
        for _ in range(60):
            tenant, charge = chance.choice(tenants), chance.randrange(500)
            event = await boot.serve(tenant, charge)
            if not chance.randrange(5):
                charge = chance.randrange(500)
                await told_again(boot, tenant, event, charge)
            charged += charge
        entries = await on_stream(tenants[0])

        async def consume(chance: random.Random) -> None:
            deliveries = entries * 3
            chance.shuffle(deliveries)
            async with pool.acquire() as connection:
                while deliveries:
                    size = chance.randrange(1, 30)
                    batch, deliveries = deliveries[:size], deliveries[size:]
                    await _post_until_taken(connection, batch)

        await asyncio.gather(*(consume(random.Random(seed + n)) for n in range(2)))
        assert await pool.fetchval("select sum(charge_ucr)::bigint from usage_records") == charged
        assert await pool.fetchval("select count(*) from usage_records") == 60
        await redis_client.xtrim(stream_key(5), maxlen=0, approximate=False)
        await assert_clean(pool, redis_client)


async def _post_until_taken(connection: Any, batch: list[Entry]) -> None:
    """As the consumer does: a deadlock of two transactions ends one, which is tried again."""
    while True:
        try:
            await usage_posting.post(connection, batch, datetime.now(UTC).date())
            return
        except asyncpg.DeadlockDetectedError:
            continue


def poisons() -> dict[str, bytes]:
    """Each way in which an event can be unfit, and the bytes of it; none names a tenant."""
    whole = msgspec.msgpack.decode(encode_event(_event()))
    place = {name: n for n, name in enumerate(UsageEvent.__struct_fields__)}

    def changed(**fields: Any) -> bytes:
        copy = list(whole)
        for name, value in fields.items():
            copy[place[name]] = value
        return msgspec.msgpack.encode([copy])

    return {
        "a negative charge": changed(charge_ucr=-5),
        "a huge charge": changed(charge_ucr=MAX_UCR + 1, hold_ucr=MAX_UCR + 1),
        "a charge beyond 64 bits": changed(charge_ucr=2**64 - 1, hold_ucr=2**64 - 1),
        "half a micro-credit": changed(charge_ucr=1.5),
        "a charge in words": changed(charge_ucr="seven"),
        "no charge": changed(charge_ucr=None),
        "a charge above its hold": changed(charge_ucr=10, hold_ucr=9),
        "too few fields": msgspec.msgpack.encode([whole[:-5]]),
        "too many fields": msgspec.msgpack.encode([[*whole, 1]]),
        "an object in place of an array": msgspec.msgpack.encode([{"charge_ucr": 5}]),
        "an unknown workspace": changed(),
        "another schema version": changed(schema=SCHEMA + 1),
        "no schema version": changed(schema=None),
        "a foreign request id": changed(request_id="chatcmpl-123"),
        "a request id of null": changed(request_id=None),
        "a time long ago": changed(started_at_us=1),
        "tokens below zero": changed(tokens=[-1, 0, 0, 0, 0, 0, 0]),
        "no list": b"\x01",
        "no MessagePack": b"\xc1\xff",
        "half a list": b"\x92\x01",
        "nothing": b"",
    }


def _event() -> UsageEvent:
    return Tenant(None, None, new_id("ws"), new_id("key")).event(5)


POISONS = poisons()


@pytest.mark.parametrize("poison", list(POISONS))
async def test_poison_is_set_aside_and_what_follows_is_posted(
    database_url: str, redis_client: Redis, poison: str
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, 100)
        boot = Boot(redis_client)
        await boot.serve(tenant, 3)
        await redis_client.xadd(stream_key(tenant.shard), {"e": POISONS[poison]})
        await boot.serve(tenant, 4)
        entries = await on_stream(tenant)
        posted = await post(pool, *entries)
        assert (posted.new, posted.quarantined) == (2, 1)
        assert (await post(pool, *entries)).quarantined == 0
        [kept] = await pool.fetch("select reason, body from quarantine")
        assert kept["reason"]
        assert kept["body"] in POISONS[poison]
        await assert_agree(tenant)


async def test_poison_raises_an_alarm_once_and_blocks_no_shard(
    database_url: str, redis_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A metric that counts each, and one line, however much of it comes."""
    caplog.set_level(logging.ERROR, "tollgate.accounting")
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        settings = settings_for(database_url, redis_url, accounting_batch=2)
        async with consuming(settings) as counters:
            for n in range(1, 11):
                await redis_client.xadd(stream_key(tenant.shard), {"e": b"poison %d" % n})
                await boot.serve(tenant, n)
                await eventually(lambda n=n: (counters.events, counters.quarantined) == (n, n))
            await assert_clean(pool, redis_client)
    assert [record.getMessage() for record in caplog.records] == [
        "usage events go to quarantine: 1 so far"
    ]


async def test_one_that_the_database_refuses_blocks_its_shard_for_some_tries_only(
    database_url: str, redis_url: str, redis_client: Redis
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        await pool.execute(
            "create function refuse() returns trigger language plpgsql as"
            " $$ begin if new.charge_ucr = 13 then raise check_violation; end if;"
            " return new; end $$;"
            "create trigger refuse before insert on usage_records"
            " for each row execute function refuse()"
        )
        settings = settings_for(database_url, redis_url, accounting_deliveries=2)
        async with consuming(settings) as counters:
            for charge in (1, 13, 2, 13, 3):
                await boot.serve(tenant, charge)
            await eventually(lambda: (counters.events, counters.quarantined) == (3, 2))
            await assert_clean(pool, redis_client)
