"""The official `openai` client for Python against a running stack, as its users write it.

Every test ends with the proof of `conftest.py`: what the client saw as used is what the
ledger charged and what the balance fell by.
"""

import asyncio
import logging
import re
from decimal import Decimal
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.journeys.account import CREDITS_PER_USD, Account
from tests.journeys.running import Running
from tests.journeys.watched_provider import API_KEY, WatchedProvider

MODEL = "sandbox-small"
HELLO: Any = [{"role": "user", "content": "Say hello."}]
RETRY_LINE = re.compile(r"Retrying request in ([0-9.]+) seconds")


def asked(script: str) -> Any:
    """Messages that make the stand-in provider do what `script` says."""
    return [{"role": "user", "content": f"Hello. [[standin {script}]]"}]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    return "".join(content for content in deltas if content)


def told(chunk: Any) -> Decimal:
    """The credits in an object of the client, which reads JSON numbers as floats."""
    return Decimal(str(chunk.credits_used))


# Answers


def test_a_plain_answer_with_its_headers(funded: Account) -> None:
    raw = funded.openai().chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    completion = raw.parse()
    assert completion.choices[0].message.content
    assert completion.usage and completion.usage.completion_tokens > 0
    assert raw.headers["x-model-used"] == MODEL
    assert re.fullmatch(r"req_[0-9A-Z]{26}", raw.headers["x-request-id"])
    assert raw.request_id == completion._request_id == raw.headers["x-request-id"]
    assert "x-fallback-from" not in raw.headers
    expected = completion.usage.prompt_tokens * 15 + completion.usage.completion_tokens * 60
    assert Decimal(raw.headers["x-credits-used"]) == Decimal(expected) / 1_000_000
    [record] = funded.records(1)
    assert record["request_id"] == raw.request_id
    assert (record["settlement"], record["outcome"]) == ("exact", "completed")


def test_a_stream_ends_with_what_it_cost(funded: Account) -> None:
    stream = funded.openai().chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = list(stream)
    *rest, last = chunks
    assert text_of(rest).startswith("Hello from the sandbox provider!")
    assert rest[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage and last.usage.completion_tokens > 0
    assert told(last) == funded.seen.credits > 0
    assert all("usage" not in chunk.model_fields_set for chunk in rest)
    assert len({chunk.id for chunk in chunks}) == 1
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", MODEL)}
    assert stream.response.headers["x-model-used"] == MODEL
    assert "x-credits-used" not in stream.response.headers


@pytest.mark.parametrize("wanted", [True, False])
def test_usage_comes_once_whether_asked_for_or_not(funded: Account, wanted: bool) -> None:
    options = {"include_usage": wanted}
    chunks = list(
        funded.openai().chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options=options
        )
    )
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert with_usage == [chunks[-1]]
    nulls = ["usage" in chunk.model_fields_set for chunk in chunks[:-1]]
    assert all(nulls) if wanted else not any(nulls)
    assert told(chunks[-1]) == funded.seen.credits


def test_the_extra_chunk_can_be_declined(funded: Account) -> None:
    chunks = list(
        funded.openai().chat.completions.create(
            model=MODEL,
            messages=HELLO,
            stream=True,
            extra_headers={"x-tollgate-credits-chunk": "off"},
        )
    )
    assert all(chunk.choices for chunk in chunks)
    assert b"\n: credits_used=" in funded.seen.sent[0].body
    assert funded.seen.credits > 0


def test_the_stream_helper_gathers_the_answer(funded: Account) -> None:
    with funded.openai().chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert (final.choices[0].message.content or "").startswith("Hello from the sandbox")
    assert final.choices[0].finish_reason == "stop"
    assert final.usage and final.usage.completion_tokens > 0


def test_the_raw_streaming_response_is_the_wire(funded: Account) -> None:
    with funded.openai().chat.completions.with_streaming_response.create(
        model=MODEL, messages=HELLO, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert '"choices":[]' in lines[-2]
    assert '"credits_used":' in lines[-2]


async def test_many_at_once(funded: Account) -> None:
    async with funded.async_openai() as client:

        async def plain() -> int:
            completion = await client.chat.completions.create(model=MODEL, messages=HELLO)
            assert completion.usage
            return completion.usage.completion_tokens

        async def streamed() -> int:
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage
            return chunks[-1].usage.completion_tokens

        answers = await asyncio.gather(*[one() for one in [plain, streamed] * 10])
    assert len(set(answers)) == 1  # the same text, whichever way it came
    assert len(funded.seen.sent) == 20
    assert all(one.credits > 0 for one in funded.seen.sent)


def test_awkward_streams_arrive_whole(funded: Account) -> None:
    client = funded.openai()
    scripts = ["split_utf8=1", "crlf=1", "comments=1", "coalesce=1", "split_events=1", "no_space=1"]
    scripts += ["usage=every_chunk", "usage=in_last_content_chunk", "id=junk", "id=null"]
    for script in scripts:
        chunks = list(
            client.chat.completions.create(model=MODEL, messages=asked(script), stream=True)
        )
        assert "🌍🚀" in text_of(chunks) if "utf8" in script else "Hello" in text_of(chunks), script
        assert chunks[-1].usage and told(chunks[-1]) > 0, script


def test_a_fallback_is_named(funded: Account, provider: WatchedProvider) -> None:
    raw = funded.openai().chat.completions.with_raw_response.create(model="chained", messages=HELLO)
    assert raw.headers["x-model-used"] == "second-choice"
    assert raw.headers["x-fallback-from"] == "first-choice"
    assert [body["model"] for body in provider.bodies] == ["second-choice"]


# What reaches the provider


def test_tools_and_json_mode_pass_through(funded: Account, provider: WatchedProvider) -> None:
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "strict": True,
                "parameters": {"type": "object", "properties": {"città": {"type": "string"}}},
            },
        }
    ]
    body: dict[str, Any] = {
        "messages": [*HELLO, {"role": "assistant", "content": None, "name": "ünïcode \u2028 🦄"}],
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {"type": "json_object"},
        "temperature": 0.1,
        "seed": 2**53 + 1,
        "max_completion_tokens": 50,
        "logit_bias": {"50256": -100},
        "stop": ["\n\n"],
    }
    client = funded.openai()
    client.chat.completions.create(model="watched", **body)
    list(client.chat.completions.create(model="watched", stream=True, **body))
    plain, streamed = provider.bodies
    assert plain == {"model": "watched-2026-01-01", **body}
    assert streamed == {**plain, "stream": True, "stream_options": {"include_usage": True}}


def test_the_provider_gets_its_own_key_and_no_more(
    funded: Account, provider: WatchedProvider
) -> None:
    raw = funded.openai(organization="org-mine").chat.completions.with_raw_response.create(
        model="watched", messages=HELLO, extra_headers={"cookie": "secret=1"}
    )
    [request] = provider.requests
    assert request.headers["authorization"] == f"Bearer {API_KEY}"
    assert request.headers["x-request-id"] == raw.headers["x-request-id"]
    assert not {"cookie", "openai-organization"} & set(request.headers)
    assert funded.key not in repr(request.headers) + request.body.decode()


def test_models_are_listed(funded: Account) -> None:
    client = funded.openai()
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {MODEL, "watched", "chained"}
    one = client.models.retrieve("watched")
    assert one == models["watched"]
    assert (one.object, one.owned_by) == ("model", "watched")
    extra: Any = one.model_extra
    assert extra["context_tokens"] == 128000
    assert extra["max_output_tokens"] == 4096
    assert extra["pricing"]["output"] == "1500"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-99")
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id


# Limits


def test_a_limited_key_is_told_where_it_stands(funded: Account) -> None:
    _, key = funded.new_key(rpm=2, tpm=100_000)
    client = funded.openai(key, max_retries=0)
    left = []
    for _ in range(2):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, max_tokens=50
        )
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-limit-tokens"] == "100000"
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) < 100_000
        assert re.fullmatch(r"(\d+m)?\d+s|\d+ms", raw.headers["x-ratelimit-reset-requests"])
        left.append(raw.headers["x-ratelimit-remaining-requests"])
    assert left == ["1", "0"]
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=50)
    assert (caught.value.status_code, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.type == "requests"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


def test_a_rate_limit_passes_by_waiting_as_long_as_it_says(
    funded: Account, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "openai")
    _, key = funded.new_key(rpm=60)
    client = funded.openai(key)
    for _ in range(500):
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
        if raw.retries_taken:
            break
    assert raw.retries_taken == 1
    *_, refused, served = funded.seen.sent
    assert (refused.status, served.status, served.retry_count) == (429, 200, 1)
    assert refused.headers["retry-after"] == "1"
    assert [float(RETRY_LINE.findall(caplog.text)[0])] == [1.0]


# Errors, each as the client's own class


class Error:
    """What a call raised."""

    def __init__(self, client: OpenAI, **ask: Any) -> None:
        try:
            list(client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **ask}))
        except openai.APIError as error:
            self.raised = error
        else:
            raise AssertionError("it was served")
        assert re.fullmatch(r"req_[0-9A-Z]{26}", getattr(self.raised, "request_id", "") or "")

    def __eq__(self, other: object) -> bool:
        status = getattr(self.raised, "status_code", None)
        return (type(self.raised), status, self.raised.code) == other

    def __repr__(self) -> str:
        return repr(self.raised)


def test_errors_become_the_exceptions_of_the_client(funded: Account) -> None:
    client = funded.openai(max_retries=0)
    unknown = funded.openai("inf_" + "A" * 43)
    assert Error(unknown) == (openai.AuthenticationError, 401, "invalid_api_key")
    strange = funded.openai("sk-not-one-of-ours")
    assert Error(strange) == (openai.AuthenticationError, 401, "invalid_api_key")
    assert Error(client, model="gpt-99") == (openai.NotFoundError, 404, "model_not_found")
    expected = (openai.BadRequestError, 400, "invalid_request")
    assert Error(client, max_tokens=-1) == expected
    assert Error(client, stream="yes") == expected
    assert Error(client, extra_body={"messages": {}}) == expected
    assert len(funded.seen.sent) == 6  # none of them is sent twice
    assert funded.details()["balance_usd"] == 10


def test_refusals_of_a_key_become_permission_errors(funded: Account) -> None:
    _, key = funded.new_key(allowed_models=["watched"])
    expected = (openai.PermissionDeniedError, 403, "model_not_allowed")
    assert Error(funded.openai(key)) == expected
    _, key = funded.new_key(cost_cap_usd="0.000001")
    expected = (openai.PermissionDeniedError, 403, "plan_limit_exceeded")
    assert Error(funded.openai(key)) == expected
    _, key = funded.new_key(scopes=["account"])
    expected = (openai.PermissionDeniedError, 403, "insufficient_scope")
    assert Error(funded.openai(key)) == expected
    funded.operator("suspend")
    expected = (openai.PermissionDeniedError, 403, "account_suspended")
    assert Error(funded.openai()) == expected
    assert len(funded.seen.sent) == 4


def test_an_empty_wallet_is_402_and_sent_once(account: Account) -> None:
    error = Error(account.openai())
    assert error == (openai.APIStatusError, 402, "INSUFFICIENT_CREDIT")
    assert isinstance(error.raised, openai.APIStatusError)
    assert "retry-after" not in error.raised.response.headers
    assert [one.status for one in account.seen.sent] == [402]


def test_what_a_provider_refuses_keeps_its_status(
    funded: Account, provider: WatchedProvider
) -> None:
    client = funded.openai()
    provider.script(status=400)
    expected = (openai.BadRequestError, 400, "bad_request")
    assert Error(client, model="watched") == expected
    provider.script(status=422)
    expected = (openai.UnprocessableEntityError, 422, "bad_request")
    assert Error(client, model="watched", stream=True) == expected
    assert len(funded.seen.sent) == len(provider.requests) == 2
    rows = funded.records(2)
    assert [(row["settlement"], row["status"]) for row in rows] == [("void", 400), ("void", 422)]


@pytest.mark.parametrize("status", [401, 404])
def test_our_own_trouble_with_a_provider_is_never_the_clients(
    funded: Account, provider: WatchedProvider, status: int
) -> None:
    provider.script(status=status)
    error = Error(funded.openai(max_retries=0), model="watched")
    assert error == (openai.InternalServerError, 502, "provider_misconfigured")
    assert API_KEY not in str(error.raised)


# Retries


def test_a_failing_provider_is_tried_three_times_and_costs_nothing(
    funded: Account, provider: WatchedProvider
) -> None:
    provider.script(times=3, status=503)
    error = Error(funded.openai(), model="watched")
    assert error == (openai.InternalServerError, 502, "provider_error")
    assert [one.retry_count for one in funded.seen.sent] == [0, 1, 2]
    assert len(provider.requests) == 3
    rows = funded.records(3)
    assert {(row["settlement"], row["outcome"]) for row in rows} == {("void", "provider_failed")}
    assert len({row["request_id"] for row in rows}) == 3
    assert funded.details()["balance_usd"] == 10


def test_a_retry_that_works_is_charged_once(
    funded: Account, provider: WatchedProvider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "openai")
    provider.script(status=429, retry_after=1)
    raw = funded.openai().chat.completions.with_raw_response.create(model="watched", messages=HELLO)
    assert raw.retries_taken == 1
    assert funded.seen.sent[0].headers["retry-after"] == "1"
    assert [float(found) for found in RETRY_LINE.findall(caplog.text)] == [1.0]
    refused, served = funded.records(2)
    assert (refused["charge_ucr"], refused["status"]) == (0, 429)
    assert served["charge_ucr"] > 0


# Streams that break


@pytest.mark.parametrize("fault", ["error_event", "eof_mid_stream", "end_mid_stream"])
def test_a_broken_stream_raises_and_is_not_sent_again(funded: Account, fault: str) -> None:
    stream = funded.openai().chat.completions.create(
        model=MODEL, messages=asked(f"fault={fault}; chunks=20"), stream=True
    )
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            chunks.append(chunk)
    assert type(caught.value) is openai.APIError
    assert caught.value.code in ("provider_error", "provider_broke_off")
    assert len(chunks) == 11  # the role and ten pieces
    [sent] = funded.seen.sent
    assert sent.events[-1]["error"]["message"]
    assert sent.events[-1]["usage"]["estimated"] is True
    assert sent.credits > 0
    [record] = funded.records(1)
    assert (record["settlement"], record["outcome"]) == ("estimated", "provider_failed")


def test_a_stream_that_is_left_is_charged_for_what_passed(funded: Account) -> None:
    stream = funded.openai().chat.completions.create(
        model=MODEL, messages=asked("fault=hang_mid_stream; fault_after=3"), stream=True
    )
    for _ in range(4):
        next(stream)
    assert Decimal(funded.details()["held_usd"]) > 0
    stream.close()
    [record] = funded.records(1)
    assert (record["settlement"], record["outcome"]) == ("estimated", "client_left")
    assert 0 < record["charge_ucr"] < record["hold_ucr"]
    assert record["output_tokens"] >= 3


def test_a_client_that_gives_up_before_the_answer_pays_nothing(funded: Account) -> None:
    client = funded.openai(max_retries=0, timeout=1)
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=asked("fault=hang_before_head"))
    [record] = funded.records(1)
    assert (record["settlement"], record["outcome"]) == ("void", "client_left")
    assert funded.details()["balance_usd"] == 10


def test_the_balance_can_be_read_beside_it(funded: Account, journey: Running) -> None:
    client = funded.openai()
    client.chat.completions.create(model=MODEL, messages=HELLO)
    funded.records(1)
    balance: Any = client.get("/account/balance", cast_to=object)
    assert Decimal(str(balance["balance_usd"])) == 10 - funded.seen.credits / CREDITS_PER_USD
