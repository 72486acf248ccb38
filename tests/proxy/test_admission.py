"""Verdicts into answers, and rate headers that tell what the script would admit."""

import json
from typing import Any

import pytest

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
from proxy.admission import MINUTE_US, duration, rate_headers, refusal

CREDIT = 1_000_000
NOW = 1_700_000_000_000_000


def headers(failure: Failure) -> dict[str, str]:
    return dict(failure.headers())


def error(failure: Failure) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(failure.body())["error"]
    return found


@pytest.mark.parametrize(
    ("verdict", "kind", "status", "code"),
    [
        (1, InvalidKey, 401, "invalid_api_key"),
        (2, AccountSuspended, 403, "account_suspended"),
        (3, ModelNotAllowed, 403, "model_not_allowed"),
        (4, RateLimited, 429, "rate_limit_exceeded"),
        (5, TokensLimited, 429, "rate_limit_exceeded"),
        (6, DailyTokensLimited, 429, "rate_limit_exceeded"),
        (7, ConcurrencyLimited, 429, "rate_limit_exceeded"),
        (8, RequestAboveTokenLimit, 429, "rate_limit_exceeded"),
        (9, PlanLimitExceeded, 403, "plan_limit_exceeded"),
        (10, InsufficientCredit, 402, "INSUFFICIENT_CREDIT"),
    ],
)
def test_each_verdict_is_its_failure(
    verdict: int, kind: type[Failure], status: int, code: str
) -> None:
    failure = refusal(verdict, 10, 20, 30)
    assert type(failure) is kind
    assert (failure.status, failure.code) == (status, code)


@pytest.mark.parametrize(
    ("wait_us", "seconds"),
    [
        (0, "1"),
        (1, "1"),
        (1_000_000, "1"),
        (1_000_001, "2"),
        (60_000_000, "60"),
        (86_400_000_000, "86400"),
    ],
)
def test_a_wait_is_told_in_whole_seconds(wait_us: int, seconds: str) -> None:
    for verdict in (4, 5, 6):
        assert headers(refusal(verdict, wait_us, 0, 1))["retry-after"] == seconds
    assert headers(refusal(7, 0, 0, 1))["retry-after"] == "1"


def test_what_never_passes_by_waiting_says_so() -> None:
    failure = refusal(8, 1000, 5000, 1)
    assert headers(failure) == {"x-should-retry": "false"}
    assert error(failure)["metadata"] == {"limit_tokens": 1000, "required_tokens": 5000}
    assert "5000" in failure.text and "1000" in failure.text
    assert "retry-after" not in headers(refusal(9, 1, 1, 1))


def test_a_cost_cap_tells_its_figures() -> None:
    failure = refusal(9, 5 * CREDIT, 4_500_000, 600_000)
    assert error(failure)["metadata"] == {
        "limit_source": "key_cost_cap",
        "limit_credits": "5",
        "used_credits": "4.5",
        "required_credits": "0.6",
    }


@pytest.mark.parametrize(
    ("balance", "held", "required", "kind", "affordable"),
    [
        (0, 0, 1, InsufficientCredit, "0"),
        (100, 0, 101, InsufficientCredit, "0.0001"),
        (100, 50, 101, InsufficientCredit, "0.00005"),  # not even when all is settled
        (100, 50, 100, CreditInFlight, "0.00005"),
        (100, 100, 1, CreditInFlight, "0"),
        (-10, 0, 1, InsufficientCredit, "0"),
    ],
)
def test_short_of_credit(
    balance: int, held: int, required: int, kind: type[Failure], affordable: str
) -> None:
    """Only what holds in flight could still free is worth waiting for."""
    failure = refusal(10, balance, held, required)
    assert type(failure) is kind
    metadata = error(failure)["metadata"]
    assert metadata["affordable_credits"] == affordable
    assert set(metadata) == {
        "limit_source", "balance_credits", "held_credits", "required_credits", "affordable_credits",
    }  # fmt: skip
    if kind is CreditInFlight:
        assert headers(failure) == {"retry-after": "1"}
        assert metadata["limit_source"] == "in_flight_holds"
    else:
        assert headers(failure) == {"x-should-retry": "false"}
        assert metadata["limit_source"] == "balance"


# Rate headers


def read(lines: bytes) -> dict[str, str]:
    found = dict(line.split(": ") for line in lines.decode().split("\r\n")[:-1])
    assert len(found) == lines.count(b"\r\n")
    return {name.removeprefix("x-ratelimit-"): value for name, value in found.items()}


def test_no_limit_no_headers() -> None:
    assert rate_headers(NOW, 0, 0, 0, 0) == b""


def test_headers_of_each_limit_alone() -> None:
    assert read(rate_headers(NOW, 60, 0, NOW + 1_000_000, 0)) == {
        "limit-requests": "60", "remaining-requests": "59", "reset-requests": "1s",
    }  # fmt: skip
    assert read(rate_headers(NOW, 0, 600, 0, NOW + 30_000_000)) == {
        "limit-tokens": "600", "remaining-tokens": "300", "reset-tokens": "30s",
    }  # fmt: skip


@pytest.mark.parametrize("rpm", [1, 2, 3, 7, 60, 61, 999, 100_000, 7_000_000, 100_000_000])
def test_remaining_requests_are_those_that_would_be_admitted(rpm: int) -> None:
    """The script's own arithmetic: a gap per request, a bucket of rpm gaps."""
    gap = -(-MINUTE_US // rpm)
    for taken in {0, 1, rpm // 2, rpm - 1, rpm}:
        found = read(rate_headers(NOW, rpm, 0, NOW + taken * gap, 0))
        assert found["remaining-requests"] == str(rpm - taken)


@pytest.mark.parametrize("tpm", [1, 7, 600, 90_001, 2_000_000, 59_999_999, 150_000_000])
def test_remaining_tokens_are_those_that_would_be_admitted(tpm: int) -> None:
    for held in {0, 1, tpm // 3, tpm - 1, tpm}:
        tat = NOW + -(-held * MINUTE_US // tpm)
        found = int(read(rate_headers(NOW, 0, tpm, 0, tat))["remaining-tokens"])
        in_a_microsecond = -(-tpm // MINUTE_US)
        assert abs(found - (tpm - held)) < in_a_microsecond


def test_beyond_full_nothing_remains() -> None:
    found = read(rate_headers(NOW, 10, 10, NOW + 2 * MINUTE_US, NOW + 2 * MINUTE_US))
    assert (found["remaining-requests"], found["remaining-tokens"]) == ("0", "0")
    assert found["reset-requests"] == "2m0s"


@pytest.mark.parametrize(
    ("length_us", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (1, "1ms"),
        (1_000, "1ms"),
        (120_000, "120ms"),
        (999_000, "999ms"),
        (999_001, "1s"),
        (1_000_000, "1s"),
        (1_000_001, "2s"),
        (59_000_000, "59s"),
        (59_999_999, "1m0s"),
        (360_000_000, "6m0s"),
        (3_661_000_000, "61m1s"),
    ],
)
def test_durations(length_us: int, text: str) -> None:
    assert duration(length_us) == text.encode()
