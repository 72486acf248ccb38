"""From charges and grants to burns and transfers: pure arithmetic, no I/O.

Grants are used in burn order: trial, promo, rollover, plan, restored, topup; among equals the
one that expires first, then the oldest. A charge may use the grants that had not expired when
its exchange was admitted. What those cannot cover is taken from expired grants that have not
been forfeited yet (Redis counts them as balance until then); what is left after that becomes a
receivable. So wallets never go below zero, and every charge is explained to the micro-credit.
"""

from collections.abc import Iterable
from typing import NamedTuple

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


def _transfers(ordered: list[LiveGrant], burned: dict[str, int], short_ucr: int) -> list[Transfer]:
    found = [
        Transfer(wallet_account(grant.kind), REVENUE, burned[grant.id], grant.id, USAGE)
        for grant in ordered
        if grant.id in burned
    ]
    if short_ucr:
        found.append(Transfer(RECEIVABLE, REVENUE, short_ucr, None, BEYOND_WALLET))
    return found
