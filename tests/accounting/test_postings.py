"""Burning grants: the planner against the simplest oracle, one micro-credit at a time."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.ledger import BEYOND_WALLET, USAGE, Transfer
from accounting.postings import PRIORITIES, Charge, LiveGrant, give_back, net, plan

KINDS = list(PRIORITIES)

grants_of_a_workspace = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.one_of(st.none(), st.integers(0, 12)),
        st.integers(1, 12),
    ),
    max_size=8,
).map(
    lambda rows: [
        LiveGrant(f"grant_{n}", kind, expires, amount)
        for n, (kind, expires, amount) in enumerate(rows)
    ]
)
charges_of_a_batch = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 15)), max_size=12).map(
    lambda rows: [
        Charge(f"req_{n:02d}", started, amount) for n, (started, amount) in enumerate(rows)
    ]
)


def oracle(charges: list[Charge], grants: list[LiveGrant]) -> tuple[Counter[tuple[str, str]], int]:
    """Each micro-credit from the first grant that may pay it: (request, grant) → µcr, short."""
    left = {grant.id: grant.remaining_ucr for grant in grants}
    paid: Counter[tuple[str, str]] = Counter()
    short = 0
    for charge in sorted(charges, key=lambda charge: (charge.started_at_us, charge.request_id)):
        for _ in range(charge.amount_ucr):
            candidates = [
                (
                    grant.expires_at_us is not None and grant.expires_at_us <= charge.started_at_us,
                    PRIORITIES[grant.kind],
                    float("inf") if grant.expires_at_us is None else grant.expires_at_us,
                    grant.id,
                )
                for grant in grants
                if left[grant.id]
            ]
            if candidates:
                grant_id = min(candidates)[3]
                left[grant_id] -= 1
                paid[charge.request_id, grant_id] += 1
            else:
                short += 1
    return paid, short


@settings(print_blob=True, max_examples=500, deadline=None)
@given(charges_of_a_batch, grants_of_a_workspace)
def test_the_planner_agrees_with_the_oracle(charges: list[Charge], grants: list[LiveGrant]) -> None:
    posting = plan(charges, grants)
    paid, short = oracle(charges, grants)
    found = {
        (request_id, grant_id): amount
        for request_id, burns in posting.burns.items()
        for grant_id, amount in burns
    }
    assert found == dict(paid)
    assert posting.short_ucr == short


@settings(print_blob=True, max_examples=500, deadline=None)
@given(charges_of_a_batch, grants_of_a_workspace)
def test_everything_adds_up(charges: list[Charge], grants: list[LiveGrant]) -> None:
    posting = plan(charges, grants)
    remaining = {grant.id: grant.remaining_ucr for grant in grants}
    by_grant: Counter[str] = Counter()
    for burns in posting.burns.values():
        by_grant.update(dict(burns))
    assert by_grant == posting.burned
    assert all(0 < amount <= remaining[grant_id] for grant_id, amount in posting.burned.items())
    assert set(posting.exhausted) == {
        grant_id for grant_id, amount in posting.burned.items() if amount == remaining[grant_id]
    }
    assert sum(transfer.amount_ucr for transfer in posting.transfers) == sum(
        charge.amount_ucr for charge in charges
    )
    assert (
        sum(transfer.amount_ucr for transfer in posting.transfers if transfer.code == BEYOND_WALLET)
        == posting.short_ucr
    )
    assert posting.short_ucr == max(
        0, sum(charge.amount_ucr for charge in charges) - sum(remaining.values())
    )


@settings(print_blob=True, deadline=None)
@given(charges_of_a_batch, grants_of_a_workspace, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(
    charges: list[Charge], grants: list[LiveGrant], random: object
) -> None:
    shuffled, other_grants = list(charges), list(grants)
    random.shuffle(shuffled)
    random.shuffle(other_grants)
    assert plan(shuffled, other_grants) == plan(charges, grants)


def test_burn_order_by_kind_then_expiry_then_age() -> None:
    grants = [
        LiveGrant("g7", "topup", None, 1),
        LiveGrant("g6", "restored", None, 1),
        LiveGrant("g5", "plan", None, 1),
        LiveGrant("g4", "rollover", None, 1),
        LiveGrant("g3", "promo", None, 1),
        LiveGrant("g2", "promo", 90, 1),
        LiveGrant("g1", "promo", 90, 1),
        LiveGrant("g0", "trial", None, 1),
    ]
    posting = plan([Charge("req", 5, 8)], grants)
    assert [grant_id for grant_id, _amount in posting.burns["req"]] == [
        f"g{n}" for n in (0, 1, 2, 3, 4, 5, 6, 7)
    ]


def test_a_grant_pays_until_the_instant_before_it_expires() -> None:
    grants = [LiveGrant("trial", "trial", 100, 9), LiveGrant("topup", "topup", None, 9)]
    posting = plan([Charge("in time", 99, 1), Charge("too late", 100, 1)], grants)
    assert posting.burns == {"in time": [("trial", 1)], "too late": [("topup", 1)]}


def test_the_transfers_of_a_batch() -> None:
    grants = [LiveGrant("a", "trial", None, 5), LiveGrant("b", "topup", None, 2)]
    posting = plan([Charge("one", 1, 4), Charge("two", 2, 6)], grants)
    assert posting.transfers == [
        Transfer("wallet_trial", "usage_revenue", 5, "a", USAGE),
        Transfer("wallet_topup", "usage_revenue", 2, "b", USAGE),
        Transfer("receivable", "usage_revenue", 3, None, BEYOND_WALLET),
    ]
    assert posting.burns == {"one": [("a", 4)], "two": [("a", 1), ("b", 2)]}


burned_of_a_charge = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 9)), max_size=5
)


@given(burned_of_a_charge, st.integers(0, 9), st.lists(st.integers(0, 60), max_size=4))
def test_a_charge_is_undone_backwards_in_any_steps(
    burned: list[tuple[str, int]], beyond: int, steps: list[int]
) -> None:
    """Against a stack of single micro-credits; and what `net` then says is still burned."""
    stack = [grant for grant, amount in burned for _ in range(amount)] + [""] * beyond
    history = list(burned)
    for step in steps:
        amount = min(step, len(stack))
        from_beyond, back = give_back(amount, len(stack), net(history))
        popped = Counter(stack.pop() for _ in range(amount))
        assert from_beyond == popped.pop("", 0)
        given: Counter[str] = Counter()
        for grant, returned in back:
            given[grant] += returned
        assert given == popped
        history += [(grant, -returned) for grant, returned in back]
        still = [grant for grant, left in net(history) for _ in range(left)]
        assert still == [grant for grant in stack if grant]
