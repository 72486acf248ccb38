"""Random histories of workers, keys and wallets: real Redis and the model agree on each field.

The scripts run as they are, on the machine's clock. On failure hypothesis prints the shortest
history it found and the blob that repeats it.
"""

from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from accounting.contract.keyspace import (
    ACTIVE,
    LIVE,
    REVOKED,
    SUSPENDED,
    KeyRules,
    boots_key,
    shard_of,
)
from tests.contract.money_model import Model
from tests.contract.store import ADMITTED, DAY, MAX, MINUTE, Ask, Row, Store, same_shard

WORKSPACES = same_shard(2)
KEYS = ["key_1", "key_2"]
BOOTS = ["boot_1", "boot_2"]
START = 20_001 * DAY - 3 * MINUTE  # shortly before a midnight

SEARCH = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

workspaces = st.sampled_from(WORKSPACES)
keys = st.sampled_from(KEYS)
boots = st.sampled_from(BOOTS)
small = st.one_of(st.sampled_from([0, 100, 200]), st.integers(0, 400))  # round ones meet limits
credits = st.one_of(*[small] * 9, st.sampled_from([10**6, MAX // 2, MAX // 2 + 1]))
asks = st.builds(Ask, credits, st.integers(0, 60), st.sampled_from([1] * 9 + [0]))
LIMITS: dict[str, st.SearchStrategy[int]] = {
    "expires_at_us": st.sampled_from([START + 1, START + 4 * MINUTE, START + DAY]),
    "requests_per_minute": st.sampled_from([1, 2, 3, 7, 60]),
    "tokens_per_minute": st.sampled_from([40, 60, 100, 997]),
    "tokens_per_day": st.integers(50, 300),
    "concurrency": st.integers(1, 4),
    "cost_cap_ucr": st.sampled_from([0, 100, 300, 500, 1000, MAX]),
}
limits = st.one_of(  # none, one or two of them: with more, nearly everything is refused
    st.just({}),
    *[st.fixed_dictionaries({name: LIMITS[name]}) for name in LIMITS],
    st.fixed_dictionaries({name: LIMITS[name] for name in ("tokens_per_minute", "cost_cap_ucr")}),
    st.fixed_dictionaries({name: LIMITS[name] for name in ("requests_per_minute", "concurrency")}),
)


class Hold(NamedTuple):
    """What a worker knows of one request in flight."""

    ask: Ask
    admitted_at: int


class Histories(RuleBasedStateMachine):
    """Workers that lease, settle, lose replies, repeat themselves and give back."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        store.client.flushall()
        self.model = Model(START)
        store.set_clock(START)
        self.in_flight: dict[tuple[str, str, str], list[Hold]] = {}
        self.sent: list[tuple[str, int, list[Row]]] = []

    @initialize(
        balances=st.tuples(st.integers(0, 20_000), st.integers(0, 2000)),
        rules=st.tuples(limits, limits, limits, limits),
    )
    def all_are_funded(self, balances: tuple[int, int], rules: tuple[dict[str, int], ...]) -> None:
        given = iter(rules)
        for name, amount in zip(WORKSPACES, balances, strict=True):
            self.put_workspace(name, ACTIVE)
            self.credit(name, 0, amount)
            for key in KEYS:
                rules_of_key = KeyRules(1, LIVE, **next(given))
                assert self.store.put_key(name, key, rules_of_key) == 1
                assert self.model.put_key(name, key, rules_of_key) == 1

    # What operators, accounting and time do

    @rule(data=st.data(), name=workspaces, key=keys)
    def administer(self, data: st.DataObject, name: str, key: str) -> None:
        draw = data.draw
        act = draw(st.sampled_from(["credit", "claw back", "rules", "state", "release", "in vain"]))
        if act == "state":
            self.put_workspace(name, draw(st.sampled_from([ACTIVE, ACTIVE, SUSPENDED])))
        elif act == "rules":
            version = max(1, self.version(name, key) + draw(st.sampled_from([1, 1, 0, -1])))
            state = draw(st.sampled_from([LIVE, LIVE, LIVE, REVOKED]))
            rules = KeyRules(version, state, **draw(limits))
            assert self.store.put_key(name, key, rules) == self.model.put_key(name, key, rules)
        elif act == "release":
            self.release(name, key, draw(boots), early=draw(st.booleans()))
        elif act == "in vain":
            self.ask_in_vain(name, key, draw(boots), draw(st.sampled_from([-1, 1])))
        else:  # the next delta, the last one again, or one too far
            amount = draw(credits) if act == "credit" else -draw(st.integers(1, 200))
            self.credit(name, draw(st.sampled_from([0, 0, 0, 0, -1, 1])), amount)

    def put_workspace(self, name: str, state: int) -> None:
        assert self.store.put_workspace(name, state) == self.model.put_workspace(name, state)

    def credit(self, name: str, skip: int, amount: int) -> None:
        workspace = self.model.workspaces[name]
        delta = max(1, workspace.last_delta + 1 + skip)
        if abs(workspace.balance + amount) <= MAX:
            found = self.store.credit(name, delta, amount)
            assert found == self.model.credit(name, delta, amount)

    def release(self, name: str, key: str, boot: str, early: bool) -> None:
        if early or not self.in_flight.get((name, key, boot)):
            given_back = self.store.release(name, key, boot)
            assert given_back == self.model.release(name, key, boot)

    @rule(
        passed=st.one_of(
            st.integers(0, 10_000_000),
            st.sampled_from([1, 1000, MINUTE // 7, MINUTE // 2, MINUTE, 3 * MINUTE, DAY]),
        )
    )
    def time_passes(self, passed: int) -> None:
        self.model.now += passed
        self.store.set_clock(self.model.now)

    # What workers do

    def version(self, name: str, key: str) -> int:
        return self.model.workspaces[name].keys[key].rules.version

    def mine(self, name: str, key: str, boot: str) -> tuple[int, int, int]:
        asks = [hold.ask for hold in self.in_flight.get((name, key, boot), [])]
        return sum(ask.credits for ask in asks), sum(ask.tokens for ask in asks), len(asks)

    @rule(
        name=workspaces,
        key=keys,
        boot=boots,
        calls=st.lists(st.lists(asks, min_size=1, max_size=5), min_size=1, max_size=5),
        lost=st.sampled_from([False, False, False, True]),
    )
    def work(self, name: str, key: str, boot: str, calls: list[list[Ask]], lost: bool) -> None:
        for wanted in calls:
            self.lease(name, key, boot, wanted, lost)
            self.every_field_agrees()

    def lease(self, name: str, key: str, boot: str, wanted: list[Ask], lost: bool) -> None:
        """Ask for some; with `lost`, the reply never reaches the worker."""
        mine, version = self.mine(name, key, boot), self.version(name, key)
        more: dict[str, Any] = {"key": key, "boot": boot, "mine": mine, "version": version}
        leased = self.store.lease(name, *wanted, **more)
        assert (leased.code, leased.outcomes) == self.model.lease(name, wanted, **more)
        wallet = self.model.wallet(name)
        figures = (self.model.now, wallet.balance, wallet.held)
        assert (leased.now, leased.balance, leased.held) == figures
        admitted = [
            Hold(ask, leased.now)
            for ask, outcome in zip(wanted, leased.outcomes, strict=True)
            if outcome == ADMITTED
        ]
        if admitted:
            assert wallet.held <= wallet.balance
            self.is_within_its_cap(name, key)
        if not lost:
            self.in_flight.setdefault((name, key, boot), []).extend(admitted)

    def is_within_its_cap(self, name: str, key: str) -> None:
        of = self.model.workspaces[name].keys[key]
        if of.rules.cost_cap_ucr >= 0:
            held = self.model.workspaces[name].under(key).credits
            assert of.spent + held <= of.rules.cost_cap_ucr

    def ask_in_vain(self, name: str, key: str, boot: str, step: int) -> None:
        """With a stale record, or for what Redis does not know."""
        stale = self.version(name, key) + step
        more: dict[str, Any] = {"key": key, "boot": boot, "version": stale}
        more["mine"] = self.mine(name, key, boot)
        assert self.store.lease(name, Ask(1), **more).code == 2
        assert self.model.lease(name, [Ask(1)], **more) == (2, [])
        assert self.store.lease(name, Ask(1), key="key_9", boot=boot).code == 1
        assert self.store.lease("ws_9", Ask(1), key=key, boot=boot).code == 1

    @precondition(lambda self: any(self.in_flight.values()))
    @rule(data=st.data(), boot=boots, all_of_it=st.booleans())
    def settle(self, data: st.DataObject, boot: str, all_of_it: bool) -> None:
        """One batch of what a worker has in flight: charged in part, in full or void."""
        rows = []
        for (name, key, of), holds in self.in_flight.items():
            if of == boot and holds:
                count = len(holds) if all_of_it else data.draw(st.integers(1, len(holds)))
                done, holds[:count] = holds[:count], []
                rows.append(self.row(data, name, key, done))
        if rows:
            number = self.model.settled.get(boot, 0) + data.draw(st.sampled_from([1, 1, 3]))
            self.send(boot, number, rows)

    def row(self, data: st.DataObject, name: str, key: str, done: list[Hold]) -> Row:
        kinds = st.sampled_from(["part", "part", "full", "void"])
        charge, used, voids = 0, 0, []
        for hold in done:
            kind = data.draw(kinds)
            if kind == "void":
                voids.append(hold.admitted_at)
            else:
                charge += hold.ask.credits if kind == "full" else hold.ask.credits // 3
                used += hold.ask.tokens if kind == "full" else hold.ask.tokens // 3
        taken = sum(hold.ask.credits for hold in done)
        tokens = sum(hold.ask.tokens for hold in done)
        return Row(name, key, taken, charge, tokens, used, len(done), tuple(voids))

    def send(self, boot: str, number: int, rows: list[Row]) -> None:
        stream_id = self.store.settle(number, *rows, boot=boot)
        assert bool(stream_id) == self.model.settle(boot, number, rows)
        self.sent.append((boot, number, rows))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        """A batch whose reply was lost, or the replay of a dead worker's journal."""
        self.send(*data.draw(st.sampled_from(self.sent)))

    # What must hold after every step

    @invariant()
    def every_field_agrees(self) -> None:
        for name, workspace in self.model.workspaces.items():
            found = self.store.snapshot(name)
            assert found.wallet == self.model.wallet(name)
            assert found.rules == {key: of.rules for key, of in workspace.keys.items()}
            assert found.counters == self.model.counters(name)
            assert found.leases == self.model.leases(name)

    @invariant()
    def batches_and_marks_agree(self) -> None:
        last = self.store.client.hgetall(boots_key(shard_of(WORKSPACES[0])))
        assert {boot.decode(): int(n) for boot, n in last.items()} == self.model.settled
        assert len(self.store.stream(WORKSPACES[0])) == self.model.batches
        for boot in BOOTS:
            marks = {
                f"{name}|{key}".encode()
                for name, workspace in self.model.workspaces.items()
                for of, key in workspace.leases
                if of == boot
            }
            assert self.store.leased_by(WORKSPACES[0], boot) == marks


def test_redis_and_the_model_agree_on_every_history(clocked: Store) -> None:
    run_state_machine_as_test(lambda: Histories(clocked), settings=SEARCH)
