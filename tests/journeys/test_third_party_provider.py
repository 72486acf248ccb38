"""The stack in front of a provider server that is not ours: `@copilotkit/aimock` from npm.

A stack of its own, started without the sandbox, with a catalogue whose only provider is that
server; the official client asks through it. Books are proven as in the other journeys.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from http.client import HTTPConnection
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.journeys import npm
from tests.journeys.account import Account
from tests.journeys.running import Running, call
from tests.stack import Stack
from tests.waiting import eventually_blocking, free_port

API_KEY = "sk-aimock-0123456789abcdef"
_START_SECONDS = 20
_STOP_SECONDS = 10
_CATALOGUE = """
[providers.aimock]
base_url = "http://127.0.0.1:{port}/v1"
api_key_env = "AIMOCK_KEY"

[providers.locked]
base_url = "http://127.0.0.1:{port}/v1"
api_key_env = "WRONG_KEY"

[models.house-large]
targets = ["aimock/mock-large"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "300", output = "1500" }}

[models.locked]
targets = ["locked/mock-large"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "300", output = "1500" }}
"""


class Aimock:
    """The server as a process; accepts `API_KEY` only."""

    def __init__(self) -> None:
        self.port = free_port()
        command = ["node", "node_modules/@copilotkit/aimock/dist/cli.js"]
        command += ["--port", str(self.port), "--fixtures", "aimock.json"]
        command += ["--strict", "--log-level", "silent"]
        self._process = subprocess.Popen(
            command,
            cwd=npm.installed(),
            env={**os.environ, "AIMOCK_API_KEYS": API_KEY},
            stdin=subprocess.DEVNULL,
        )
        eventually_blocking(self._listens, _START_SECONDS)

    def _listens(self) -> bool:
        assert self._process.poll() is None, "it ended at once"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def asked(self, request_id: str) -> list[dict[str, Any]]:
        """The bodies of the requests it got under this id."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            reply = call(connection, "GET", "/__aimock/journal", API_KEY)
        finally:
            connection.close()
        mine = [one for one in reply.body if one["headers"].get("x-request-id") == request_id]
        return [one["body"] for one in mine]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(_STOP_SECONDS)


@pytest.fixture(scope="module")
def aimock() -> Iterator[Aimock]:
    server = Aimock()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, aimock: Aimock) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("third_party")
    stack = Stack(folder / "data")
    catalogue = folder / "aimock.toml"
    catalogue.write_text(_CATALOGUE.format(port=aimock.port))
    stack.env |= {"TOLLGATE_CATALOGUE": str(catalogue), "AIMOCK_KEY": API_KEY, "WRONG_KEY": "no"}
    try:
        yield Running(stack.start().until_ready())
    finally:
        stack.close()


class Weather(BaseModel):
    """What the tool takes."""

    city: str


class Pioneers(BaseModel):
    names: list[str]


def ask(text: str) -> Any:
    return {"model": "house-large", "messages": [{"role": "user", "content": text}]}


def price(prompt: int, completion: int) -> Decimal:
    return Decimal(prompt * 300 + completion * 1500) / 1_000_000


def test_a_plain_answer(funded: Account, aimock: Aimock) -> None:
    raw = funded.openai().chat.completions.with_raw_response.create(**ask("say hello"))
    completion = raw.parse()
    assert completion.choices[0].message.content == "Hello from another house."
    assert completion.model == raw.headers["x-model-used"] == "mock-large"
    assert Decimal(raw.headers["x-credits-used"]) == price(11, 7)
    [asked] = aimock.asked(raw.headers["x-request-id"])
    assert asked["model"] == "mock-large"


def test_a_stream(funded: Account, aimock: Aimock) -> None:
    stream = funded.openai().chat.completions.create(**ask("say hello"), stream=True)
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "Hello from another house."
    assert (last.choices, last.model) == ([], "mock-large")
    assert last.usage and last.usage.completion_tokens == 7
    assert funded.seen.credits == price(11, 7)
    [asked] = aimock.asked(stream.response.headers["x-request-id"])
    assert asked["stream_options"] == {"include_usage": True}


def test_usage_the_provider_works_out_itself(funded: Account) -> None:
    client = funded.openai()
    plain = client.chat.completions.create(**ask("uncounted"))
    assert plain.usage
    assert funded.seen.credits == price(plain.usage.prompt_tokens, plain.usage.completion_tokens)
    *_, last = client.chat.completions.create(
        **ask("uncounted"), stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == plain.usage
    assert funded.seen.credits == 2 * funded.seen.sent[0].credits


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_answered(funded: Account, streamed: bool) -> None:
    client = funded.openai()
    tools: Any = [openai.pydantic_function_tool(Weather)]
    messages: Any = ask("weather")["messages"]
    if streamed:
        with client.chat.completions.stream(**ask("weather"), tools=tools) as stream:
            completion = stream.until_done().get_final_completion()
    else:
        completion = client.chat.completions.parse(**ask("weather"), tools=tools)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Tromsø")
    assert funded.seen.credits == price(20, 9)
    messages += [
        message.to_dict(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
    ]
    final = client.chat.completions.create(model="house-large", messages=messages, tools=tools)
    assert final.choices[0].message.content == "It rains in Tromsø."


def test_structured_output_is_parsed(funded: Account) -> None:
    completion = funded.openai().chat.completions.parse(**ask("pioneers"), response_format=Pioneers)
    assert completion.choices[0].message.parsed == Pioneers(names=["Ada", "Grace"])


def test_a_stream_that_breaks_off(funded: Account) -> None:
    stream = funded.openai().chat.completions.create(**ask("break off"), stream=True)
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            chunks.append(chunk)
    assert type(caught.value) is openai.APIError
    assert caught.value.code == "provider_broke_off"
    assert chunks
    [record] = funded.records(1)
    assert (record["settlement"], record["outcome"]) == ("estimated", "provider_failed")
    assert funded.seen.credits > 0


def test_errors(funded: Account) -> None:
    client = funded.openai(max_retries=0)
    with pytest.raises(openai.BadRequestError, match=r"That is not possible\.") as bad:
        client.chat.completions.create(**ask("impossible"))
    assert (bad.value.code, bad.value.param) == ("not_possible", "messages")
    with pytest.raises(openai.RateLimitError) as limited:
        client.chat.completions.create(**ask("too often"))
    assert limited.value.code == "provider_rate_limited"
    assert limited.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.InternalServerError) as broken:
        client.chat.completions.create(**ask("broken house"), stream=True)
    assert (broken.value.status_code, broken.value.code) == (502, "provider_error")
    assert "10.1.2.3" not in str(broken.value)
    with pytest.raises(openai.InternalServerError) as locked:
        client.chat.completions.create(**{**ask("say hello"), "model": "locked"})
    assert (locked.value.status_code, locked.value.code) == (502, "provider_misconfigured")
    rows = funded.records(4)
    assert [row["status"] for row in rows] == [400, 429, 502, 502]
    assert {(row["settlement"], row["charge_ucr"]) for row in rows} == {("void", 0)}
