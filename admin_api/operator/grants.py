"""The operator's grants: credits given to a workspace, in the ledger first."""

from datetime import datetime
from typing import Literal

from msgspec import Struct

from accounting import funding, grants, workspaces
from accounting.grants import Grant
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


class ListedGrant(Struct, kw_only=True):
    """What became of it: amount = consumed + forfeited + refunded + remaining."""

    grant_id: str
    kind: str
    amount_usd: Usd
    consumed_usd: Usd
    forfeited_usd: Usd
    refunded_usd: Usd
    remaining_usd: Usd
    effective_at: datetime
    expires_at: datetime | None


class GrantList(Struct):
    grants: list[ListedGrant]


async def list_all(call: Call[Body]) -> GrantList:
    workspace = await workspaces.get(call.pool, call.identifier("ws"))
    return GrantList([_listed(one) for one in await grants.list_all(call.pool, workspace.id)])


def _listed(grant: Grant) -> ListedGrant:
    return ListedGrant(
        grant_id=grant.id,
        kind=grant.kind,
        amount_usd=Usd(grant.amount_ucr),
        consumed_usd=Usd(grant.consumed_ucr),
        forfeited_usd=Usd(grant.forfeited_ucr),
        refunded_usd=Usd(grant.refunded_ucr),
        remaining_usd=Usd(grant.remaining_ucr),
        effective_at=grant.effective_at,
        expires_at=grant.expires_at,
    )


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
