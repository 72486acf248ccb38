"""The simplest model of what the Lua scripts promise, written without looking at how.

Nothing here is kept twice: what is held or open is the sum of the leases. The one thing taken
over from the scripts is when a figure is written, since every stored field is compared.
"""

from dataclasses import dataclass, field

from accounting.contract.keyspace import (
    ACTIVE,
    LIVE,
    KeyCounters,
    KeyRules,
    LeaseRecord,
    Wallet,
)
from tests.contract import store as lua
from tests.contract.store import DAY, MINUTE, Ask, Row


@dataclass
class Key:
    rules: KeyRules
    known: bool = False  # has counters of its own
    requests_full_at: int = 0
    busy_since: int = 0
    tokens_full_at: int = 0
    day: int = 0
    day_tokens: int = 0
    spent: int = 0

    def turn_day(self, now: int) -> None:
        self.known = True
        if self.day != now // DAY:
            self.day, self.day_tokens = now // DAY, 0


@dataclass
class Lease:
    credits: int = 0
    tokens: int = 0
    slots: int = 0

    def figures(self) -> tuple[int, int, int]:
        return self.credits, self.tokens, self.slots


@dataclass
class Workspace:
    state: int
    balance: int = 0
    last_delta: int = 0
    keys: dict[str, Key] = field(default_factory=dict)
    leases: dict[tuple[str, str], Lease] = field(default_factory=dict)  # (boot, key)

    @property
    def held(self) -> int:
        return sum(lease.credits for lease in self.leases.values())

    def under(self, key: str) -> Lease:
        """All leases of a key, as one."""
        ours = [lease for (_, of), lease in self.leases.items() if of == key]
        return Lease(
            sum(lease.credits for lease in ours),
            sum(lease.tokens for lease in ours),
            sum(lease.slots for lease in ours),
        )


def round_up(amount: int, divisor: int) -> int:
    return (amount + divisor - 1) // divisor


def gap_of(rules: KeyRules) -> int:
    return round_up(MINUTE, rules.requests_per_minute)


class Model:
    """Workspaces known to Redis, batches settled, and the time."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.workspaces: dict[str, Workspace] = {}
        self.settled: dict[str, int] = {}
        self.batches = 0

    # Set-up

    def put_workspace(self, name: str, state: int) -> int:
        if name in self.workspaces:
            self.workspaces[name].state = state
            return 0
        self.workspaces[name] = Workspace(state)
        return 1

    def put_key(self, name: str, key: str, rules: KeyRules) -> int:
        keys = self.workspaces[name].keys
        if key not in keys:
            keys[key] = Key(rules)
        elif keys[key].rules.version > rules.version:
            return 0
        keys[key].rules = rules
        return 1

    def credit(self, name: str, delta: int, amount: int) -> list[int]:
        if name not in self.workspaces:
            return [-2, 0]
        workspace = self.workspaces[name]
        if delta <= workspace.last_delta:
            return [0, workspace.balance]
        if delta > workspace.last_delta + 1:
            return [-1, workspace.last_delta]
        workspace.balance += amount
        workspace.last_delta = delta
        return [1, workspace.balance]

    # Leases

    def lease(
        self,
        name: str,
        asks: list[Ask],
        key: str,
        boot: str,
        mine: tuple[int, int, int],
        version: int,
    ) -> tuple[int, list[int]]:
        """(0, a verdict for each ask), (1, []) unknown, (2, []) stale: only corrected."""
        workspace = self.workspaces.get(name)
        if workspace is None or key not in workspace.keys:
            return 1, []
        of = workspace.keys[key]
        stale = of.rules.version != version
        before = workspace.leases.get((boot, key))
        lease = Lease(*mine)
        workspace.leases[boot, key] = lease
        verdicts = [self._judge(workspace, key, lease, ask) for ask in asks if not stale]
        if lua.ADMITTED in verdicts or (before or Lease()).figures() != mine:
            of.turn_day(self.now)
        elif before is None:
            del workspace.leases[boot, key]
        return (2 if stale else 0), verdicts

    def _judge(self, workspace: Workspace, key: str, lease: Lease, ask: Ask) -> int:
        verdict = self._refusal(workspace, workspace.keys[key], workspace.under(key), ask)
        if verdict == lua.ADMITTED:
            self._take_request(workspace.keys[key])
            lease.credits += ask.credits
            lease.tokens += ask.tokens
            lease.slots += 1
        return verdict

    def _refusal(self, workspace: Workspace, key: Key, under: Lease, ask: Ask) -> int:
        """The first reason against it, in order of precedence."""
        rules, now = key.rules, self.now
        ended = rules.state != LIVE or 0 < rules.expires_at_us <= now
        day_tokens = key.day_tokens if key.day == now // DAY else 0
        per_minute, per_day = rules.tokens_per_minute, rules.tokens_per_day
        reasons = [
            (lua.KEY_ENDED, ended),
            (lua.SUSPENDED, workspace.state != ACTIVE),
            (lua.MODEL, not ask.model_allowed),
            (lua.REQUESTS, rules.requests_per_minute > 0 and not self._has_room(key)),
            (lua.TOO_LARGE, 0 < per_minute < ask.tokens),
            (lua.TOKENS, per_minute > 0 and not self._has_tokens(key, under.tokens + ask.tokens)),
            (lua.TOO_LARGE, 0 < per_day < ask.tokens),
            (lua.DAILY, 0 < per_day < day_tokens + under.tokens + ask.tokens),
            (lua.CONCURRENCY, 0 < rules.concurrency < under.slots + 1),
            (lua.CAP, 0 <= rules.cost_cap_ucr < key.spent + under.credits + ask.credits),
            (lua.BALANCE, workspace.balance < workspace.held + ask.credits),
        ]
        return next((reason for reason, applies in reasons if applies), lua.ADMITTED)

    def _has_room(self, key: Key) -> bool:
        gap = gap_of(key.rules)
        full = key.rules.requests_per_minute * gap
        return max(0, key.requests_full_at - self.now) + gap <= full

    def _has_tokens(self, key: Key, tokens: int) -> bool:
        needed = round_up(tokens * MINUTE, key.rules.tokens_per_minute)
        return max(0, key.tokens_full_at - self.now) + needed <= MINUTE

    def _take_request(self, key: Key) -> None:
        if key.rules.requests_per_minute > 0:
            if key.requests_full_at <= self.now:
                key.requests_full_at = key.busy_since = self.now
            key.requests_full_at += gap_of(key.rules)

    def release(self, name: str, key: str, boot: str) -> list[int]:
        workspace = self.workspaces.get(name)
        lease = workspace.leases.pop((boot, key), None) if workspace else None
        return list((lease or Lease()).figures())

    # Settling

    def settle(self, boot: str, number: int, rows: list[Row]) -> bool:
        """False when the batch was settled before."""
        if number <= self.settled.get(boot, 0):
            return False
        self.settled[boot] = number
        self.batches += 1
        for row in rows:
            if row.workspace in self.workspaces:
                self._settle_row(self.workspaces[row.workspace], boot, row)
        return True

    def _settle_row(self, workspace: Workspace, boot: str, row: Row) -> None:
        key = workspace.keys[row.key]
        lease = workspace.leases.get((boot, row.key), Lease())
        lease.credits -= min(row.credits, lease.credits)
        lease.tokens -= min(row.tokens, lease.tokens)
        lease.slots -= min(row.slots, lease.slots)
        workspace.balance -= row.charge
        key.spent += row.charge
        key.turn_day(self.now)
        key.day_tokens += row.used
        if key.rules.tokens_per_minute and row.used:
            takes = round_up(row.used * MINUTE, key.rules.tokens_per_minute)
            full_at = max(key.tokens_full_at, self.now) + takes
            key.tokens_full_at = min(full_at, self.now + MINUTE)
        if key.rules.requests_per_minute and key.requests_full_at > self.now:
            self._give_back(key, row.voids)

    def _give_back(self, key: Key, voids: tuple[int, ...]) -> None:
        gap = gap_of(key.rules)
        drained = self.now - key.rules.requests_per_minute * gap
        fresh = [at for at in voids if at >= key.busy_since and at > drained]
        key.requests_full_at -= gap * len(fresh)

    # What Redis should hold

    def wallet(self, name: str) -> Wallet:
        workspace = self.workspaces[name]
        return Wallet(workspace.balance, workspace.held, workspace.state, workspace.last_delta)

    def counters(self, name: str) -> dict[str, KeyCounters]:
        workspace, found = self.workspaces[name], {}
        for name_of_key, key in workspace.keys.items():
            if key.known:
                under = workspace.under(name_of_key)
                found[name_of_key] = KeyCounters(
                    requests_tat=key.requests_full_at,
                    busy_since=key.busy_since,
                    tokens_tat=key.tokens_full_at,
                    day=key.day,
                    day_tokens=key.day_tokens,
                    open=under.slots,
                    held_ucr=under.credits,
                    held_tokens=under.tokens,
                    spent_ucr=key.spent,
                )
        return found

    def leases(self, name: str) -> dict[str, LeaseRecord]:
        leases = self.workspaces[name].leases.items()
        return {f"{boot}:{key}": LeaseRecord(*lease.figures()) for (boot, key), lease in leases}
