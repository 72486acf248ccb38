"""The account's keys, as its own key may see and revoke them."""

from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from accounting import keys
from accounting.keys import Key, Limits
from admin_api.call import Call
from admin_api.payloads import Body, Usd


class KeyLimits(Struct, kw_only=True):
    """What a key may use; null = unlimited, for `allowed_models` all of them."""

    rpm: int | None
    tpm: int | None
    daily_tokens: int | None
    concurrency: int | None
    cost_cap_usd: Usd | None
    allowed_models: list[str] | None
    expires_at: datetime | None


class KeySummary(Struct, kw_only=True):
    """`label` and `name` are the same; `status`: `active`, `expired` or `revoked`; no scopes:
    all of them."""

    key_id: str
    name: str
    label: str
    status: str
    scopes: list[str]
    created_at: datetime
    limits: KeyLimits


class KeyList(Struct):
    items: list[KeySummary]


class Revoked(Struct):
    revoked: bool


async def list_all(call: Call[Body]) -> KeyList:
    found = await keys.list_all(call.pool, call.own.workspace.id)
    return KeyList([KeySummary(**fields_of(key)) for key in found])


async def revoke(call: Call[Body]) -> Revoked:
    """A key revoked before is published again: that is what a retry after a 503 needs."""
    await keys.revoke(call.pool, call.redis, call.own.workspace.id, call.identifier("key"))
    return Revoked(True)


def fields_of(key: Key) -> dict[str, Any]:
    """What every answer about a key says of it."""
    return {
        "key_id": key.id,
        "name": key.name,
        "label": key.name,
        "status": key.status(datetime.now(UTC)),
        "scopes": list(key.scopes),
        "created_at": key.created_at,
        "limits": _limits(key.limits),
    }


def _limits(limits: Limits) -> KeyLimits:
    cap = limits.cost_cap_ucr
    return KeyLimits(
        rpm=limits.requests_per_minute or None,
        tpm=limits.tokens_per_minute or None,
        daily_tokens=limits.tokens_per_day or None,
        concurrency=limits.concurrency or None,
        cost_cap_usd=None if cap is None else Usd(cap),
        allowed_models=list(limits.allowed_models) or None,
        expires_at=limits.expires_at,
    )
