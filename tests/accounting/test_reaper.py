"""What workers of a lost host lease is given back, when its time is up and not before."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from accounting import audit, reaper
from accounting.contract import keyspace, scripts
from accounting.contract.keyspace import CLOCK, EPOCH, FENCED, HEARD
from accounting.contract.settings import SHARDS
from accounting.deltas import RESERVE
from tests.accounting.scene import Boot, Tenant, pool_on

SILENCE = 900.0


@pytest.fixture
async def pool(database_url: str, redis_client: Redis) -> AsyncIterator[asyncpg.Pool]:
    await redis_client.set(EPOCH, "filled")
    async with pool_on(database_url) as pool:
        yield pool


async def pass_time(redis: Redis, seconds: float) -> None:
    """Redis and accounting were both there for so long."""
    await redis.hincrby(CLOCK, "ms", int(seconds * 1000))


async def beat(redis: Redis, boot: str) -> int:
    return int(await scripts.call(redis, "beat", [HEARD, FENCED, CLOCK], [boot]))


async def clean(pool: asyncpg.Pool, redis: Redis) -> bool:
    return not any(finding.drifted for finding in await audit.audit(pool, redis, 900))


async def test_a_lost_hosts_holds_come_back_when_its_time_is_up(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    first, second = [await Tenant.make(pool, redis_client, 1000) for _ in range(2)]
    boot = Boot(redis_client)
    await beat(redis_client, boot.name)
    for tenant in (first, second):
        assert await boot.admit(tenant, 700)
    await reaper.reap(redis_client, SILENCE)
    await pass_time(redis_client, SILENCE - 5)
    assert await reaper.reap(redis_client, SILENCE) == []
    assert not await Boot(redis_client).admit(first, 700)
    await pass_time(redis_client, 10)
    assert await reaper.reap(redis_client, SILENCE) == [boot.name]
    for tenant in (first, second):
        assert (await tenant.wallet()).held == 0
        assert await Boot(redis_client).admit(tenant, 700)
    assert await clean(pool, redis_client)
    assert await reaper.reap(redis_client, SILENCE) == []


async def test_a_worker_that_is_heard_again_in_time_survives(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    boot = Boot(redis_client)
    await beat(redis_client, boot.name)
    event = tenant.event(30, hold_ucr=700)
    assert await boot.admit(tenant, 700)
    await reaper.reap(redis_client, SILENCE)
    for _ in range(3):
        await pass_time(redis_client, SILENCE - 5)
        assert await beat(redis_client, boot.name) == 1
        assert await reaper.reap(redis_client, SILENCE) == []
    await boot.settle(tenant, event)
    assert (await tenant.wallet()).balance == 970


async def test_a_reaped_worker_that_comes_back_can_neither_lease_nor_settle(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    boot = Boot(redis_client)
    await beat(redis_client, boot.name)
    event = tenant.event(30, hold_ucr=700)
    assert await boot.admit(tenant, 700)
    await reaper.reap(redis_client, SILENCE)
    await pass_time(redis_client, SILENCE + 1)
    await reaper.reap(redis_client, SILENCE)
    assert await beat(redis_client, boot.name) == 0
    with pytest.raises(ResponseError, match="FENCED"):
        await boot.admit(tenant, 1)
    with pytest.raises(ResponseError, match="FENCED"):
        await boot.settle(tenant, event)
    wallet = await tenant.wallet()
    assert (wallet.balance, wallet.held) == (1000, 0)
    assert await clean(pool, redis_client)


async def test_the_reservation_of_expiring_credits_is_left_alone(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    key = keyspace.workspace_key(tenant.id)
    packed = await redis_client.hget(key, "w")
    assert isinstance(packed, bytes)
    wallet = msgspec.msgpack.decode(packed, type=keyspace.Wallet)
    reserved = msgspec.structs.replace(wallet, held=250)
    lease = msgspec.msgpack.encode(keyspace.LeaseRecord(250))
    await redis_client.hset(
        key, mapping={"w": msgspec.msgpack.encode(reserved), f"l:{RESERVE}:grant_1": lease}
    )
    await reaper.reap(redis_client, SILENCE)
    await pass_time(redis_client, 10 * SILENCE)
    assert await reaper.reap(redis_client, SILENCE) == []
    assert (await tenant.wallet()).held == 250


async def test_two_reapers_at_once_give_back_once(pool: asyncpg.Pool, redis_client: Redis) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    boot, other = Boot(redis_client), Boot(redis_client)
    await beat(redis_client, boot.name)
    assert await boot.admit(tenant, 300) and await other.admit(tenant, 200)
    await reaper.reap(redis_client, SILENCE)
    await pass_time(redis_client, SILENCE + 1)
    await asyncio.gather(*(reaper.reap(redis_client, SILENCE) for _ in range(4)))
    assert (await tenant.wallet()).held == 200
    assert await clean(pool, redis_client)


class LosesConnection:
    """A Redis whose n-th step fails: a single call, or a whole pipeline."""

    def __init__(self, redis: Redis, steps: int) -> None:
        self._redis = redis
        self._left = steps

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise RedisConnectionError

    async def evalsha(self, *words: object) -> object:
        self._step()
        return await self._redis.evalsha(*words)  # type: ignore[arg-type]

    async def eval(self, *words: object) -> object:
        return await self._redis.eval(*words)  # type: ignore[arg-type]

    async def script_load(self, source: str) -> object:
        return await self._redis.script_load(source)

    def pipeline(self, transaction: bool) -> object:
        self._step()
        return self._redis.pipeline(transaction=transaction)


async def test_a_reaper_killed_at_any_step_is_finished_by_the_next(
    pool: asyncpg.Pool, redis_client: Redis
) -> None:
    tenant = await Tenant.make(pool, redis_client, 1000)
    for steps in range(1, 5):
        boot = Boot(redis_client)
        await beat(redis_client, boot.name)
        assert await boot.admit(tenant, 700)
        await reaper.reap(redis_client, SILENCE)
        await pass_time(redis_client, SILENCE + 1)
        if steps < 4:
            with pytest.raises(RedisConnectionError):
                await reaper.reap(LosesConnection(redis_client, steps), SILENCE)  # type: ignore[arg-type]
        assert await reaper.reap(redis_client, SILENCE) == [boot.name]
        assert (await tenant.wallet()).held == 0
        assert await clean(pool, redis_client)


async def test_fences_are_taken_down_when_their_time_is_up(redis_client: Redis) -> None:
    await reaper.retire(redis_client, "boot_old")
    await reaper.retire(redis_client, "boot_new")
    assert await reaper.forget_fences(redis_client) == 0
    await redis_client.zadd(FENCED, {"boot_old": 1})
    assert await reaper.forget_fences(redis_client) == 1
    assert await redis_client.zrange(FENCED, 0, -1) == [b"boot_new"]
    for shard in range(SHARDS):
        assert await redis_client.hkeys(keyspace.boots_key(shard)) == [b"boot_new"]
        assert not await redis_client.exists(keyspace.leases_key(shard, "boot_old"))
