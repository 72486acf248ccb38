"""What one worker holds under one key, and how it admits from that; figures, no I/O.

Owns the arithmetic of a lease: all that is held, the part of it that is unused, the right to
admit from it, and the arrival times its rate headers are made of.
"""

from collections.abc import Callable

from accounting.contract import keyspace
from accounting.contract.errors import Failure
from accounting.contract.keyspace import KeyRecord
from proxy.admission import MINUTE_US, Hold, rate_headers


class Stale(Exception):
    """The key record used is no longer current: read it again and ask again."""


OnAdmission = Callable[[Hold | Failure | Stale], None]


class Ask:
    """One request's wish: the most it can cost and use, and whom to tell."""

    __slots__ = ("credits_ucr", "model_allowed", "on_admission", "tokens", "tries", "version")

    def __init__(
        self,
        credits_ucr: int,
        tokens: int,
        model_allowed: int,
        version: int,
        on_admission: OnAdmission,
    ) -> None:
        self.credits_ucr = credits_ucr
        self.tokens = tokens
        self.model_allowed = model_allowed
        self.version = version
        self.on_admission = on_admission
        self.tries = 0


class KeyLease:
    """What this worker holds under one key (µcr, tokens, requests) and who waits for more.

    `credits`, `tokens`, `slots` are all it holds; `free_…` is the part leased ahead and unused.
    """

    __slots__ = (
        "admitted", "calling", "clock_offset_us", "credits", "each", "field_words",
        "free_credits", "free_requests", "free_tokens", "key_id", "last_used", "low_water",
        "owes", "quiet", "recalled_until", "requests_per_minute", "requests_tat",
        "right_until", "shard", "slots", "tokens", "tokens_per_minute", "tokens_tat", "used",
        "version", "waiting", "workspace_id",
    )  # fmt: skip

    def __init__(self, record: KeyRecord, boot: str) -> None:
        self.key_id = record.key_id
        self.workspace_id = record.workspace_id
        self.shard = keyspace.shard_of(record.workspace_id)
        self.field_words = (
            keyspace.workspace_key(record.workspace_id),
            keyspace.leases_key(self.shard, boot),
            boot,
            record.key_id,
            record.workspace_id,
        )
        self.credits = self.tokens = self.slots = 0
        self.free_requests = self.free_credits = self.free_tokens = 0
        self.low_water = 0
        self.used = 0  # admitted here since the last call, for Redis to count
        self.admitted = 0  # in all, since the last call: the recent rate
        self.each = (0, 0)
        self.version = 0
        self.right_until = 0.0
        self.recalled_until = 0.0
        self.clock_offset_us = 0
        self.requests_per_minute = self.tokens_per_minute = 0
        self.requests_tat = self.tokens_tat = 0
        self.waiting: list[Ask] = []
        self.calling = False
        self.owes = False  # gave up something while a call was under way: tell Redis next
        self.quiet = False
        self.last_used = 0.0

    def __repr__(self) -> str:
        return f"KeyLease({self.key_id}, {self.credits} µcr, {self.slots} slots)"

    def take(self, credits_ucr: int, tokens: int) -> None:
        """A hold was granted; or its settle was sent, and no one knows whether it arrived."""
        self.credits += credits_ucr
        self.tokens += tokens
        self.slots += 1

    def drop(self, credits_ucr: int, tokens: int) -> None:
        """A hold's settle was written to Redis's connection, ahead of any later lease call.

        Not before: the next call would correct Redis to what this lease says, giving the
        hold back while its charge is still to come.
        """
        self.credits -= credits_ucr
        self.tokens -= tokens
        self.slots -= 1

    def give_up_unused(self) -> bool:
        """Let go of what was leased ahead; the next call tells Redis. True if there was any."""
        if not (self.free_requests or self.free_credits or self.free_tokens):
            return False  # smaller requests than expected leave credits when none is left
        self.credits -= self.free_credits
        self.tokens -= self.free_tokens
        self.slots -= self.free_requests
        self.free_requests = self.free_credits = self.free_tokens = 0
        return True

    def take_unused(self, ask: Ask, now: float) -> Hold | None:
        """Admit from what was leased ahead, if it does and the right to it still stands."""
        if (
            ask.credits_ucr > self.free_credits
            or ask.tokens > self.free_tokens
            or ask.version != self.version
            or not ask.model_allowed
            or now >= self.right_until
        ):
            return None
        self.free_requests -= 1
        self.free_credits -= ask.credits_ucr
        self.free_tokens -= ask.tokens
        self.used += 1
        at_us = self.clock_offset_us + int(now * 1e6)
        return Hold(ask.credits_ucr, ask.tokens, at_us, self._rate_lines(at_us, ask.tokens))

    def _rate_lines(self, at_us: int, tokens: int) -> bytes:
        rpm, tpm = self.requests_per_minute, self.tokens_per_minute
        if not rpm and not tpm:
            return b""
        if rpm:
            self.requests_tat = max(self.requests_tat, at_us) - (-MINUTE_US // rpm)
        if tpm:
            self.tokens_tat = max(self.tokens_tat, at_us) - (-MINUTE_US * tokens // tpm)
        return rate_headers(at_us, rpm, tpm, self.requests_tat, self.tokens_tat)
