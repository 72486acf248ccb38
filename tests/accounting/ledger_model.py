"""The simplest ledger that could be right: one wallet, a list of grants, whole numbers.

Written from what the product promises, without looking at how it does it: nothing is batched,
nothing is kept twice, there is no journal. Instants are seconds since the epoch.
"""

from dataclasses import dataclass, field

ORDER = ["trial", "promo", "rollover", "plan", "restored", "topup"]  # burned from the first
NEVER = float("inf")


@dataclass
class Grant:
    id: str
    kind: str
    amount: int
    expires: float
    consumed: int = 0
    forfeited: int = 0
    refunded: int = 0
    swept: bool = False
    restored: bool = False

    @property
    def left(self) -> int:
        return self.amount - self.consumed - self.forfeited - self.refunded

    def rank(self) -> tuple[int, float, str]:
        return ORDER.index(self.kind), self.expires, self.id


@dataclass
class Request:
    """An exchange; `paid` lists single burns in order: (grant, µcr)."""

    id: str
    started: float
    told: int  # what its worker said last that it costs
    revision: int = 0
    posted: int | None = None  # the last revision in the books; None: not there yet
    charge: int = 0  # in the books
    given_back: int = 0  # by operators
    paid: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Event:
    request: Request
    revision: int
    charge: int
    taken: int  # from the balance, when it was settled


class Model:
    """`stream` holds what is settled and not yet in the books."""

    def __init__(self, now: float) -> None:
        self.now = now  # what expires later does not expire in here
        self.grants: dict[str, Grant] = {}
        self.holds: dict[str, int] = {}
        self.requests: dict[str, Request] = {}
        self.stream: list[Event] = []

    @property
    def balance(self) -> int:
        owned = sum(grant.left for grant in self.grants.values())
        return owned - sum(event.taken for event in self.stream)

    @property
    def held(self) -> int:
        return sum(self.holds.values())

    @property
    def free(self) -> int:
        return self.balance - self.held

    @property
    def spent(self) -> int:
        on_stream = sum(event.taken for event in self.stream)
        return sum(request.charge for request in self.requests.values()) + on_stream

    # In flight

    def admit(self, name: str, hold: int) -> bool:
        if self.free < hold:
            return False
        self.holds[name] = hold
        return True

    def settle(self, name: str, started: float, charge: int) -> None:
        del self.holds[name]
        request = self.requests[name] = Request(name, started, charge)
        self.stream.append(Event(request, 0, charge, charge))

    def revise(self, name: str, charge: int) -> None:
        request = self.requests[name]
        taken = max(0, charge - request.told)
        request.revision, request.told = request.revision + 1, charge
        self.stream.append(Event(request, request.revision, charge, taken))

    # In the books

    def post(self, count: int) -> None:
        """The first `count` events: first tellings by their start, then what was told anew."""
        events, self.stream = self.stream[:count], self.stream[count:]
        first = [event for event in events if event.revision == 0]
        for event in sorted(first, key=lambda one: (one.request.started, one.request.id)):
            self._change(event.request, event.charge)
            event.request.posted = 0
        again = [event for event in events if event.revision]
        for event in sorted(again, key=lambda one: one.revision):
            request = event.request
            request.posted = event.revision
            self._change(request, max(0, event.charge - request.given_back))
            request.given_back = min(request.given_back, event.charge)

    def _change(self, request: Request, charge: int) -> None:
        if charge > request.charge:
            self._burn(request, charge - request.charge)
        else:
            self._unburn(request, request.charge - charge)
        request.charge = charge

    def _burn(self, request: Request, amount: int) -> None:
        while amount:
            able = [grant for grant in self.grants.values() if grant.left]
            first = min(able, key=lambda one: (one.expires <= request.started, one.rank()))
            taken = min(amount, first.left)
            first.consumed += taken
            request.paid.append((first.id, taken))
            amount -= taken

    def _unburn(self, request: Request, amount: int) -> None:
        while amount:
            grant_id, paid = request.paid.pop()
            back = min(amount, paid)
            if back < paid:
                request.paid.append((grant_id, paid - back))
            grant = self.grants[grant_id]
            grant.consumed -= back
            grant.forfeited += back if grant.expires <= self.now else 0
            amount -= back

    def reverse(self, name: str, charge: int) -> None:
        request = self.requests[name]
        request.given_back += request.charge - charge
        self._change(request, charge)

    # Grants

    def grant(self, one: Grant) -> None:
        self.grants[one.id] = one

    def sweep(self) -> None:
        due = [one for one in self.grants.values() if one.expires <= self.now and not one.swept]
        for grant in sorted(due, key=lambda one: one.expires):
            if not grant.left:
                grant.swept = True
                continue
            before = [event for event in self.stream if event.request.started < grant.expires]
            needed = self.held + sum(event.taken for event in before)
            grant.forfeited += max(0, min(grant.left - needed, self.free))

    def refund(self, grant_id: str, amount: int) -> bool:
        grant = self.grants[grant_id]
        if grant.kind != "topup" or amount > min(grant.left, self.free):
            return False
        grant.refunded += amount
        return True

    def claw_back(self, grant_id: str) -> int:
        grant = self.grants[grant_id]
        taken = min(grant.left, self.free)
        grant.refunded += taken
        return taken

    def restorable(self) -> list[Grant]:
        found = []
        for grant in self.grants.values():
            kind = grant.kind in ("plan", "rollover", "topup")
            if kind and grant.swept and grant.forfeited and not grant.restored:
                found.append(grant)
        return found
