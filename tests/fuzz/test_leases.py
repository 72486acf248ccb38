"""Workers lease, admit, settle, pause, die and are replayed in any order: no limit is passed.

The model knows nothing of leases. It goes through the history as it happened and asks, for
each admission, what a single desk with one ledger would have had left at that moment.
"""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from msgspec import structs
from redis import Redis

from accounting.contract.keyspace import LIVE, REVOKED, KeyRules, workspace_key
from accounting.contract.usage_event import UsageEvent
from proxy import replay
from tests.contract.store import MINUTE, Store
from tests.fuzz.effort import search
from tests.fuzz.workers import WS, History, Request, Scene, Worker

KEYS = ["key_1", "key_2"]
WORKERS = 3
LIMITS: dict[str, dict[str, int]] = {
    "none": {},
    "balance": {},
    "cap": {"cost_cap_ucr": 400},
    "requests": {"requests_per_minute": 30},
    "tokens": {"tokens_per_minute": 150},
    "concurrency": {"concurrency": 40},
    "all": {"cost_cap_ucr": 700, "requests_per_minute": 120, "tokens_per_minute": 300},
}
SIZES = [(10, 3), (10, 3), (25, 8)]  # µcr and tokens of a request


class Books:
    """One key's account at the single desk."""

    def __init__(self, versions: list[KeyRules]) -> None:
        self.allowed: list[KeyRules] = []  # any of these may be in force: a change takes its time
        self.open: dict[str, Request] = {}
        self.spent = 0
        # Where the rules changed, the laxest figure of all: what was counted under which, and
        # when, is the product's business.
        self.gap = min((_gap(rules) for rules in versions), default=0)
        self.back = max((_gap(rules) for rules in versions), default=0)
        self.tokens_per_minute = max((rules.tokens_per_minute for rules in versions), default=0)
        self.requests_us = self.tokens_us = 0.0  # how full the buckets are, in time to drain
        self.at_us = 0

    def drain(self, now_us: int) -> None:
        passed, self.at_us = now_us - self.at_us, now_us
        self.requests_us = max(0.0, self.requests_us - passed)
        self.tokens_us = max(0.0, self.tokens_us - passed)

    def may_admit(self, asked: Request, rules: KeyRules) -> bool:
        held = sum(one.credits for one in self.open.values()) + asked.credits
        tokens = sum(one.tokens for one in self.open.values()) + asked.tokens
        rpm, tpm, cap = rules.requests_per_minute, rules.tokens_per_minute, rules.cost_cap_ucr
        return (
            rules.state == LIVE
            and (not rules.concurrency or len(self.open) < rules.concurrency)
            and (cap < 0 or self.spent + held <= cap)
            and (not rpm or self.requests_us + self.gap <= rpm * _gap(rules))
            and (not tpm or self.tokens_us + tokens * MINUTE / tpm <= MINUTE + 2)
        )

    def admit(self, asked: Request) -> None:
        assert any(self.may_admit(asked, rules) for rules in self.allowed), (asked, self.__dict__)
        assert asked.id not in self.open
        self.open[asked.id] = asked
        self.requests_us += self.gap

    def settle(self, ended: UsageEvent) -> int:
        hold = self.open.pop(ended.request_id)  # once, and only what was admitted
        assert 0 <= ended.charge_ucr <= hold.credits == ended.hold_ucr
        self.spent += ended.charge_ucr
        if ended.settlement == "void":
            self.requests_us = max(0.0, self.requests_us - self.back)
        elif self.tokens_per_minute:
            used = ended.tokens.input + ended.tokens.output
            level = self.tokens_us + used * MINUTE / self.tokens_per_minute
            self.tokens_us = min(MINUTE, level)
        return ended.charge_ucr


def _gap(rules: KeyRules) -> int:
    rpm = rules.requests_per_minute
    return -(-MINUTE // rpm) if rpm else 0


def check(history: History, balance: int) -> tuple[int, dict[str, Books]]:
    """Go through what happened; what was charged in all, and the books at the end."""
    facts = history.in_order()
    versions: dict[str, list[KeyRules]] = {key: [] for key in KEYS}
    for _, kind, fact in facts:
        if kind == "rules":
            versions[fact[0]].append(fact[1])
    books = {key: Books(versions[key]) for key in KEYS}
    charged = 0
    for moment, kind, fact in facts:
        for book in books.values():
            book.drain(moment.now_us)
        if kind == "rules":
            books[fact[0]].allowed.append(fact[1])
        elif kind == "answered":
            books[fact].allowed = books[fact].allowed[-1:]
        elif kind == "settled":
            charged += books[fact.key_id].settle(fact)
        else:
            held = sum(one.credits for book in books.values() for one in book.open.values())
            assert charged + held + fact.credits <= balance, "the wallet was overdrawn"
            books[fact.key].admit(fact)
    return charged, books


class Histories(RuleBasedStateMachine):
    def __init__(self, store: Store, url: str, folder: Path, loop: asyncio.AbstractEventLoop):
        super().__init__()
        store.client.flushall()
        shutil.rmtree(folder)
        folder.mkdir()
        self.store = store
        self.scene = Scene(store, url, folder, loop)
        self.at: list[Worker] = []
        self.balance = 0
        self.rules: dict[str, KeyRules] = {}
        self.changing: set[str] = set()

    @initialize(limit=st.sampled_from(sorted(LIMITS)))
    def begin(self, limit: str) -> None:
        """One limit is tight, so that it is met; or all of them are, somewhat."""
        self.balance = 1500 if limit in ("balance", "all") else 100_000
        self.store.put_workspace(WS)
        self.store.credit(WS, 1, self.balance)
        for key in KEYS:
            rules = KeyRules(1, LIVE, **LIMITS[limit])
            self.scene.rules(key, rules)
            self.rules[key] = rules
        self.at = [Worker(self.scene) for _ in range(WORKERS)]

    which = st.integers(0, WORKERS - 1)
    keys = st.sampled_from(KEYS)
    sure = st.sampled_from([True, True, True, False])
    changes = st.sampled_from(
        [{"cost_cap_ucr": cap} for cap in (-1, 100, 300)]
        + [{"concurrency": slots} for slots in (0, 3, 9, 40)]
        + [{"requests_per_minute": rpm} for rpm in (15, 30, 120)]
        + [{"tokens_per_minute": tpm} for tpm in (50, 200)]
    )
    waits = st.sampled_from([100, 1000, 20_000, 100_000, 999_999, 1_100_001, 1_100_001, 5_000_000])

    def awake(self, number: int) -> Worker | None:
        return None if self.at[number].paused else self.at[number]

    @rule(number=which, key=keys, size=st.sampled_from(SIZES), flows=sure)
    def ask(self, number: int, key: str, size: tuple[int, int], flows: bool) -> None:
        if worker := self.awake(number):
            worker.ask(key, *size)
            if flows:
                worker.flow()

    @rule(number=which, key=keys, count=st.integers(2, 40), every=st.integers(1, 4))
    def many(self, number: int, key: str, count: int, every: int) -> None:
        """A key is hot: a request each thousandth of a second."""
        if worker := self.awake(number):
            for done in range(count):
                worker.ask(key, *SIZES[0])
                if done % every == 0:
                    worker.flow()
                self.scene.set_time(self.scene.now_us + 1000)

    @rule(number=which, count=st.integers(1, 30))
    def admit_from_ahead(self, number: int, count: int) -> None:
        if worker := self.awake(number):
            for lease in list(worker.leases._leases.values()):
                for _ in range(min(count, lease.free_requests)):
                    worker.ask(lease.key_id, *SIZES[0])

    @rule(
        number=which, count=st.integers(0, 4), what=st.sampled_from(["arrive", "deliver", "lose"])
    )
    def happen(self, number: int, count: int, what: str) -> None:
        """Something on the way to Redis or back; a paused worker's words may still arrive."""
        worker = self.at[number]
        if what == "arrive":
            worker.wire.arrive(count)
        elif what == "deliver" and not worker.paused:
            worker.wire.deliver(count)
        elif count == 0 and not worker.paused:
            worker.wire.lose()

    @rule(number=which, key=keys, answered=st.booleans(), wait=waits, tight=st.integers(0, 2))
    def overtake(self, number: int, key: str, answered: bool, wait: int, tight: int) -> None:
        """A worker has some ahead, or a reply on the way that brings some; it is paused while
        the rules change, and goes on later."""
        if worker := self.awake(number):
            for done in range(2):
                self.scene.set_time(self.scene.now_us + 1000)
                worker.ask(key, *SIZES[0])
                if answered or not done:
                    worker.flow()
            worker.wire.arrive(9)
            self.publish(key, REVOKED if tight == 0 else LIVE, {"concurrency": tight})
            self.scene.set_time(self.scene.now_us + wait)
            self.nothing_was_admitted_beyond()
            worker.wire.deliver(9)
            self.admit_from_ahead(number, 30)

    @rule(number=which, flows=sure)
    def sweep(self, number: int, flows: bool) -> None:
        """What a worker does from time to time."""
        if worker := self.awake(number):
            worker.run_timers()
            worker.leases.release_unused()
            worker.leases.release_idle()
            if flows:
                worker.flow()

    @rule(number=which, flows=sure)
    def hear(self, number: int, flows: bool) -> None:
        if worker := self.awake(number):
            worker.hear()
            if flows:
                worker.flow()

    @rule(number=which)
    def go_deaf(self, number: int) -> None:
        """The subscription to recalls breaks, and later is there again."""
        if worker := self.awake(number):
            worker.leases.may_lease_ahead = not worker.leases.may_lease_ahead
            if not worker.leases.may_lease_ahead:
                worker.recalls.clear()
                worker.leases.give_back_all()

    @rule(number=which, count=st.integers(1, 40), part=st.sampled_from([0, 40, 100]), flows=sure)
    def end(self, number: int, count: int, part: int, flows: bool) -> None:
        """The oldest requests: void, charged in part, or in full."""
        if worker := self.awake(number):
            for one in worker.open[:count]:
                worker.end(one, one.credits * part // 100, one.tokens * part // 100)
            if flows:
                self.scene.set_time(self.scene.now_us + 20_000)
                worker.run_timers()
                worker.flow()

    @rule(wait=waits)
    def pass_time(self, wait: int) -> None:
        self.scene.set_time(self.scene.now_us + wait)

    @rule(number=which)
    def pause_or_go_on(self, number: int) -> None:
        """SIGSTOP, SIGCONT: it does nothing, and its clock goes on."""
        self.at[number].paused = not self.at[number].paused

    @rule(number=which)
    def kill(self, number: int) -> None:
        event("killed")
        self.at[number].die()
        self.at[number] = Worker(self.scene)

    @rule(number=st.integers(0, 20))
    def arrive_from_the_dead(self, number: int) -> None:
        dead = [worker for worker in self.scene.workers if worker.dead and worker.wire.sent]
        if dead:
            dead[number % len(dead)].wire.arrive(1)

    @rule()
    def replay(self) -> None:
        self.scene.replay()

    @rule(number=which)
    def stop(self, number: int) -> None:
        """A worker leaves in order, and another takes its place."""
        if worker := self.awake(number):
            worker.stop()
            self.at[number] = Worker(self.scene)

    @rule(key=keys, state=st.sampled_from([LIVE, LIVE, LIVE, REVOKED]), change=changes)
    def change(self, key: str, state: int, change: dict[str, int]) -> None:
        """Tightened, loosened, revoked, given back; the recall is published, not yet heard."""
        self.publish(key, state, change)

    def publish(self, key: str, state: int, change: dict[str, int]) -> None:
        old = self.rules[key]
        buckets = {"requests_per_minute", "tokens_per_minute"}
        change = {
            name: to for name, to in change.items() if getattr(old, name) or name not in buckets
        }
        new = structs.replace(old, version=old.version + 1, state=state, **change)
        self.rules[key] = new
        self.scene.rules(key, new)
        self.changing.add(key)
        for worker in self.at:
            worker.recalls.append(WS)

    @invariant()
    def nothing_was_admitted_beyond(self) -> None:
        if self.changing and not self._ahead():
            for key in self.changing:  # from here on the change has been answered
                self.scene.history.add(self.scene.moment(), "answered", key)
            self.changing.clear()
        charged, books = check(self.scene.history, self.balance)
        if not self.balance:
            return
        wallet = self.store.wallet(WS)
        assert wallet.balance == self.balance - charged
        held = sum(one.credits for book in books.values() for one in book.open.values())
        assert held <= wallet.held <= wallet.balance
        event(f"{min(9, len(self.scene.history.facts) // 20)} × 20 facts")

    def _ahead(self) -> int:
        return int(self.store.run("ahead", [workspace_key(WS)], []))

    def teardown(self) -> None:
        try:
            if self.balance:
                self._use_up()
                self._let_all_end()
        finally:
            self.scene.close()

    def _use_up(self) -> None:
        """Whatever was admitted and not counted shows once somebody asks for all there is."""
        self.scene.replay()
        for worker in self.at:
            worker.paused = False
            worker.hear()
            worker.flow()
        for key in KEYS:
            for _ in range(50):
                self.at[0].ask(key, *SIZES[0])
                self.at[0].flow()
        self.nothing_was_admitted_beyond()

    def _let_all_end(self) -> None:
        for _ in range(3):
            for worker in self.at:
                worker.paused = False
                worker.hear()
                worker.flow()
                self.scene.set_time(self.scene.now_us + 100_000)
                worker.run_timers()
                worker.flow()
        for worker in self.at:
            worker.stop()
        for worker in self.scene.workers:
            worker.wire.arrive(1000)
        self.nothing_was_admitted_beyond()
        charged, books = check(self.scene.history, self.balance)
        assert not any(book.open for book in books.values())
        found = self.store.snapshot(WS)
        assert found.wallet is not None
        assert (found.wallet.held, found.wallet.unused) == (0, 0)
        assert found.wallet.balance == self.balance - charged
        for key, counters in found.counters.items():
            held = counters.open, counters.held_ucr, counters.held_tokens, counters.held_requests
            assert held == (0, 0, 0, 0)
            assert counters.spent_ucr == books[key].spent
        told = [one for worker in self.scene.workers for one in worker.told]
        assert not [one for one in told if isinstance(one, str)], "a settle was refused"


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_no_history_of_workers_passes_a_limit(
    redis_url: str, tmp_path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "SHARDS", 1)
    with Redis.from_url(redis_url) as client:
        store: Any = Store(client, with_clock=True)
        folder = tmp_path / "journals"
        folder.mkdir()
        run_state_machine_as_test(
            lambda: Histories(store, redis_url, folder, loop),
            settings=search(25, stateful_step_count=40),
        )
