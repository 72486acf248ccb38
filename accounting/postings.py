"""From charges and grants to burns and transfers: pure arithmetic, no I/O.

Grants are used in burn order: trial, promo, rollover, plan, restored, topup; among equals the
one that expires first, then the oldest. A charge may use the grants that had not expired when
its exchange was admitted. What those cannot cover is taken from expired grants that have not
been forfeited yet (Redis counts them as balance until then); what is left after that becomes a
receivable. So wallets never go below zero, and every charge is explained to the micro-credit.
What is charged no more goes back the way it came, the last that was taken first.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from msgspec import Struct

from accounting.ledger import BEYOND_WALLET, RECEIVABLE, REVENUE, USAGE, Transfer, wallet_account

PRIORITIES = {"trial": 10, "promo": 20, "rollover": 25, "plan": 30, "restored": 35, "topup": 40}


class Charge(NamedTuple):
    """What one exchange cost, µcr, always above zero."""

    request_id: str
    started_at_us: int
    amount_ucr: int


class LiveGrant(Struct):
    """A grant with something left; `expires_at_us` None: never."""

    id: str
    kind: str
    expires_at_us: int | None
    remaining_ucr: int

    def burn_order(self) -> tuple[int, bool, int, str]:
        never = self.expires_at_us is None
        return PRIORITIES[self.kind], never, self.expires_at_us or 0, self.id


Burns = list[tuple[str, int]]  # grant id and µcr, in the order burned


class Posting(Struct):
    """What a workspace's charges do to its grants and accounts."""

    burns: dict[str, Burns]  # by request id
    burned: dict[str, int]  # µcr by grant id
    exhausted: list[str]  # grants that this leaves empty
    short_ucr: int  # beyond the wallet
    transfers: list[Transfer]


def plan(charges: Iterable[Charge], grants: Iterable[LiveGrant]) -> Posting:
    """Burn grants for the charges, in the order in which the exchanges started."""
    ordered = sorted(grants, key=LiveGrant.burn_order)
    remaining = {grant.id: grant.remaining_ucr for grant in ordered}
    burns: dict[str, Burns] = {}
    short = 0
    for charge in sorted(charges, key=lambda charge: (charge.started_at_us, charge.request_id)):
        taken, rest = _burn(charge, ordered, remaining)
        burns[charge.request_id] = taken
        short += rest
    burned = {
        grant.id: grant.remaining_ucr - remaining[grant.id]
        for grant in ordered
        if remaining[grant.id] < grant.remaining_ucr
    }
    return Posting(
        burns=burns,
        burned=burned,
        exhausted=[grant_id for grant_id in burned if not remaining[grant_id]],
        short_ucr=short,
        transfers=_transfers(ordered, burned, short),
    )


def _burn(charge: Charge, ordered: list[LiveGrant], remaining: dict[str, int]) -> tuple[Burns, int]:
    """Take one charge from the grants; what was taken, and what they could not cover."""
    taken: Burns = []
    rest = charge.amount_ucr
    for expired in (False, True):
        for grant in ordered:
            if not rest:
                return taken, 0
            expires = grant.expires_at_us
            if expired is (expires is not None and charge.started_at_us >= expires):
                amount = min(rest, remaining[grant.id])
                if amount:
                    taken.append((grant.id, amount))
                    remaining[grant.id] -= amount
                    rest -= amount
    return taken, rest


def net(burns: Iterable[tuple[str, int]]) -> Burns:
    """What is still burned after some of it was given back (below zero), in the order burned."""
    kept: list[list[Any]] = []
    for grant_id, amount in burns:
        if amount > 0:
            kept.append([grant_id, amount])
            continue
        back = -amount
        for one in reversed(kept):
            if one[0] == grant_id:
                taken = min(back, one[1])
                one[1] -= taken
                back -= taken
    return [(grant_id, amount) for grant_id, amount in kept if amount]


def give_back(amount_ucr: int, charge_ucr: int, burned: Burns) -> tuple[int, Burns]:
    """Undo part of a charge: µcr of what was beyond the wallet, then of its grants backwards.

    `burned` is what paid for the charge by now, in order; the amount is at most the charge.
    """
    beyond = min(amount_ucr, charge_ucr - sum(amount for _grant_id, amount in burned))
    rest = amount_ucr - beyond
    back: Burns = []
    for grant_id, amount in reversed(burned):
        given = min(rest, amount)
        if given:
            back.append((grant_id, given))
            rest -= given
    return beyond, back


def _transfers(ordered: list[LiveGrant], burned: dict[str, int], short_ucr: int) -> list[Transfer]:
    found = [
        Transfer(wallet_account(grant.kind), REVENUE, burned[grant.id], grant.id, USAGE)
        for grant in ordered
        if grant.id in burned
    ]
    if short_ucr:
        found.append(Transfer(RECEIVABLE, REVENUE, short_ucr, None, BEYOND_WALLET))
    return found
