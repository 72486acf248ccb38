"""The account's wallet and who it belongs to, as its own key may see them."""

import asyncio
from datetime import datetime

from msgspec import Struct

from accounting import restoring, trials, workspaces
from admin_api.call import Call
from admin_api.payloads import Body, Usd


class TrialCredits(Struct):
    """What is left of trial credits, and when the first of them expire."""

    remaining_usd: Usd
    expires_at: datetime | None


class WalletBalance(Struct, kw_only=True):
    """`balance_usd` is settled; available = balance − held by open requests."""

    balance_usd: Usd
    available_usd: Usd
    held_usd: Usd
    currency: str = "USD"
    trial: TrialCredits


class WalletRestoreResult(Struct, kw_only=True):
    """`restored`: whether anything came back, and `restored_usd` how much."""

    account_id: str
    restored: bool
    restored_usd: Usd
    balance_usd: Usd


class AccountSummary(Struct, kw_only=True):
    """`status`: `active` or `suspended`."""

    account_id: str
    kind: str
    status: str
    tier: str
    balance_usd: Usd


async def balance(call: Call[Body]) -> WalletBalance:
    workspace_id = call.own.workspace.id
    wallet, trial = await asyncio.gather(
        workspaces.balance(call.redis, workspace_id), trials.remaining(call.pool, workspace_id)
    )
    return WalletBalance(
        balance_usd=Usd(wallet.settled_ucr),
        available_usd=Usd(wallet.available_ucr),
        held_usd=Usd(wallet.held_ucr),
        trial=TrialCredits(Usd(trial.remaining_ucr), trial.expires_at),
    )


async def restore(call: Call[Body]) -> WalletRestoreResult:
    workspace_id = call.own.workspace.id
    done = await restoring.restore(call.pool, call.redis, workspace_id, call.attempt.resource_id)
    wallet = await workspaces.balance(call.redis, workspace_id)
    return WalletRestoreResult(
        account_id=workspace_id,
        restored=done.restored_ucr > 0,
        restored_usd=Usd(done.restored_ucr),
        balance_usd=Usd(wallet.settled_ucr),
    )


async def whoami(call: Call[Body]) -> AccountSummary:
    workspace = call.own.workspace
    wallet = await workspaces.balance(call.redis, workspace.id)
    return AccountSummary(
        account_id=workspace.id,
        kind=workspace.kind,
        status=workspace.status,
        tier=workspace.tier,
        balance_usd=Usd(wallet.settled_ucr),
    )
