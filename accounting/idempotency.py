"""Idempotency keys: a request carried out once, however often and at once it is sent.

Owns the table `idempotency`. What a key is attached to and how it travels is the door's part.

Theory of operation. A claim chooses the id of the resource before anything is made, and every
later attempt under the same key gets the same id; what is made is made under that id, so a
second attempt after a crash or an outage completes the first one instead of repeating it.
A claim ends with exactly one of `complete`, `forget` (nothing happened: the key is free again)
and `break_off` (it may have happened: the next attempt takes over at once). A claim whose
process died is taken over after `CLAIM_SECONDS`. What is done is not done again: the answer
shows the same resource as it is now.

Secrets. A new secret is not stored for replays, it is derived, from the caller's bearer token,
the idempotency key and a random seed in the row. The database alone cannot reveal it, and once
the seed is wiped nobody can.
"""

import hashlib
import hmac
import secrets

import asyncpg
from msgspec import Struct

from accounting.contract.errors import IdempotencyInProgress, IdempotencyMismatch, Unavailable
from accounting.contract.settings import Secret
from accounting.stores import guarded

CLAIM_SECONDS = 60
REMEMBER_HOURS = 24

_IN_PROGRESS, _BROKEN_OFF, _DONE = 1, 2, 3
_TRIES = 3  # a row may be forgotten between looking and claiming


class Claim(Struct, frozen=True):
    """The right to carry a request out, or, when `done`, the word that it was carried out.

    `resource_id` is what it makes; `seed` is None once secrets are no longer shown again.
    """

    scope: str
    route: str
    key: str
    resource_id: str
    seed: bytes | None
    attempt: int
    done: bool

    def __repr__(self) -> str:
        state = "done" if self.done else f"attempt {self.attempt}"
        return f"<Claim {self.scope} {self.route} {self.resource_id} {state}>"

    def derive(self, bearer: Secret) -> bytes | None:
        """256 bits only this caller can have again; None when it is too late for that."""
        if self.seed is None:
            return None
        purpose = f"secret|{self.route}|{self.resource_id}|{self.key}"
        return _hkdf(bearer.reveal().encode(), self.seed, purpose.encode())


def _hkdf(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    """HKDF with SHA-256 (RFC 5869), one block: 256 bits."""
    extracted = hmac.digest(salt, secret, hashlib.sha256)
    return hmac.digest(extracted, purpose + b"\x01", hashlib.sha256)


@guarded
async def claim(
    pool: asyncpg.Pool,
    scope: str,
    route: str,
    key: str,
    request_hash: bytes,
    resource_id: str,
    *,
    kept: bool = False,
) -> Claim:
    """Claim a request by its key; `resource_id` counts if it is the first. `kept`: for good.

    Raises IdempotencyMismatch (the key stands for another request), IdempotencyInProgress
    (another attempt is under way) and Unavailable.
    """
    for _ in range(_TRIES):
        row = await pool.fetchrow(
            _CLAIM,
            *(scope, route, key, request_hash, resource_id, secrets.token_bytes(32), kept),
        )
        if row is not None:
            return _claim(row, done=False)
        row = await pool.fetchrow(_LOOK, scope, route, key)
        if row is None:
            continue
        if row["request_hash"] != request_hash:
            raise IdempotencyMismatch
        if row["state"] == _DONE:
            return _claim(row, done=True)
        if row["state"] == _IN_PROGRESS:
            raise IdempotencyInProgress(retry_after_seconds=1)
    raise Unavailable


_COLUMNS = (
    "scope, route, key, request_hash, resource_id, state, attempts,"
    f" case when created_at > now() - interval '{REMEMBER_HOURS} hours' then seed end as seed"
)
_LOOK = f"select {_COLUMNS} from idempotency where scope = $1 and route = $2 and key = $3"  # noqa: S608
_CLAIM = (
    "insert into idempotency as known"  # noqa: S608
    " (scope, route, key, request_hash, resource_id, seed, kept)"
    " values ($1, $2, $3, $4, $5, $6, $7)"
    " on conflict (scope, route, key) do update"
    f" set state = {_IN_PROGRESS}, attempts = known.attempts + 1, claimed_at = now()"
    " where known.request_hash = excluded.request_hash"
    f" and (known.state = {_BROKEN_OFF} or known.state = {_IN_PROGRESS}"
    f" and known.claimed_at < now() - interval '{CLAIM_SECONDS} seconds')"
    f" returning {_COLUMNS}"
)


def _claim(row: asyncpg.Record, *, done: bool) -> Claim:
    return Claim(
        scope=row["scope"],
        route=row["route"],
        key=row["key"],
        resource_id=row["resource_id"],
        seed=row["seed"],
        attempt=row["attempts"],
        done=done,
    )


@guarded
async def complete(pool: asyncpg.Pool, claim: Claim) -> None:
    """It is done: from now on the key shows what was made. Raises Unavailable."""
    await pool.execute(
        "update idempotency set state = $4 where scope = $1 and route = $2 and key = $3",
        *(claim.scope, claim.route, claim.key, _DONE),
    )


@guarded
async def forget(pool: asyncpg.Pool, claim: Claim) -> None:
    """This attempt did nothing. The key is free again if no earlier one can have done anything.

    Raises Unavailable.
    """
    if claim.attempt > 1:
        await break_off(pool, claim)
        return
    await pool.execute(
        "delete from idempotency where scope = $1 and route = $2 and key = $3"
        " and state = $4 and attempts = $5",
        *(claim.scope, claim.route, claim.key, _IN_PROGRESS, claim.attempt),
    )


@guarded
async def break_off(pool: asyncpg.Pool, claim: Claim) -> None:
    """It may have been done or not; the next attempt completes it. Raises Unavailable."""
    await pool.execute(
        "update idempotency set state = $4 where scope = $1 and route = $2 and key = $3"
        " and state = $5 and attempts = $6",
        *(claim.scope, claim.route, claim.key, _BROKEN_OFF, _IN_PROGRESS, claim.attempt),
    )


@guarded
async def clear(pool: asyncpg.Pool) -> None:
    """Wipe seeds and remove claims that are a day old; `kept` ones stay. Raises Unavailable."""
    age = f"created_at < now() - interval '{REMEMBER_HOURS} hours'"
    await pool.execute(f"delete from idempotency where not kept and {age}")  # noqa: S608
    await pool.execute(f"update idempotency set seed = null where seed is not null and {age}")  # noqa: S608
