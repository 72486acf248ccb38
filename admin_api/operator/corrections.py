"""The operator sets money right: a request charged less, credits refunded or clawed back."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from accounting import reversals, withdrawals
from accounting.contract.money import MAX_UCR
from accounting.withdrawals import Kind, Withdrawal
from admin_api.call import Call
from admin_api.payloads import (
    Amount,
    Body,
    OptionalAmount,
    Usd,
    amount_ucr,
    is_null,
    null_amount,
)

Reason = Annotated[str, Meta(max_length=500, pattern=r"^[^\x00]*$")]


class NewReversal(Body):
    """`charge_usd`: what the request costs from now on; omitted or null = nothing."""

    charge_usd: OptionalAmount = msgspec.field(default_factory=null_amount)
    reason: Reason = ""


class ReversalSummary(Struct, kw_only=True):
    """`restored_usd`: what of it can be spent again, the rest had expired; `spendable`: false
    while it has yet to arrive in the wallet, which happens by itself."""

    request_id: str
    workspace_id: str
    charge_usd: Usd
    reversed_usd: Usd
    restored_usd: Usd
    spendable: bool


class NewRefund(Body):
    amount_usd: Amount
    reason: Reason = ""


class NewClawback(Body):
    """`amount_usd`: at most so much; omitted or null = all that is left."""

    amount_usd: OptionalAmount = msgspec.field(default_factory=null_amount)
    reason: Reason = ""


class WithdrawalSummary(Struct, kw_only=True):
    """`taken_usd` of the grant's credits are gone; `remaining_usd` are left of it."""

    withdrawal_id: str
    workspace_id: str
    grant_id: str
    taken_usd: Usd
    remaining_usd: Usd


async def reverse(call: Call[NewReversal]) -> ReversalSummary:
    body, charge = call.body, 0
    if not is_null(body.charge_usd):
        charge = amount_ucr(body.charge_usd, "charge_usd", low_ucr=0, high_ucr=MAX_UCR)
    done = await reversals.reverse(
        call.pool,
        call.redis,
        call.identifier("req"),
        charge,
        source_ref=call.attempt.resource_id,
        reason=body.reason,
    )
    return ReversalSummary(
        request_id=done.request_id,
        workspace_id=done.workspace_id,
        charge_usd=Usd(done.charge_ucr),
        reversed_usd=Usd(done.reversed_ucr),
        restored_usd=Usd(done.restored_ucr),
        spendable=done.spendable,
    )


async def refund(call: Call[NewRefund]) -> WithdrawalSummary:
    amount = amount_ucr(call.body.amount_usd, "amount_usd", low_ucr=1, high_ucr=MAX_UCR)
    return await _withdraw(call, "refund", amount, call.body.reason)


async def claw_back(call: Call[NewClawback]) -> WithdrawalSummary:
    amount = None
    if not is_null(call.body.amount_usd):
        amount = amount_ucr(call.body.amount_usd, "amount_usd", low_ucr=1, high_ucr=MAX_UCR)
    return await _withdraw(call, "clawback", amount, call.body.reason)


async def _withdraw(
    call: Call[NewRefund] | Call[NewClawback], kind: Kind, amount: int | None, reason: str
) -> WithdrawalSummary:
    done: Withdrawal = await withdrawals.withdraw(
        call.pool,
        call.redis,
        call.attempt.resource_id,
        call.identifier("grant"),
        kind,
        amount,
        reason,
    )
    return WithdrawalSummary(
        withdrawal_id=done.id,
        workspace_id=done.workspace_id,
        grant_id=done.grant_id,
        taken_usd=Usd(done.taken_ucr),
        remaining_usd=Usd(done.remaining_ucr),
    )
