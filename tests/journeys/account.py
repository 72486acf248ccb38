"""A workspace made for one test, its keys, its clients, and the proof that its books balance."""

from contextlib import ExitStack, suppress
from decimal import Decimal
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAI

from tests.journeys.running import UCR_PER_CREDIT, Running
from tests.journeys.seen import AsyncTap, Seen, Tap
from tests.waiting import eventually_blocking

CREDITS_PER_USD = 100
_SETTLED_SECONDS = 20
_CLIENT_SECONDS = 30


class Account:
    """`granted_usd` is what was given; `seen` what its clients were told."""

    def __init__(self, running: Running, name: str) -> None:
        self.running = running
        self.seen = Seen()
        self.granted_usd = Decimal(0)
        self._open = ExitStack()
        made = running.operator("POST", "/workspaces", {"name": name})
        self.workspace_id = made["workspace_id"]
        self._path = f"/workspaces/{self.workspace_id}"
        self.key_id, self.key = self.new_key()

    # Money and keys, through the operator API

    def grant(self, amount_usd: str, kind: str = "topup", **more: str) -> dict[str, Any]:
        body = {"kind": kind, "amount_usd": amount_usd, **more}
        given: dict[str, Any] = self.running.operator("POST", f"{self._path}/grants", body)
        self.granted_usd += Decimal(amount_usd)
        return given

    def new_key(self, scopes: list[str] | None = None, **limits: Any) -> tuple[str, str]:
        """(id, secret) of one more key."""
        body = {"name": "journey", "scopes": scopes, "limits": limits}
        made = self.running.operator("POST", f"{self._path}/keys", body)
        return made["key_id"], made["key_secret"]

    def operator(self, verb: str) -> dict[str, Any]:
        """`suspend` or `resume` it."""
        answer: dict[str, Any] = self.running.operator("POST", f"{self._path}/{verb}")
        return answer

    def details(self) -> dict[str, Any]:
        """The workspace with its wallet, as the operator sees it."""
        answer: dict[str, Any] = self.running.operator("GET", self._path)
        return answer

    # Clients, and what they saw

    def openai(self, key: str | None = None, **options: Any) -> OpenAI:
        """The official client with a key of this workspace; closed with the account."""
        wire = httpx2.Client(transport=Tap(self.seen))
        return self._open.enter_context(OpenAI(http_client=wire, **self._options(key, options)))

    def async_openai(self, **options: Any) -> AsyncOpenAI:
        """The same for `async with`, which closes it."""
        wire = httpx2.AsyncClient(transport=AsyncTap(self.seen))
        return AsyncOpenAI(http_client=wire, **self._options(None, options))

    def _options(self, key: str | None, options: dict[str, Any]) -> dict[str, Any]:
        given = {"api_key": key or self.key, "base_url": self.running.base_url}
        return {**given, "timeout": _CLIENT_SECONDS, **options}

    # What is recorded of it

    def records(self, count: int) -> list[dict[str, Any]]:
        """The `count` usage records of this workspace, oldest first, once all are there."""

        def recorded() -> list[dict[str, Any]]:
            rows = self.running.rows(
                "select *, burns::jsonb::text as burned from usage_records"
                " where workspace_id = $1 order by request_id",
                self.workspace_id,
            )
            return rows if len(rows) >= count else []

        found: list[dict[str, Any]] = eventually_blocking(recorded, _SETTLED_SECONDS)
        assert len(found) == count, found
        return found

    def prove(self) -> None:
        """Credits the clients saw = credits charged in the ledger = what the balance fell by.

        An exchange that its client left is charged without the client being told: its record
        says so. Waits until no request is held and all usage has reached the ledger.
        """
        with suppress(AssertionError):  # the comparison below says more
            eventually_blocking(lambda: self._books() == self._expected(), _SETTLED_SECONDS)
        assert self._books() == self._expected()

    def _expected(self) -> dict[str, Decimal]:
        spent = self.seen.credits + self._charged("outcome = 'client_left'")
        left = self.granted_usd - spent / CREDITS_PER_USD
        return {"charged": spent, "balance_usd": left, "held_usd": Decimal(0), "grants": left}

    def _books(self) -> dict[str, Decimal]:
        wallet = self.details()
        grants = self.running.rows(
            "select coalesce(sum(remaining_ucr), 0)::bigint as left from grants"
            " where workspace_id = $1",
            self.workspace_id,
        )
        return {
            "charged": self._charged("true"),
            "balance_usd": Decimal(wallet["balance_usd"]),
            "held_usd": Decimal(wallet["held_usd"]),
            "grants": Decimal(grants[0]["left"]) / UCR_PER_CREDIT / CREDITS_PER_USD,
        }

    def _charged(self, condition: str) -> Decimal:
        rows = self.running.rows(
            "select coalesce(sum(charge_ucr), 0)::bigint as ucr from usage_records"
            f" where workspace_id = $1 and {condition}",
            self.workspace_id,
        )
        return Decimal(rows[0]["ucr"]) / UCR_PER_CREDIT

    def close(self) -> None:
        self._open.close()
