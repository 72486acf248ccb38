"""Who calls: the operator by the one token, a client by a key of its workspace.

The two never mix: an operator's token is nobody's key, and no key opens `/v1/admin`. When the
keys cannot be looked up the answer is 503, never 401.
"""

import hashlib
import hmac

import asyncpg
from aiohttp import web

from accounting import keys
from accounting.contract.errors import InvalidKey, ScopeMissing
from accounting.contract.keyspace import KEY_PREFIX
from accounting.contract.settings import Secret
from accounting.keys import Holder

_KEY_LENGTH = len(KEY_PREFIX) + 43


def bearer_of(request: web.Request) -> Secret:
    """The bearer token, as sent. Raises InvalidKey when there is not exactly one."""
    values = request.headers.getall("Authorization", [])
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise InvalidKey
    return Secret(token.strip())


def require_operator(bearer: Secret, operator_token: Secret) -> None:
    """Raises InvalidKey for any other token, after a time that does not depend on it."""
    sent, expected = (_digest(token) for token in (bearer, operator_token))
    if not operator_token or not hmac.compare_digest(sent, expected):
        raise InvalidKey("No valid operator token was given. Send `Authorization: Bearer …`.")


def _digest(token: Secret) -> bytes:
    return hashlib.sha256(token.reveal().encode("utf-8", "surrogateescape")).digest()


async def require_key(pool: asyncpg.Pool, bearer: Secret, scope: str) -> Holder:
    """The key and its workspace. Raises InvalidKey, ScopeMissing, Unavailable."""
    secret = bearer.reveal()
    if len(secret) != _KEY_LENGTH or not secret.startswith(KEY_PREFIX) or not secret.isascii():
        raise InvalidKey
    holder = await keys.find(pool, bearer)
    if not holder.key.may(scope):
        raise ScopeMissing(f"This key lacks the scope `{scope}`.")
    return holder
