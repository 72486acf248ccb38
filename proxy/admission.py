"""[5] The decision to serve: what a request asks for, what it was granted, why it was not.

Pure: translates between asks, the figures of `lease.lua` and the answers clients see.
"""

from functools import lru_cache

from accounting.contract.errors import (
    AccountSuspended,
    ConcurrencyLimited,
    CreditInFlight,
    DailyTokensLimited,
    Failure,
    InsufficientCredit,
    InvalidKey,
    ModelNotAllowed,
    PlanLimitExceeded,
    RateLimited,
    RequestAboveTokenLimit,
    TokensLimited,
)
from accounting.contract.money import format_credits

MINUTE_US = 60_000_000
_MILLISECONDS = [b"%dms" % count for count in range(1000)]


class Hold:
    """A lease of one: what is reserved for one request until it is settled."""

    __slots__ = ("admitted_at_us", "credits_ucr", "rate_headers", "tokens")

    def __init__(
        self, credits_ucr: int, tokens: int, admitted_at_us: int, rate_headers: bytes
    ) -> None:
        self.credits_ucr = credits_ucr
        self.tokens = tokens
        self.admitted_at_us = admitted_at_us
        self.rate_headers = rate_headers

    def __repr__(self) -> str:
        return f"Hold({self.credits_ucr} µcr, {self.tokens} tokens)"


def refusal(verdict: int, detail_1: int, detail_2: int, credits_ucr: int) -> Failure:
    """The Failure for a verdict of `lease.lua` (its header lists them)."""
    if verdict == 1:
        return InvalidKey("This API key is revoked or expired.")
    if verdict == 2:
        return AccountSuspended()
    if verdict == 3:
        return ModelNotAllowed(param="model")
    if verdict in _RATE:
        return _RATE[verdict](retry_after_seconds=-(-detail_1 // 1_000_000))
    if verdict == 8:
        return RequestAboveTokenLimit(
            f"This request could use {detail_2} tokens, the key's limit is {detail_1}. "
            "Lower max_tokens or send less.",
            metadata={"limit_tokens": detail_1, "required_tokens": detail_2},
        )
    if verdict == 9:
        return _capped(detail_1, detail_2, credits_ucr)
    return _short(detail_1, detail_2, credits_ucr)


_RATE = {4: RateLimited, 5: TokensLimited, 6: DailyTokensLimited, 7: ConcurrencyLimited}


def _capped(cap: int, used: int, required: int) -> Failure:
    return PlanLimitExceeded(
        f"The key's cost cap is {format_credits(cap)} credits, {format_credits(used)} are spent "
        f"or held, and this request may need {format_credits(required)}.",
        metadata={
            "limit_source": "key_cost_cap",
            "limit_credits": format_credits(cap),
            "used_credits": format_credits(used),
            "required_credits": format_credits(required),
        },
    )


def _short(balance: int, held: int, required: int) -> Failure:
    """402. Retry-After only where holds in flight, once settled, could make it affordable."""
    transient = held > 0 and balance >= required
    affordable = max(0, balance - held)
    kind = CreditInFlight if transient else InsufficientCredit
    return kind(
        f"This request may need {format_credits(required)} credits; {format_credits(affordable)} "
        f"are affordable now ({format_credits(held)} of {format_credits(balance)} are held by "
        "requests in flight). Lower max_tokens, send less, or top up.",
        retry_after_seconds=1 if transient else None,
        metadata={
            "limit_source": "in_flight_holds" if transient else "balance",
            "balance_credits": format_credits(balance),
            "held_credits": format_credits(held),
            "required_credits": format_credits(required),
            "affordable_credits": format_credits(affordable),
        },
    )


def rate_headers(now: int, rpm: int, tpm: int, requests_tat: int, tokens_tat: int) -> bytes:
    """`x-ratelimit-*` header lines; nothing for what is unlimited. Times in µs."""
    figures: tuple[object, ...] = ()
    if rpm:
        gap = -(-MINUTE_US // rpm)
        level = requests_tat - now
        left = max(0, rpm - -(-level // gap))
        figures = (left, duration(level)) if level > 0 else (rpm, b"0s")
    if tpm:
        level = tokens_tat - now  # rounded up to a µs by the script
        room = max(0, MINUTE_US - level + 1)
        figures += (room * tpm // MINUTE_US, duration(level)) if level > 0 else (tpm, b"0s")
    return _rate_lines(rpm, tpm) % figures


@lru_cache(maxsize=1024)
def _rate_lines(rpm: int, tpm: int) -> bytes:
    """Header lines that lack what is left, and for how long: few limits serve many keys."""
    return b"".join(
        b"x-ratelimit-limit-%b: %d\r\n" % (what, limit)
        + b"x-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n" % (what, what)
        for what, limit in ((b"requests", rpm), (b"tokens", tpm))
        if limit
    )


def duration(length_us: int) -> bytes:
    """A length of time as rate headers write it: `0s`, `120ms`, `1s`, `6m0s`."""
    if length_us <= 0:
        return b"0s"
    if length_us <= 999_000:
        return _MILLISECONDS[-(-length_us // 1000)]
    minutes, seconds = divmod(-(-length_us // 1_000_000), 60)
    return b"%dm%ds" % (minutes, seconds) if minutes else b"%ds" % seconds
