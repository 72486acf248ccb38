"""ahead.lua, and random histories of workers that lease ahead: no sum drifts, no limit breaks.

The scripts read the test's clock. A worker here is what `proxy.leases` promises: it admits
from what is ahead while its right stands, and tells of what it used before the deadline. On
failure hypothesis prints the shortest history it found and the blob that repeats it.
"""

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from accounting.contract.keyspace import LeaseRecord, workspace_key
from tests.contract.store import ADMITTED, DAY, Ask, Row, Store
from tests.contract.test_lease_ahead import Mine, assert_sums, lease

WS = "ws_1"
NOON = 20_000 * DAY + DAY // 2
DEADLINE = 1_100_000


def ahead(store: Store) -> int:
    """What may still be admitted; asking changes nothing."""
    before = store.everything()
    alive = int(store.run("ahead", [workspace_key(WS)], []))
    assert store.everything() == before
    return alive


def test_only_what_may_still_be_admitted_counts(clocked: Store) -> None:
    clocked.fund(WS, 8000)
    clocked.fund(WS, key="key_2")
    clocked.set_clock(NOON)
    assert ahead(clocked) == 0
    lease(clocked, Ask(100, 10), ahead=(3, 10, 1))
    lease(clocked, ahead=(2, 10, 1), key="key_2")
    clocked.set_clock(NOON + 1)
    lease(clocked, ahead=(4, 10, 1), boot="boot_2")
    clocked.set_clock(NOON + DEADLINE)
    assert ahead(clocked) == 9
    clocked.set_clock(NOON + DEADLINE + 1)
    assert ahead(clocked) == 4
    clocked.set_clock(NOON + DEADLINE + 2)
    assert ahead(clocked) == 0
    assert (clocked.wallet(WS).held, clocked.wallet(WS).unused) == (190, 90)  # held all the same


def test_the_unknown_has_nothing_ahead(clocked: Store) -> None:
    clocked.set_clock(NOON)
    assert ahead(clocked) == 0


def test_a_silent_worker_keeps_what_its_requests_may_cost(clocked: Store) -> None:
    """It used all it had ahead, told nobody, and was paused: its settle comes late."""
    clocked.fund(WS, 8000)
    clocked.set_clock(NOON)
    assert lease(clocked, ahead=(10, 100, 1)).extra == 10
    clocked.set_clock(NOON + DEADLINE + 1)
    assert ahead(clocked) == 0
    assert lease(clocked, Ask(7001), boot="boot_2").outcomes != [ADMITTED]
    assert lease(clocked, Ask(7000), boot="boot_2").outcomes == [ADMITTED]
    clocked.settle(1, Row(WS, credits=7000, charge=7000, slots=1), boot="boot_2")
    clocked.settle(1, Row(WS, credits=1000, charge=1000, tokens=10, slots=10))
    assert clocked.wallet(WS).balance == 0
    assert_sums(clocked)


def test_release_of_a_boot_with_unused_parts(clocked: Store) -> None:
    clocked.fund(WS, 8000)
    clocked.set_clock(NOON)
    lease(clocked, Ask(100, 10), ahead=(3, 10, 1))
    lease(clocked, Ask(5, 2), ahead=(2, 10, 1), boot="boot_2")
    assert clocked.release(WS) == [130, 13, 4]
    assert (clocked.wallet(WS).held, clocked.wallet(WS).unused) == (25, 20)
    assert clocked.counters(WS).held_requests == 2
    assert_sums(clocked)
    assert clocked.release(WS, boot="boot_2") == [25, 4, 3]
    assert (clocked.wallet(WS).held, clocked.wallet(WS).unused) == (0, 0)
    assert clocked.counters(WS).held_requests == 0
    assert_sums(clocked)


def test_a_worker_that_was_silent_has_only_what_it_declares(clocked: Store) -> None:
    clocked.fund(WS, 8000)
    clocked.set_clock(NOON)
    lease(clocked, Ask(100, 10), ahead=(3, 10, 1))
    clocked.set_clock(NOON + DEADLINE + 1)
    lease(clocked, mine=Mine(100, 10, 1))
    assert (clocked.wallet(WS).held, clocked.wallet(WS).unused) == (100, 0)
    assert_sums(clocked)


# Random histories

BOOTS, KEYS = ["boot_1", "boot_2", "boot_3"], ["key_1", "key_2"]
CREDITS, TOKENS = 10, 3  # what a request asks for
SEARCH = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Worker:
    """One boot's figures under one key, as `KeyLease` keeps them."""

    flight: list[int] = field(default_factory=list)  # when each was admitted
    free: int = 0
    used: int = 0
    right_until: int = 0

    def mine(self) -> Mine:
        slots = len(self.flight) + self.free
        parts = self.free, self.free * CREDITS, self.free * TOKENS
        return Mine(slots * CREDITS, slots * TOKENS, slots, *parts, self.used)


class Histories(RuleBasedStateMachine):
    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        store.client.flushall()
        self.now = NOON
        self.workers: dict[tuple[str, str], Worker] = {}
        self.batches = dict.fromkeys(BOOTS, 0)
        self.charged = 0
        self.balance = 0

    @initialize(
        balance=st.integers(1, 1500),
        cap=st.sampled_from([-1, 300, 700]),
        slots=st.sampled_from([0, 9, 25]),
    )
    def fund(self, balance: int, cap: int, slots: int) -> None:
        self.balance = balance
        self.store.set_clock(self.now)
        self.store.fund(WS, balance, cost_cap_ucr=cap)
        self.store.fund(WS, key="key_2", concurrency=slots)

    def worker(self, boot: str, key: str) -> Worker:
        return self.workers.setdefault((boot, key), Worker())

    def call(self, boot: str, key: str, asks: int = 0, ahead: int = 0, lost: bool = False) -> None:
        worker = self.worker(boot, key)
        if asks or self.now >= worker.right_until:
            worker.free = 0
        asked = [Ask(CREDITS, TOKENS)] * asks
        more = (ahead, CREDITS, TOKENS)
        reply = lease(self.store, *asked, mine=worker.mine(), ahead=more, boot=boot, key=key)
        if lost:  # the worker knows nothing of it, and lets go of what it had
            worker.free = worker.right_until = 0
            return
        worker.used = 0
        worker.flight += [self.now] * reply.outcomes.count(ADMITTED)
        worker.free += reply.extra
        if reply.extra:
            worker.right_until = self.now + reply.right_us

    @rule(
        boot=st.sampled_from(BOOTS),
        key=st.sampled_from(KEYS),
        asks=st.integers(0, 6),
        ahead=st.integers(0, 20),
        lost=st.sampled_from([False] * 5 + [True]),
    )
    def ask(self, boot: str, key: str, asks: int, ahead: int, lost: bool) -> None:
        self.call(boot, key, asks, ahead, lost)

    @rule(boot=st.sampled_from(BOOTS), key=st.sampled_from(KEYS), count=st.integers(1, 8))
    def admit_from_ahead(self, boot: str, key: str, count: int) -> None:
        worker = self.worker(boot, key)
        if self.now < worker.right_until:
            count = min(count, worker.free)
            worker.free -= count
            worker.used += count
            worker.flight += [self.now] * count

    @rule(boot=st.sampled_from(BOOTS), key=st.sampled_from(KEYS))
    def give_back(self, boot: str, key: str) -> None:
        self.worker(boot, key).free = 0
        self.call(boot, key)

    @rule(
        boot=st.sampled_from(BOOTS),
        key=st.sampled_from(KEYS),
        count=st.integers(1, 8),
        charge=st.sampled_from([0, 4, CREDITS]),
    )
    def settle(self, boot: str, key: str, count: int, charge: int) -> None:
        """Charged in part or in full, or void."""
        flight = self.worker(boot, key).flight
        done, flight[:count] = flight[:count], []
        if not done:
            return
        n = len(done)
        voids = () if charge else tuple(done)
        row = Row(WS, key, n * CREDITS, n * charge, n * TOKENS, n if charge else 0, n, voids)
        self.batches[boot] += 1
        self.store.settle(self.batches[boot], row, boot=boot)
        self.charged += n * charge

    @rule(wait=st.sampled_from([1, 1000, 400_000, 999_999, 1_000_000, DEADLINE, DEADLINE + 1]))
    def pass_time(self, wait: int) -> None:
        self.now += wait
        self.store.set_clock(self.now)

    @rule()
    def look_ahead(self) -> None:
        alive = ahead(self.store)
        assert alive >= sum(w.free for w in self.workers.values() if self.now < w.right_until)

    @rule(boot=st.sampled_from(BOOTS))
    def die(self, boot: str) -> None:
        """Its journal is replayed, the rest released; the next of the name is a new worker."""
        for key in KEYS:
            self.settle(boot, key, len(self.worker(boot, key).flight), 4)
            self.store.release(WS, key, boot)
            self.workers[boot, key] = Worker()

    @invariant()
    def no_limit_is_passed_and_no_sum_drifts(self) -> None:
        if not self.balance:
            return
        assert_sums(self.store)
        found = self.store.snapshot(WS)
        assert found.wallet is not None
        assert found.wallet.balance == self.balance - self.charged
        # What workers know they owe is held, and what they may still admit on.
        rightful = 0
        for (boot, key), worker in self.workers.items():
            free = worker.free if self.now < worker.right_until else 0
            lease_here = found.leases.get(f"{boot}:{key}", LeaseRecord())
            assert lease_here.slots >= len(worker.flight) + free
            assert lease_here.credits_ucr >= (len(worker.flight) + free) * CREDITS
            rightful += len(worker.flight) + free
        assert rightful * CREDITS <= found.wallet.balance

    def teardown(self) -> None:
        for boot, key in list(self.workers):
            self.settle(boot, key, len(self.worker(boot, key).flight), CREDITS)
            self.give_back(boot, key)
        self.no_limit_is_passed_and_no_sum_drifts()
        if self.balance:
            found = self.store.snapshot(WS)
            assert found.wallet is not None
            assert (found.wallet.held, found.wallet.unused) == (0, 0)
            for counters in found.counters.values():
                sums = counters.open, counters.held_ucr, counters.held_tokens
                assert (*sums, counters.held_requests) == (0, 0, 0, 0)


def test_no_history_of_leasing_ahead_passes_a_limit(clocked: Store) -> None:
    run_state_machine_as_test(lambda: Histories(clocked), settings=SEARCH)
