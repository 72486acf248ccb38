"""The official `openai` client for Node against a running stack, as its users write it.

The scripts in `node/` do what a program would do and print what they found; what it cost and
what was recorded is proven here, as for the Python client.
"""

import re
from decimal import Decimal
from typing import Any

import pytest

from tests.journeys import npm
from tests.journeys.account import Account
from tests.journeys.watched_provider import WatchedProvider


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    npm.installed()


def run(account: Account, script: str, **given: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(what the script found, every request it sent); its credits count as seen."""
    env = {"OPENAI_BASE_URL": account.running.base_url, "OPENAI_API_KEY": account.key}
    report = npm.script(script, env, **given)
    account.seen.elsewhere += sum(Decimal(one["credits"]) for one in report["sent"])
    return report["found"], report["sent"]


def test_plain_answers_and_models(funded: Account) -> None:
    _, funded.key = funded.new_key(rpm=1000)
    found, sent = run(funded, "plain.mjs")
    assert found["content"].startswith("Hello from the sandbox provider!")
    assert len(set(found["request_ids"])) == 1
    assert re.fullmatch(r"req_[0-9A-Z]{26}", found["request_ids"][0])
    usage = found["usage"]
    expected = usage["prompt_tokens"] * 15 + usage["completion_tokens"] * 60
    assert Decimal(found["credits"]) == Decimal(expected) / 1_000_000
    assert (found["model"], found["limit"]) == ("sandbox-small", "1000")
    assert found["many"] == [usage["completion_tokens"]] * 10
    assert set(found["models"]) == {"sandbox-small", "watched", "chained"}
    assert [Decimal(one["credits"]) > 0 for one in sent] == [True] * 11 + [False]


def test_streams(funded: Account) -> None:
    found, sent = run(funded, "streamed.mjs")
    assert found["text"].startswith("Hello from the sandbox provider!")
    last = found["last"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert Decimal(str(last["credits_used"])) == Decimal(sent[0]["credits"]) > 0
    assert found["usages"] == [1, 1]
    assert found["nulls"] > 10
    assert "🌍🚀" in found["awkward"]
    assert found["final"]["content"] == found["text"]
    assert found["final"]["finish"] == "stop"
    assert found["total"]["completion_tokens"] == last["usage"]["completion_tokens"]
    assert found["left"] == 4
    *whole, left = funded.records(5)
    assert {row["outcome"] for row in whole} == {"completed"}
    assert (left["outcome"], left["settlement"]) == ("client_left", "estimated")
    assert 0 < left["charge_ucr"] < left["hold_ucr"]


def test_errors_and_what_is_sent_again(funded: Account, account: Account) -> None:
    _, narrow = funded.new_key(allowed_models=["watched"])
    poor = Account(funded.running, "no credits")
    found, sent = run(funded, "errors.mjs", narrow=narrow, poor=poor.key)
    for error in found.values():
        assert re.fullmatch(r"req_[0-9A-Z]{26}", error.pop("requestID"))
    broken = found.pop("broken")
    assert {name: list(error.values())[:3] for name, error in found.items()} == {
        "unknown_key": ["AuthenticationError", 401, "invalid_api_key"],
        "unknown_model": ["NotFoundError", 404, "model_not_found"],
        "malformed": ["BadRequestError", 400, "invalid_request"],
        "model_not_allowed": ["PermissionDeniedError", 403, "model_not_allowed"],
        "empty_wallet": ["APIError", 402, "INSUFFICIENT_CREDIT"],
        "provider_refuses": ["UnprocessableEntityError", 422, "bad_request"],
        "provider_fails": ["InternalServerError", 502, "provider_error"],
    }
    assert found["empty_wallet"]["type"] == "insufficient_quota"
    assert broken["count"] == 11  # the role and ten pieces, then the error
    assert (broken["name"], broken["code"]) == ("APIError", "provider_error")
    assert "status" not in broken
    statuses = [(one["status"], one["retry"]) for one in sent]
    assert statuses == [
        *[(401, 0), (404, 0), (400, 0), (403, 0), (402, 0), (422, 0)],
        *[(502, 0), (502, 1), (502, 2)],
        (200, 0),
    ]
    rows = funded.records(5)
    assert [row["settlement"] for row in rows] == ["void"] * 4 + ["estimated"]
    poor.prove()


def test_a_retry_that_works_is_charged_once(funded: Account, provider: WatchedProvider) -> None:
    provider.script(status=429, retry_after=1)
    found, sent = run(funded, "retried.mjs")
    assert [(one["status"], one["retry"]) for one in sent] == [(429, 0), (200, 1)]
    assert found["credits"] == sent[1]["credits"]
    assert len(provider.requests) == 2
    refused, served = funded.records(2)
    assert (refused["charge_ucr"], refused["status"]) == (0, 429)
    assert served["output_tokens"] == found["tokens"]
