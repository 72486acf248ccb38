"""Workspaces and keys of a chaos run, and what operators do to them meanwhile.

Owns who may ask and what was promised to whom: an operator's call is repeated under its
idempotency key until it is acknowledged, and what was acknowledged is noted here, to be looked
for in the ledger. Whose key was valid when is known here, too.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import httptools
from msgspec import Struct

from accounting.contract.money import UCR_PER_USD, format_usd
from tests.chaos.site import TOKEN, Site
from tests.chaos.wire import Answer, ask, request

CALL_SECONDS = 5.0
AGAIN_SECONDS = 0.09
PATIENCE_SECONDS = 90.0  # a claim whose process died is taken over after a minute


class Kind(NamedTuple):
    """A workspace to be made: what it gets, what its key is limited to, how often it asks."""

    name: str
    given_ucr: int
    limits: dict[str, object]
    weight: int


TINY_UCR = 300_000  # some dozens of requests
KINDS = [
    Kind("rich", 50 * UCR_PER_USD, {}, 6),
    Kind("second", 50 * UCR_PER_USD, {}, 3),
    Kind("tiny", TINY_UCR, {}, 3),
    Kind("smaller", TINY_UCR // 3, {}, 3),
    Kind("expiring", TINY_UCR, {}, 2),
    Kind("capped", UCR_PER_USD, {"cost_cap_usd": format_usd(2_000_000)}, 2),
    Kind("seldom", UCR_PER_USD, {"rpm": 240}, 2),
    Kind("brief", UCR_PER_USD, {"tpm": 20_000, "daily_tokens": 400_000}, 2),
    Kind("narrow", UCR_PER_USD, {"concurrency": 3}, 2),
    Kind("moody", UCR_PER_USD, {}, 2),
    Kind("turnover", UCR_PER_USD, {}, 1),
    Kind("all", TINY_UCR, {"rpm": 600, "concurrency": 5, "cost_cap_usd": "0.1"}, 2),
]
POOR = ("tiny", "smaller", "expiring", "all")


class Person(Struct, eq=False):
    """One key. Instants are of the monotonic clock."""

    kind: str
    workspace_id: str
    key_id: str
    secret: str
    weight: int
    cap_ucr: int | None = None
    revoking_at: float = float("inf")
    revoked_at: float = float("inf")
    suspensions: list[tuple[float, float]] = []  # from acknowledged until resuming began

    def may_be_unknown(self, ended_at: float) -> bool:
        return ended_at >= self.revoking_at

    def must_be_refused(self, sent_at: float, ended_at: float) -> bool:
        suspended = any(since <= sent_at and ended_at <= until for since, until in self.suspensions)
        return sent_at >= self.revoked_at or suspended


class CallError(Exception):
    """An operator's call was refused, or not acknowledged in time."""


class Unacknowledged(CallError):
    """The run was over before a call was acknowledged: it may have been carried out."""


class People:
    """See the module."""

    def __init__(self, site: Site, seed: int) -> None:
        self.living: list[Person] = []
        self.known: list[Person] = []
        self.granted: dict[str, tuple[str, int]] = {}  # by grant: workspace, µcr
        self.uncertain: list[tuple[str, int]] = []  # grants that were never acknowledged
        self.done: Counter[str] = Counter()
        self._site = site
        self._dice = random.Random(f"{seed} people")
        self._calls = 0
        self._seed = seed
        self._suspended_at: float | None = None
        self._over = asyncio.Event()

    def one(self, dice: random.Random) -> Person:
        return dice.choices(self.living, [one.weight for one in self.living])[0]

    def named(self, kind: str) -> Person:
        return next(one for one in self.known if one.kind == kind)

    async def settle_in(self) -> None:
        for kind in KINDS:
            made = await self.operator("POST", "/workspaces", {"name": kind.name})
            workspace_id = made["workspace_id"]
            await self.grant(workspace_id, kind.given_ucr)
            await self._make_key(kind.name, workspace_id, kind.limits, kind.weight)

    async def _make_key(
        self, kind: str, workspace_id: str, limits: dict[str, Any], weight: int
    ) -> None:
        body = {"name": kind, "limits": limits}
        made = await self.operator("POST", f"/workspaces/{workspace_id}/keys", body)
        cap = limits.get("cost_cap_usd")
        person = Person(kind, workspace_id, made["key_id"], made["key_secret"], weight)
        person.cap_ucr = None if cap is None else round(float(cap) * UCR_PER_USD)
        self.living.append(person)
        self.known.append(person)

    async def grant(self, workspace_id: str, amount_ucr: int, expires_at: str | None = None) -> str:
        kind = self._dice.choice(["trial", "promo", "plan", "rollover", "topup"])
        body = {"kind": kind, "amount_usd": format_usd(amount_ucr), "expires_at": expires_at}
        try:
            made = await self.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        except Unacknowledged:
            self.uncertain.append((workspace_id, amount_ucr))
            raise
        self.granted[made["grant_id"]] = (workspace_id, amount_ucr)
        return str(made["grant_id"])

    async def operator(self, method: str, path: str, body: object = None) -> Any:
        """Until it is acknowledged. Raises CallError."""
        answer = await self._acknowledged(
            self._site.admin_port, method, f"/v1/admin{path}", TOKEN, body
        )
        if answer.status not in (200, 201):
            raise CallError(f"{method} {path}: {answer.status} {bytes(answer.body)!r}")
        return answer.json()

    async def _acknowledged(
        self, port: int, method: str, path: str, token: str, body: object
    ) -> Answer:
        """An answer that is not an outage's."""
        self._calls += 1
        more = {"idempotency-key": f"chaos-{self._seed}-{self._calls}"}
        data = request(method, path, token, body, more)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                answer = await ask(port, data, CALL_SECONDS)
                if answer.status < 500 and answer.status not in (409, 429):
                    return answer
                last = f"{answer.status} {bytes(answer.body)[:200]!r}"
            except (OSError, httptools.HttpParserError) as error:
                last = repr(error)
            if time.monotonic() > deadline:
                raise CallError(f"{method} {path} is not acknowledged: {last}")
            if self._over.is_set():
                raise Unacknowledged(f"{method} {path}: {last}")
            await asyncio.sleep(AGAIN_SECONDS)

    # Meanwhile

    async def meddle(self, stopping: asyncio.Event) -> None:
        """Do things to workspaces until stopped. Raises CallError."""
        self._over = stopping
        async with asyncio.TaskGroup() as group:  # one that waits does not hold up the others
            for deeds in (
                [self._give, self._give, self._lend, self._take_back],
                [self._suspend],
                [self._mint, self._revoke],
            ):
                group.create_task(self._do(deeds, stopping))

    async def _do(self, deeds: list[Callable[[], Awaitable[None]]], over: asyncio.Event) -> None:
        while not over.is_set():
            deed = self._dice.choice(deeds)
            try:
                await deed()
            except Unacknowledged:
                self.done["never acknowledged"] += 1
                return
            self.done[getattr(deed, "__name__", "").strip("_")] += 1
            await asyncio.sleep(self._dice.uniform(0.2, 0.9))

    def _poor(self) -> Person:
        return self.named(self._dice.choice(POOR))

    async def _give(self) -> None:
        await self.grant(self._poor().workspace_id, self._dice.randrange(1000, TINY_UCR))

    async def _lend(self) -> None:
        """Credits that expire soon."""
        expires = time.gmtime(time.time() + self._dice.randrange(3, 9))
        text = time.strftime("%Y-%m-%dT%H:%M:%SZ", expires)
        workspace_id = self.named("expiring").workspace_id
        try:
            await self.grant(workspace_id, self._dice.randrange(1000, TINY_UCR), text)
        except CallError as error:  # not acknowledged before it would have expired
            if "expires_at" not in str(error):
                raise

    async def _take_back(self) -> None:
        poor = {self.named(kind).workspace_id for kind in POOR}
        grants = [one for one, (whose, _) in self.granted.items() if whose in poor]
        body = {"amount_usd": format_usd(self._dice.randrange(1, 50_000)), "reason": "chaos"}
        await self.operator("POST", f"/grants/{self._dice.choice(grants)}/claw-back", body)

    async def _suspend(self) -> None:
        """Or resume, by turns."""
        person = self.named("moody")
        now = time.monotonic()
        if self._suspended_at is None:
            await self.operator("POST", f"/workspaces/{person.workspace_id}/suspend")
            self._suspended_at = time.monotonic()
            person.suspensions = [*person.suspensions, (self._suspended_at, float("inf"))]
        else:
            person.suspensions[-1] = (self._suspended_at, now)
            await self.operator("POST", f"/workspaces/{person.workspace_id}/resume")
            self._suspended_at = None

    async def _mint(self) -> None:
        await self._make_key("turned", self.named("turnover").workspace_id, {}, 1)

    async def _revoke(self) -> None:
        """By its holder, at the public door."""
        found = [one for one in self.living if one.kind == "turned"]
        if not found:
            return
        one, holder = self._dice.choice(found), self.named("turnover")
        one.revoking_at = time.monotonic()
        answer = await self._acknowledged(
            self._site.port,
            "DELETE",
            f"/v1/account/keys/revoke/{one.key_id}",
            holder.secret,
            None,
        )
        if answer.status != 200:
            raise CallError(f"revoke: {answer.status} {bytes(answer.body)!r}")
        one.revoked_at = time.monotonic()
        if len(found) > 3:  # a few go on asking in vain
            self.living.remove(one)
