"""Every failure the product can answer: envelope, status, code, headers, precedence."""

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from accounting.contract import errors
from accounting.contract.errors import Failure

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Failure) and kind is not Failure
]
SPECIAL: dict[type[Failure], Callable[[], Failure]] = {
    errors.ProviderRefused: lambda: errors.ProviderRefused(400, "bad temperature", None, None),
}


def make(kind: type[Failure]) -> Failure:
    return SPECIAL.get(kind, kind)()


def envelope(failure: Failure, request_id: str | None = None) -> dict[str, Any]:
    found = json.loads(failure.body(request_id))
    assert set(found) == {"error"}
    error: dict[str, Any] = found["error"]
    return error


def test_the_product_has_failures() -> None:
    assert len(CLASSES) > 30


@pytest.mark.parametrize("kind", CLASSES)
def test_every_failure_has_status_type_code_and_text(kind: type[Failure]) -> None:
    failure = make(kind)
    assert 400 <= failure.status < 600
    assert failure.type and failure.type.islower()
    assert failure.code
    assert failure.text
    assert failure.text[0].isupper() or kind in SPECIAL


@pytest.mark.parametrize("kind", CLASSES)
def test_the_envelope_has_the_four_fields_of_openai(kind: type[Failure]) -> None:
    error = envelope(make(kind))
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not errors.ProviderRefused])
def test_a_text_of_its_own_replaces_the_usual_one(kind: type[Failure]) -> None:
    failure = kind("You asked for 3.")
    assert envelope(failure)["message"] == failure.text == str(failure) == "You asked for 3."


@pytest.mark.parametrize(
    ("kind", "status", "type", "code"),
    [
        (errors.InvalidRequest, 400, "invalid_request_error", "invalid_request"),
        (errors.InvalidJson, 400, "invalid_request_error", "invalid_json"),
        (errors.UnboundedCost, 400, "invalid_request_error", "unbounded_cost"),
        (errors.InvalidKey, 401, "invalid_request_error", "invalid_api_key"),
        (errors.InsufficientCredit, 402, "insufficient_quota", "INSUFFICIENT_CREDIT"),
        (errors.AccountSuspended, 403, "permission_error", "account_suspended"),
        (errors.ModelNotAllowed, 403, "permission_error", "model_not_allowed"),
        (errors.PlanLimitExceeded, 403, "permission_error", "plan_limit_exceeded"),
        (errors.ModelNotFound, 404, "invalid_request_error", "model_not_found"),
        (errors.NotFound, 404, "invalid_request_error", "not_found"),
        (errors.MethodNotAllowed, 405, "invalid_request_error", "method_not_allowed"),
        (errors.RequestTimeout, 408, "invalid_request_error", "request_timeout"),
        (errors.IdempotencyInProgress, 409, "invalid_request_error", "idempotency_in_progress"),
        (errors.BodyTooLarge, 413, "invalid_request_error", "request_too_large"),
        (errors.IdempotencyMismatch, 422, "invalid_request_error", "idempotency_mismatch"),
        (errors.RateLimited, 429, "requests", "rate_limit_exceeded"),
        (errors.TokensLimited, 429, "tokens", "rate_limit_exceeded"),
        (errors.DailyTokensLimited, 429, "tokens", "rate_limit_exceeded"),
        (errors.ConcurrencyLimited, 429, "concurrency", "rate_limit_exceeded"),
        (errors.HeadTooLarge, 431, "invalid_request_error", "request_head_too_large"),
        (errors.ProviderFailed, 502, "api_error", "provider_error"),
        (errors.Unavailable, 503, "api_error", "service_unavailable"),
        (errors.ProviderTimeout, 504, "api_error", "provider_timeout"),
    ],
)
def test_statuses_and_codes_clients_rely_on(
    kind: type[Failure], status: int, type: str, code: str
) -> None:
    failure = kind()
    assert (failure.status, failure.type, failure.code) == (status, type, code)


def test_optional_parts_of_the_envelope() -> None:
    failure = errors.InsufficientCredit(
        "Too little.", param="max_tokens", metadata={"required_usd": 1, "held_usd": 2}
    )
    assert envelope(failure, "req_1") == {
        "message": "Too little.",
        "type": "insufficient_quota",
        "param": "max_tokens",
        "code": "INSUFFICIENT_CREDIT",
        "request_id": "req_1",
        "metadata": {"required_usd": 1, "held_usd": 2},
    }


def test_text_is_escaped_into_the_envelope() -> None:
    nasty = 'quote " backslash \\ newline \n nul \x00 umlaut ä'
    assert envelope(errors.InvalidRequest(nasty))["message"] == nasty


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    for seconds, text in ((0, "1"), (1, "1"), (75, "75"), (86_400, "86400")):
        headers = dict(errors.RateLimited(retry_after_seconds=seconds).headers())
        assert headers["retry-after"] == text


def test_no_retry_after_where_waiting_is_not_said_to_help() -> None:
    assert errors.RateLimited().headers() == []
    assert "retry-after" not in dict(errors.InsufficientCredit().headers())


@pytest.mark.parametrize(
    "kind",
    [
        errors.InsufficientCredit,
        errors.RequestAboveTokenLimit,
        errors.IdempotencyMismatch,
        errors.Conflict,
    ],
)
def test_clients_are_told_not_to_repeat_what_cannot_pass(kind: type[Failure]) -> None:
    assert dict(kind().headers())["x-should-retry"] == "false"


def test_every_failure_official_clients_would_repeat_in_vain_says_so() -> None:
    """The official clients retry 408, 409, 429 and 5xx: a lasting one of these must forbid it."""
    lasting = {errors.RequestAboveTokenLimit, errors.Conflict}
    for kind in lasting:
        assert kind.status in (408, 409, 429) and kind.retryable is False


def test_our_own_trouble_is_a_503_with_retry_after() -> None:
    failure = errors.Unavailable()
    assert failure.status == 503
    assert dict(failure.headers())["retry-after"] == "1"
    assert dict(errors.Unavailable("Redis is away.", 5).headers())["retry-after"] == "5"


def test_a_provider_refusal_keeps_status_text_code_and_parameter() -> None:
    failure = errors.ProviderRefused(422, "temperature: too hot", "bad_value", "temperature")
    assert failure.status == 422
    error = envelope(failure)
    assert (error["code"], error["param"]) == ("bad_value", "temperature")
    assert make(errors.ProviderRefused).code == "provider_refused"


def test_headers_are_lower_case_text() -> None:
    for kind in CLASSES:
        for name, value in make(kind).headers():
            assert name == name.lower() and value.isascii() and value.isprintable()


def test_no_failure_shares_its_extras_with_the_next() -> None:
    errors.RateLimited("Once.", param="x", retry_after_seconds=9, metadata={"a": 1})
    failure = errors.RateLimited()
    assert (failure.param, failure.retry_after_seconds, failure.metadata) == (None, None, None)
    assert failure.text != "Once."
