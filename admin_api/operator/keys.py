"""The operator's keys: made for a workspace, the secret shown once."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from accounting import keys
from accounting.contract.errors import Conflict
from accounting.contract.money import MAX_UCR
from accounting.contract.settings import Secret
from accounting.keys import Limits
from admin_api.account.keys import KeySummary, fields_of
from admin_api.call import Call
from admin_api.payloads import (
    Body,
    Instant,
    Name,
    OptionalAmount,
    amount_ucr,
    future,
    is_null,
    null_amount,
)

_Figure = Annotated[int, Meta(ge=1, le=1_000_000_000_000)]
_Requests = Annotated[int, Meta(ge=1, le=60_000_000)]  # one per µs: as fine as the clock
_Slots = Annotated[int, Meta(ge=1, le=1_000_000)]
_Model = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[!-~]+(?![\s\S])")]


class NewLimits(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the key may use; omitted or null = unlimited."""

    rpm: _Requests | None = None
    tpm: _Figure | None = None
    daily_tokens: _Figure | None = None
    concurrency: _Slots | None = None
    cost_cap_usd: OptionalAmount = msgspec.field(default_factory=null_amount)
    allowed_models: Annotated[list[_Model], Meta(min_length=1, max_length=256)] | None = None
    expires_at: Instant | None = None


class NewKey(Body):
    """Scopes: omitted = all of them."""

    name: Name
    scopes: Annotated[list[keys.Scope], Meta(min_length=1, max_length=16)] | None = None
    limits: NewLimits | None = None


class MadeKey(KeySummary, kw_only=True):
    """`key_secret` is shown once, and again only to a repetition by the same caller under the
    same idempotency key within a day; else null."""

    workspace_id: str
    key_secret: Secret | None


async def create(call: Call[NewKey]) -> MadeKey:
    workspace_id, attempt = call.identifier("ws"), call.attempt
    secret = keys.secret_from(attempt.random) if attempt.random else None
    if not attempt.done:
        if secret is None:
            raise Conflict("This idempotency key is too old to make a key with.")
        key = await keys.create(
            call.pool,
            call.redis,
            workspace_id,
            call.body.name,
            secret,
            scopes=tuple(dict.fromkeys(call.body.scopes or ())),
            limits=_limits(call.body.limits or NewLimits()),
            key_id=attempt.resource_id,
        )
    else:
        key = await keys.get(call.pool, workspace_id, attempt.resource_id)
    if secret is not None and not await keys.opens(call.pool, key.id, secret):
        secret = None
    return MadeKey(**fields_of(key), workspace_id=workspace_id, key_secret=secret)


def _limits(asked: NewLimits) -> Limits:
    cap = None
    if not is_null(asked.cost_cap_usd):
        cap = amount_ucr(asked.cost_cap_usd, "limits.cost_cap_usd", low_ucr=0, high_ucr=MAX_UCR)
    return Limits(
        requests_per_minute=asked.rpm or 0,
        tokens_per_minute=asked.tpm or 0,
        tokens_per_day=asked.daily_tokens or 0,
        concurrency=asked.concurrency or 0,
        cost_cap_ucr=cap,
        allowed_models=tuple(dict.fromkeys(asked.allowed_models or ())),
        expires_at=future(asked.expires_at, "limits.expires_at"),
    )
