"""Clients' keys: made, found by their secret, listed, revoked, and published to Redis.

Owns the table `api_keys`, `key:<digest>` and field `k:<key>` in Redis. A secret is known to
its holder alone: here it is a digest. What a key has used is in Redis and not of interest.

Theory of operation. Postgres is the authority; `version` rises with each change. `publish`
copies the row to Redis while it holds the row's lock: rules first, because admission compares
the version in Redis with that of the record it knows, so from that write on every worker
refuses a revoked key; then the record; then word to the workers' caches. A copy that failed
raises `Unavailable`, and repeating the call completes it.
"""

import base64
import secrets
from datetime import UTC, datetime, timedelta
from typing import Literal

import asyncpg
import msgspec
from msgspec import Struct
from redis.asyncio import Redis

from accounting.contract import keyspace, scripts
from accounting.contract.errors import InvalidKey, NotFound
from accounting.contract.identifiers import new_id
from accounting.contract.settings import Secret
from accounting.recall import recall
from accounting.stores import guarded
from accounting.workspaces import Workspace

Scope = Literal["inference", "account"]  # what calls models, and the account API
ACCOUNT: Scope = "account"

_LISTED = 1000  # the newest; older ones are of no use to a reader
_PAGE = 500  # published together
_SECRET_BYTES = 32
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = (
    "id, workspace_id, name, version, state, scopes, requests_per_minute, tokens_per_minute, "
    "tokens_per_day, concurrency, cost_cap_ucr, allowed_models, expires_at, created_at, revoked_at"
)


class Limits(Struct, frozen=True, kw_only=True):
    """What a key may use; 0 = unlimited, no models = all, a cost cap (µcr) of None = none."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0
    cost_cap_ucr: int | None = None
    allowed_models: tuple[str, ...] = ()
    expires_at: datetime | None = None


class Key(Struct, frozen=True):
    """A key as Postgres has it; `state` is `keyspace.LIVE` or `keyspace.REVOKED`."""

    id: str
    workspace_id: str
    name: str
    version: int
    state: int
    scopes: tuple[str, ...]
    limits: Limits
    created_at: datetime
    revoked_at: datetime | None

    def status(self, now: datetime) -> str:
        if self.state == keyspace.REVOKED:
            return "revoked"
        expires_at = self.limits.expires_at
        return "expired" if expires_at is not None and expires_at <= now else "active"

    def may(self, scope: str) -> bool:
        return not self.scopes or scope in self.scopes


class Holder(Struct, frozen=True):
    """Whom a secret stands for."""

    key: Key
    workspace: Workspace


def secret_from(random: bytes) -> Secret:
    """The secret of 32 random bytes, as its holder will send it."""
    if len(random) != _SECRET_BYTES:
        raise ValueError("a secret is 256 bits")
    letters = base64.urlsafe_b64encode(random).rstrip(b"=").decode()
    return Secret(keyspace.KEY_PREFIX + letters)


def new_secret() -> Secret:
    return secret_from(secrets.token_bytes(_SECRET_BYTES))


@guarded
async def create(
    pool: asyncpg.Pool,
    redis: Redis,
    workspace_id: str,
    name: str,
    secret: Secret,
    *,
    scopes: tuple[str, ...] = (),
    limits: Limits | None = None,
    key_id: str | None = None,
) -> Key:
    """A live key for a secret made by `new_secret` or `secret_from`.

    With `key_id` a repeated call makes the key once. Raises NotFound, Unavailable.
    """
    key_id = key_id or new_id("key")
    limits = limits or Limits()
    try:
        await pool.execute(
            "insert into api_keys (id, workspace_id, name, digest, scopes, allowed_models,"
            " expires_at, requests_per_minute, tokens_per_minute, tokens_per_day, concurrency,"
            " cost_cap_ucr) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
            " on conflict (id) do nothing",
            key_id,
            workspace_id,
            name,
            keyspace.digest_of(secret.reveal()),
            list(scopes),
            list(limits.allowed_models),
            limits.expires_at,
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.tokens_per_day,
            limits.concurrency,
            limits.cost_cap_ucr,
        )
    except asyncpg.ForeignKeyViolationError:
        raise NotFound("There is no such workspace.") from None
    return await publish(pool, redis, key_id)


@guarded
async def get(pool: asyncpg.Pool, workspace_id: str, key_id: str) -> Key:
    """Raises NotFound, also for another workspace's key, and Unavailable."""
    row = await pool.fetchrow(
        f"select {_COLUMNS} from api_keys where id = $1 and workspace_id = $2",  # noqa: S608
        key_id,
        workspace_id,
    )
    return _key(row)


@guarded
async def list_all(pool: asyncpg.Pool, workspace_id: str) -> list[Key]:
    """The workspace's keys, the newest first, revoked ones too. Raises Unavailable."""
    rows = await pool.fetch(
        f"select {_COLUMNS} from api_keys where workspace_id = $1"  # noqa: S608
        " order by created_at desc, id desc limit $2",
        workspace_id,
        _LISTED,
    )
    return [_key(row) for row in rows]


@guarded
async def find(pool: asyncpg.Pool, secret: Secret) -> Holder:
    """Whose secret this is, right now. Raises InvalidKey, Unavailable."""
    row = await pool.fetchrow(
        f"select {_COLUMNS} from api_keys where digest = $1",  # noqa: S608
        keyspace.digest_of(secret.reveal()),
    )
    if row is None:
        raise InvalidKey
    key = _key(row)
    if key.status(datetime.now(UTC)) != "active":
        raise InvalidKey
    workspace = await pool.fetchrow(
        "select id, name, email, kind, tier, state, created_at from workspaces where id = $1",
        key.workspace_id,
    )
    return Holder(key, Workspace(*workspace))


@guarded
async def opens(pool: asyncpg.Pool, key_id: str, secret: Secret) -> bool:
    """Whether this is the key's secret. Raises Unavailable."""
    digest = keyspace.digest_of(secret.reveal())
    return bool(
        await pool.fetchval(
            "select exists (select from api_keys where id = $1 and digest = $2)", key_id, digest
        )
    )


@guarded
async def revoke(pool: asyncpg.Pool, redis: Redis, workspace_id: str, key_id: str) -> None:
    """From the return on, every request with the key is refused, on every worker.

    Revoking a revoked key only publishes it again. Raises NotFound, also for another
    workspace's key, and Unavailable: then call again.
    """
    await pool.execute(
        "update api_keys set state = $3, version = version + 1, revoked_at = now()"
        " where id = $1 and workspace_id = $2 and state <> $3",
        key_id,
        workspace_id,
        keyspace.REVOKED,
    )
    await get(pool, workspace_id, key_id)
    await publish(pool, redis, key_id)


@guarded
async def publish(pool: asyncpg.Pool, redis: Redis, key_id: str) -> Key:
    """Copy the key to Redis, any number of times. Raises NotFound, Unavailable."""
    async with pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            f"select {_COLUMNS}, digest from api_keys where id = $1 for no key update",  # noqa: S608
            key_id,
        )
        key = _key(row)
        await _put(redis, key, row["digest"])
    return key


async def publish_all(pool: asyncpg.Pool, redis: Redis) -> int:
    """Copy all keys to a Redis whose gate is closed, so that nobody need be recalled."""
    await scripts.load_all(redis)
    after, count = "", 0
    while True:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(
                f"select {_COLUMNS}, digest from api_keys where id > $1 order by id limit $2"  # noqa: S608
                " for no key update",
                after,
                _PAGE,
            )
            if not rows:
                return count
            await _put_all(redis, [(_key(row), row["digest"]) for row in rows])
        after, count = rows[-1]["id"], count + len(rows)


async def _put_all(redis: Redis, found: list[tuple[Key, str]]) -> None:
    async with redis.pipeline(transaction=False) as pipe:
        for key, _digest in found:
            rules = msgspec.msgpack.encode(_rules(key))
            where = keyspace.workspace_key(key.workspace_id)
            pipe.evalsha(scripts.SCRIPTS["put_key"].digest, 1, where, key.id, rules)
        written = await pipe.execute()
        for (key, digest), is_newest in zip(found, written, strict=True):
            if is_newest and key.state == keyspace.LIVE:
                record = msgspec.msgpack.encode(_record(key))
                pipe.set(keyspace.digest_key(digest), record)
            elif is_newest:
                pipe.delete(keyspace.digest_key(digest))
        await pipe.execute()


async def _put(redis: Redis, key: Key, digest: str) -> None:
    rules = msgspec.msgpack.encode(_rules(key))
    workspace_key = keyspace.workspace_key(key.workspace_id)
    if not await scripts.call(redis, "put_key", [workspace_key], [key.id, rules]):
        return  # a newer version is there already, with its record
    if key.state == keyspace.LIVE:
        await redis.set(keyspace.digest_key(digest), msgspec.msgpack.encode(_record(key)))
    else:
        await redis.delete(keyspace.digest_key(digest))
    await recall(redis, key.workspace_id)


def _rules(key: Key) -> keyspace.KeyRules:
    limits = key.limits
    return keyspace.KeyRules(
        version=key.version,
        state=key.state,
        expires_at_us=_microseconds(limits.expires_at) if limits.expires_at else 0,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        tokens_per_day=limits.tokens_per_day,
        concurrency=limits.concurrency,
        cost_cap_ucr=-1 if limits.cost_cap_ucr is None else limits.cost_cap_ucr,
    )


def _record(key: Key) -> keyspace.KeyRecord:
    return keyspace.KeyRecord(
        version=key.version,
        key_id=key.id,
        workspace_id=key.workspace_id,
        name=key.name,
        scopes=list(key.scopes),
        allowed_models=list(key.limits.allowed_models),
    )


def _microseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _key(row: asyncpg.Record | None) -> Key:
    if row is None:
        raise NotFound("There is no such key.")
    return Key(
        id=row["id"],
        workspace_id=row["workspace_id"],
        name=row["name"],
        version=row["version"],
        state=row["state"],
        scopes=tuple(row["scopes"]),
        limits=Limits(
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
            tokens_per_day=row["tokens_per_day"],
            concurrency=row["concurrency"],
            cost_cap_ucr=row["cost_cap_ucr"],
            allowed_models=tuple(row["allowed_models"]),
            expires_at=row["expires_at"],
        ),
        created_at=row["created_at"],
        revoked_at=row["revoked_at"],
    )
