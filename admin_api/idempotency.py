"""The door of `accounting.idempotency`: where the key is in a request, and when a claim ends.

The key may come in the header `Idempotency-Key`, in the body as `idempotency_key`, or in the
query of a DELETE; if in several places, it has to be the same. A request without one is
carried out once each time it is sent.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import asyncpg
import msgspec
from aiohttp import web
from msgspec import Struct

from accounting import idempotency
from accounting.contract.errors import Failure, InvalidRequest, Unavailable
from accounting.contract.identifiers import new_id
from accounting.contract.settings import Secret
from accounting.idempotency import Claim
from admin_api.payloads import Body

HEADER = "Idempotency-Key"
REPLAYED = "idempotent-replayed"
PARAMETER = "idempotency_key"
_LONGEST = 255


class Attempt(Struct, frozen=True):
    """One attempt at a mutation. `resource_id`: what it makes; `done`: only show it again.

    `random` is what a new secret is made of, the same in each attempt of the same caller;
    None when it is too late to show the secret again.
    """

    resource_id: str
    done: bool
    random: bytes | None

    def __repr__(self) -> str:
        return f"<Attempt {self.resource_id} done={self.done}>"


def key_of(request: web.Request, body: Body) -> str | None:
    """The request's idempotency key. Raises InvalidRequest for a bad one or for two."""
    found = request.headers.getall(HEADER, [])
    if request.method == "DELETE":
        found = [*found, *request.query.getall(PARAMETER, [])]
    if body.idempotency_key is not None:
        found = [*found, body.idempotency_key]
    if not found:
        return None
    if len(set(found)) > 1:
        raise InvalidRequest("Two different idempotency keys were given.", param=PARAMETER)
    if not 1 <= len(found[0]) <= _LONGEST or not found[0].isprintable():
        raise InvalidRequest(
            f"An idempotency key has 1 to {_LONGEST} printable characters.", param=PARAMETER
        )
    return found[0]


def hash_of(path: str, body: Body) -> bytes:
    """What makes two requests of a route the same: path and body, whatever their key."""
    bare = msgspec.structs.replace(body, idempotency_key=None)
    return hashlib.sha256(path.encode() + b"\0" + msgspec.json.encode(bare)).digest()


@asynccontextmanager
async def attempt(
    pool: asyncpg.Pool,
    *,
    scope: str,
    route: str,
    key: str | None,
    request_hash: bytes,
    prefix: str,
    kept: bool,
    bearer: Secret,
) -> AsyncIterator[Attempt]:
    """Carry a mutation out in here. Its claim ends with the block, however the block ends.

    Raises IdempotencyMismatch, IdempotencyInProgress, Unavailable.
    """
    resource_id = new_id(prefix)
    if key is None:
        yield Attempt(resource_id, False, secrets.token_bytes(32))
        return
    claim = await idempotency.claim(pool, scope, route, key, request_hash, resource_id, kept=kept)
    made = Attempt(claim.resource_id, claim.done, claim.derive(bearer))
    if claim.done:
        yield made
        return
    try:
        yield made
    except BaseException as error:
        await asyncio.shield(_give_up(pool, claim, error))
        raise
    await idempotency.complete(pool, claim)


async def _give_up(pool: asyncpg.Pool, claim: Claim, error: BaseException) -> None:
    """A refusal did nothing; anything else may have. If Postgres is away the claim lapses."""
    refused = isinstance(error, Failure) and error.status < 500
    with suppress(Unavailable):
        await (idempotency.forget if refused else idempotency.break_off)(pool, claim)
