"""The operator's grants: credits given to a workspace, in the ledger first."""

from datetime import datetime
from typing import Literal

from msgspec import Struct

from accounting import funding
from admin_api.call import Call
from admin_api.payloads import Amount, Body, Instant, Usd, amount_ucr, future

Kind = Literal["trial", "promo", "plan", "rollover", "topup"]


class NewGrant(Body):
    kind: Kind
    amount_usd: Amount
    expires_at: Instant | None = None


class GrantSummary(Struct, kw_only=True):
    """`remaining_usd`: as the ledger has it; `spendable`: false while it has yet to arrive in
    the wallet, which happens by itself."""

    grant_id: str
    workspace_id: str
    kind: str
    amount_usd: Usd
    remaining_usd: Usd
    expires_at: datetime | None
    spendable: bool


async def create(call: Call[NewGrant]) -> GrantSummary:
    workspace_id, body = call.identifier("ws"), call.body
    amount = amount_ucr(body.amount_usd, "amount_usd", low_ucr=1, high_ucr=funding.LARGEST_UCR)
    if not call.attempt.done:
        future(body.expires_at, "expires_at")
    given = await funding.give(
        call.pool,
        call.redis,
        workspace_id,
        kind=body.kind,
        amount_ucr=amount,
        expires_at=body.expires_at,
        source_ref=f"operator:{call.attempt.resource_id}",
    )
    grant = given.grant
    return GrantSummary(
        grant_id=grant.id,
        workspace_id=workspace_id,
        kind=grant.kind,
        amount_usd=Usd(grant.amount_ucr),
        remaining_usd=Usd(grant.remaining_ucr),
        expires_at=grant.expires_at,
        spendable=given.spendable,
    )
