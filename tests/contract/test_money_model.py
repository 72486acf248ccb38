"""Random histories of workers, keys and wallets: real Redis and the model agree on each field.

The scripts run as they are, on the machine's clock. On failure hypothesis prints the shortest
history it found and the blob that repeats it.
"""

from typing import Any

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

WORKSPACES = same_shard(3)
KEYS = ["key_1", "key_2"]
BOOTS = ["boot_1", "boot_2", "boot_3"]
NEAR_MIDNIGHT = 20_001 * DAY - 3 * MINUTE

SEARCH = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

workspaces = st.sampled_from(WORKSPACES)
keys = st.sampled_from(KEYS)
boots = st.sampled_from(BOOTS)
small = st.integers(0, 400)
amounts = st.one_of(small, small, small, st.sampled_from([0, 1, 10**6, MAX // 2, MAX // 2 + 1]))
asks = st.builds(Ask, amounts, st.integers(0, 60), st.sampled_from([1, 1, 1, 1, 0]))
limits = st.fixed_dictionaries(
    {},
    optional={
        "expires_at_us": st.integers(NEAR_MIDNIGHT, NEAR_MIDNIGHT + 10 * MINUTE),
        "requests_per_minute": st.sampled_from([1, 2, 3, 7, 60]),
        "tokens_per_minute": st.sampled_from([1, 40, 60, 100, 997]),
        "tokens_per_day": st.integers(1, 300),
        "concurrency": st.integers(1, 4),
        "cost_cap_ucr": st.one_of(st.just(0), st.integers(1, 2000), st.just(MAX)),
    },
)


class Hold:
    """What a worker knows of one request in flight."""

    def __init__(self, ask: Ask, admitted_at: int) -> None:
        self.ask = ask
        self.admitted_at = admitted_at


class Histories(RuleBasedStateMachine):
    """Workers that lease, settle, lose replies, repeat themselves and give back."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        store.client.flushall()
        self.model = Model(NEAR_MIDNIGHT)
        self.store.set_clock(self.model.now)
        self.in_flight: dict[tuple[str, str, str], list[Hold]] = {}
        self.sent: list[tuple[str, int, list[Row]]] = []

    @initialize(amount=st.integers(0, 3000), rules=limits)
    def one_is_funded(self, amount: int, rules: dict[str, int]) -> None:
        self.put_workspace(WORKSPACES[0], ACTIVE)
        self.credit(WORKSPACES[0], 0, amount)
        self.put_key(WORKSPACES[0], KEYS[0], 1, LIVE, rules)

    @rule(name=workspaces, state=st.sampled_from([ACTIVE, ACTIVE, ACTIVE, SUSPENDED]))
    def put_workspace(self, name: str, state: int) -> None:
        assert self.store.put_workspace(name, state) == self.model.put_workspace(name, state)

    @rule(
        name=workspaces,
        key=keys,
        step=st.sampled_from([1, 1, 0, -1]),
        state=st.sampled_from([LIVE, LIVE, LIVE, LIVE, REVOKED]),
        rules=limits,
    )
    def put_key(self, name: str, key: str, step: int, state: int, rules: dict[str, int]) -> None:
        if name in self.model.workspaces:
            chosen = KeyRules(max(1, self.version(name, key) + step), state, **rules)
            written = self.store.put_key(name, key, chosen)
            assert written == self.model.put_key(name, key, chosen)

    @rule(name=workspaces, skip=st.sampled_from([0, 0, 0, 0, -1, 1]), amount=amounts)
    def credit(self, name: str, skip: int, amount: int) -> None:
        """The next delta, the last one again, or one too far."""
        self._credit(name, skip, amount)

    @rule(name=workspaces, amount=st.integers(1, 200))
    def claw_back(self, name: str, amount: int) -> None:
        self._credit(name, 0, -amount)

    def _credit(self, name: str, skip: int, amount: int) -> None:
        workspace = self.model.workspaces.get(name)
        delta = max(1, (workspace.last_delta if workspace else 0) + 1 + skip)
        if workspace is None or abs(workspace.balance + amount) <= MAX:
            replies = self.store.credit(name, delta, amount), self.model.credit(name, delta, amount)
            assert replies[0] == replies[1]

    @rule(passed=st.one_of(
        st.integers(0, 3), st.integers(0, 5_000_000), st.sampled_from([MINUTE // 7, MINUTE, DAY])
    ))  # fmt: skip
    def time_passes(self, passed: int) -> None:
        self.model.now += passed
        self.store.set_clock(self.model.now)

    def version(self, name: str, key: str) -> int:
        workspace = self.model.workspaces.get(name)
        return workspace.keys[key].rules.version if workspace and key in workspace.keys else 0

    def mine(self, name: str, key: str, boot: str) -> tuple[int, int, int]:
        holds = self.in_flight.get((name, key, boot), [])
        credits = sum(hold.ask.credits for hold in holds)
        return credits, sum(hold.ask.tokens for hold in holds), len(holds)

    @rule(
        name=workspaces,
        key=keys,
        boot=boots,
        wanted=st.lists(asks, max_size=5),
        lost=st.sampled_from([False, False, False, True]),
        stale=st.sampled_from([False] * 9 + [True]),
    )
    def lease(
        self, name: str, key: str, boot: str, wanted: list[Ask], lost: bool, stale: bool
    ) -> None:
        """Ask for some; with `lost`, the reply never reaches the worker."""
        more: dict[str, Any] = {
            "key": key,
            "boot": boot,
            "mine": self.mine(name, key, boot),
            "version": self.version(name, key) + stale,
        }
        if more["mine"][0] > MAX:
            return
        leased = self.store.lease(name, *wanted, **more)
        assert (leased.code, leased.outcomes) == self.model.lease(name, wanted, **more)
        if leased.code:
            return
        wallet = self.model.wallet(name)
        assert (leased.now, leased.balance, leased.held) == (
            self.model.now,
            wallet.balance,
            wallet.held,
        )
        admitted = [
            Hold(ask, leased.now)
            for ask, outcome in zip(wanted, leased.outcomes, strict=True)
            if outcome == ADMITTED
        ]
        if any(hold.ask.credits for hold in admitted):
            assert wallet.held <= wallet.balance
            self.within_cap(name, key)
        if not lost:
            self.in_flight.setdefault((name, key, boot), []).extend(admitted)

    def within_cap(self, name: str, key: str) -> None:
        of = self.model.workspaces[name].keys[key]
        if of.rules.cost_cap_ucr >= 0:
            held = self.model.workspaces[name].under(key).credits
            assert of.spent + held <= of.rules.cost_cap_ucr

    @precondition(lambda self: any(self.in_flight.values()))
    @rule(data=st.data(), boot=boots)
    def settle(self, data: st.DataObject, boot: str) -> None:
        """One batch of what a worker has in flight: charged in part, in full or void."""
        rows = []
        for (name, key, of), holds in self.in_flight.items():
            if of == boot and holds:
                count = data.draw(st.integers(0, len(holds)))
                done = [holds.pop(0) for _ in range(count)]
                if done:
                    rows.append(self.row(data, name, key, done))
        if rows:
            number = self.model.settled.get(boot, 0) + data.draw(st.sampled_from([1, 1, 3]))
            self.send(boot, number, rows)

    def row(self, data: st.DataObject, name: str, key: str, done: list[Hold]) -> Row:
        charge = used = 0
        voids = []
        for hold in done:
            if data.draw(st.integers(0, 3)) == 0:
                voids.append(hold.admitted_at)
            else:
                charge += data.draw(st.integers(0, hold.ask.credits))
                used += data.draw(st.integers(0, hold.ask.tokens))
        return Row(
            name,
            key,
            sum(hold.ask.credits for hold in done),
            charge,
            sum(hold.ask.tokens for hold in done),
            used,
            len(done),
            tuple(voids),
        )

    def send(self, boot: str, number: int, rows: list[Row]) -> None:
        stream_id = self.store.settle(number, *rows, boot=boot)
        assert bool(stream_id) == self.model.settle(boot, number, rows)
        self.sent.append((boot, number, rows))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        """A batch whose reply was lost, or the replay of a dead worker's journal."""
        self.send(*data.draw(st.sampled_from(self.sent)))

    @rule(name=workspaces, key=keys, boot=boots, early=st.sampled_from([False, False, True]))
    def release(self, name: str, key: str, boot: str, early: bool) -> None:
        if early or not self.in_flight.get((name, key, boot)):
            given_back = self.store.release(name, key, boot)
            assert given_back == self.model.release(name, key, boot)

    @invariant()
    def every_field_agrees(self) -> None:
        for name in WORKSPACES:
            found = self.store.snapshot(name)
            if name not in self.model.workspaces:
                assert found.wallet is None
                continue
            assert found.wallet == self.model.wallet(name)
            rules = {key: of.rules for key, of in self.model.workspaces[name].keys.items()}
            assert found.rules == rules
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
