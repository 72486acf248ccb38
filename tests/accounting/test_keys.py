"""Keys on real stores: only a digest is kept, and a revocation bites on the next request."""

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import keys, workspaces
from accounting.contract import keyspace
from accounting.contract.errors import InvalidKey, NotFound
from accounting.contract.identifiers import new_id
from accounting.keys import Limits
from tests.accounting.admission import ADMITTED, REVOKED, funded, lease_ahead, verdict
from tests.accounting.scene import pool_on

FULL = Limits(
    requests_per_minute=60,
    tokens_per_minute=1000,
    tokens_per_day=5000,
    concurrency=3,
    cost_cap_ucr=0,
    allowed_models=("gpt-4o-mini", "o3"),
    expires_at=datetime(2100, 1, 1, 12, 30, 15, 123456, UTC),
)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with pool_on(database_url, 8) as pool:
        yield pool


@pytest.fixture
async def redis(redis_client: Redis) -> Redis:
    await redis_client.set(keyspace.EPOCH, "1")
    return redis_client


async def rules(redis: Redis, workspace_id: str, key_id: str) -> keyspace.KeyRules:
    packed = await redis.hget(keyspace.workspace_key(workspace_id), f"k:{key_id}")
    assert isinstance(packed, bytes)
    return msgspec.msgpack.decode(packed, type=keyspace.KeyRules)


def test_a_secret_is_256_bits_of_url_safe_letters() -> None:
    found = {keys.new_secret().reveal() for _ in range(100)}
    assert len(found) == 100
    assert all(re.fullmatch(r"inf_[A-Za-z0-9_-]{43}", secret) for secret in found)
    with pytest.raises(ValueError, match="256 bits"):
        keys.secret_from(b"short")


async def test_a_new_key_is_published_with_all_its_limits(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    secret = keys.new_secret()
    key = await keys.create(
        pool, redis, workspace.id, "ci", secret, scopes=("inference",), limits=FULL
    )
    assert await keys.get(pool, workspace.id, key.id) == key
    assert key.limits == FULL and key.scopes == ("inference",) and key.name == "ci"
    assert await rules(redis, workspace.id, key.id) == keyspace.KeyRules(
        version=1,
        state=keyspace.LIVE,
        expires_at_us=4102489815123456,
        requests_per_minute=60,
        tokens_per_minute=1000,
        tokens_per_day=5000,
        concurrency=3,
        cost_cap_ucr=0,
    )
    packed = await redis.get(keyspace.digest_key(keyspace.digest_of(secret.reveal())))
    record = keyspace.key_record_decoder.decode(packed)
    assert record == keyspace.KeyRecord(
        1, key.id, workspace.id, "ci", ["inference"], ["gpt-4o-mini", "o3"]
    )


async def test_a_key_without_limits_has_none(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, key_id = await funded(pool, redis)
    assert await rules(redis, workspace_id, key_id) == keyspace.KeyRules(1, keyspace.LIVE)
    assert await verdict(redis, workspace_id, key_id) == ADMITTED


async def test_the_secret_is_in_neither_store(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    secret = keys.new_secret()
    key = await keys.create(pool, redis, workspace.id, "ci", secret)
    letters = secret.reveal().removeprefix("inf_")
    rows = [str(tuple(row)) for row in await pool.fetch("select * from api_keys")]
    values = [await redis.dump(name) or b"" for name in await redis.keys()]
    assert not any(letters in row for row in rows)
    assert not any(letters.encode() in value for value in [*values, *await redis.keys()])
    assert letters not in repr(secret) + repr(key)


async def test_creating_twice_under_one_id_makes_one(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    secret, key_id = keys.new_secret(), new_id("key")
    first, second = await asyncio.gather(
        keys.create(pool, redis, workspace.id, "ci", secret, key_id=key_id),
        keys.create(pool, redis, workspace.id, "ci", secret, key_id=key_id),
    )
    assert first == second and first.version == 1
    assert await keys.opens(pool, key_id, secret)
    assert not await keys.opens(pool, key_id, keys.new_secret())


async def test_a_revocation_bites_on_the_next_request(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, _ = await funded(pool, redis)
    secret = keys.new_secret()
    key = await keys.create(pool, redis, workspace_id, "ci", secret)
    assert await verdict(redis, workspace_id, key.id) == ADMITTED
    await keys.revoke(pool, redis, workspace_id, key.id)
    # A worker with the old record is told that it is stale, one with the new one is refused.
    assert await verdict(redis, workspace_id, key.id) == "stale"
    assert await verdict(redis, workspace_id, key.id, version=2) == REVOKED
    assert not await redis.exists(keyspace.digest_key(keyspace.digest_of(secret.reveal())))
    with pytest.raises(InvalidKey):
        await keys.find(pool, secret)
    revoked = await keys.get(pool, workspace_id, key.id)
    assert revoked.state == keyspace.REVOKED and revoked.revoked_at is not None
    await keys.revoke(pool, redis, workspace_id, key.id)
    assert await keys.get(pool, workspace_id, key.id) == revoked


async def test_a_revocation_waits_until_what_was_leased_ahead_is_back(
    pool: asyncpg.Pool, redis: Redis
) -> None:
    workspace_id, key_id = await funded(pool, redis)
    assert await lease_ahead(redis, workspace_id, key_id, [0] * 7, 8) == 8
    async with redis.pubsub() as ears:
        await ears.subscribe(keyspace.RECALL_CHANNEL)
        await ears.get_message(timeout=5)
        revocation = asyncio.create_task(keys.revoke(pool, redis, workspace_id, key_id))
        heard = await ears.get_message(timeout=5)
        assert heard is not None and heard["data"] == workspace_id.encode()
        assert not revocation.done()
        await lease_ahead(redis, workspace_id, key_id, [0] * 7, 0)
        await asyncio.wait_for(revocation, 5)


async def test_a_revocation_does_not_wait_for_a_worker_that_hears_nothing(
    pool: asyncpg.Pool, redis: Redis
) -> None:
    workspace_id, key_id = await funded(pool, redis)
    assert await lease_ahead(redis, workspace_id, key_id, [0] * 7, 8) == 8
    await asyncio.wait_for(keys.revoke(pool, redis, workspace_id, key_id), 5)
    held = (await workspaces.balance(redis, workspace_id)).held_ucr
    assert held == 8  # it may be behind requests in flight, until the worker speaks or is retired


async def test_a_revocation_is_completed_by_its_repetition(
    pool: asyncpg.Pool, redis: Redis
) -> None:
    """The first attempt reached Postgres only; the key still works until the second."""
    workspace_id, key_id = await funded(pool, redis)
    await pool.execute(
        "update api_keys set state = 2, version = 2, revoked_at = now() where id = $1", key_id
    )
    assert await verdict(redis, workspace_id, key_id) == ADMITTED
    await keys.revoke(pool, redis, workspace_id, key_id)
    assert await verdict(redis, workspace_id, key_id, version=2) == REVOKED
    assert (await keys.get(pool, workspace_id, key_id)).version == 2


async def test_publishing_never_brings_a_revoked_key_back(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, _ = await funded(pool, redis)
    for _ in range(20):
        secret = keys.new_secret()
        key = await keys.create(pool, redis, workspace_id, "ci", secret)
        await asyncio.gather(
            keys.publish(pool, redis, key.id),
            keys.revoke(pool, redis, workspace_id, key.id),
            keys.publish(pool, redis, key.id),
        )
        assert (await rules(redis, workspace_id, key.id)).state == keyspace.REVOKED
        assert not await redis.exists(keyspace.digest_key(keyspace.digest_of(secret.reveal())))


async def test_a_newer_version_in_redis_is_left_alone(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, key_id = await funded(pool, redis)
    newer = keyspace.KeyRules(version=9, state=keyspace.REVOKED)
    name = keyspace.workspace_key(workspace_id)
    await redis.hset(name, f"k:{key_id}", msgspec.msgpack.encode(newer))
    await keys.publish(pool, redis, key_id)
    assert await rules(redis, workspace_id, key_id) == newer


async def test_publishing_fills_an_empty_redis(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, _ = await funded(pool, redis)
    secret = keys.new_secret()
    key = await keys.create(pool, redis, workspace_id, "ci", secret, limits=FULL)
    before = await rules(redis, workspace_id, key.id)
    await redis.flushall()
    assert await keys.publish(pool, redis, key.id) == key
    assert await rules(redis, workspace_id, key.id) == before
    assert await redis.exists(keyspace.digest_key(keyspace.digest_of(secret.reveal())))


async def test_a_secret_finds_its_holder(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    secret = keys.new_secret()
    key = await keys.create(pool, redis, workspace.id, "ci", secret, scopes=("account",))
    holder = await keys.find(pool, secret)
    assert holder.key == key and holder.workspace == workspace
    assert key.may("account") and not key.may("inference")
    with pytest.raises(InvalidKey):
        await keys.find(pool, keys.new_secret())


async def test_an_expired_key_is_nobodys(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    secret = keys.new_secret()
    past = Limits(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    key = await keys.create(pool, redis, workspace.id, "ci", secret, limits=past)
    assert key.status(datetime.now(UTC)) == "expired"
    assert await verdict(redis, workspace.id, key.id) == REVOKED
    with pytest.raises(InvalidKey):
        await keys.find(pool, secret)


async def test_keys_are_listed_the_newest_first(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace = await workspaces.create(pool, redis, "Acme")
    made = [await keys.create(pool, redis, workspace.id, name, keys.new_secret()) for name in "abc"]
    await funded(pool, redis)
    assert await keys.list_all(pool, workspace.id) == made[::-1]


async def test_another_workspaces_key_is_not_found(pool: asyncpg.Pool, redis: Redis) -> None:
    workspace_id, key_id = await funded(pool, redis)
    other, _ = await funded(pool, redis)
    for attempt in (
        keys.get(pool, other, key_id),
        keys.revoke(pool, redis, other, key_id),
        keys.get(pool, workspace_id, new_id("key")),
        keys.publish(pool, redis, new_id("key")),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await verdict(redis, workspace_id, key_id) == ADMITTED
