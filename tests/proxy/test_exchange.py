"""Whole exchanges, told as conversations between a client, the proxy and a provider."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import pytest

from accounting.contract.money import format_credits
from tests.proxy.ends import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    Answer,
    Asked,
    Client,
    Upstream,
    chat,
    chunked,
    delta,
    plain,
    read_events,
    request,
    sse,
    standin,
    usage,
    usage_chunk,
)
from tests.proxy.harness import OUTPUT_UCR, PROVIDER_KEY, Key, Scene, Start, credits_of

INPUT_UCR, CACHED_UCR = 15, Decimal("7.5")


async def talk(
    proxy: Scene, key: Key, body: Mapping[str, object] | bytes, **headers: str
) -> tuple[Client, Upstream, Asked]:
    """A client has asked, and a provider has heard."""
    client = await proxy.client()
    client >> request(key.secret, body, **headers)
    upstream = await proxy.raw.call()
    return client, upstream, await upstream.hears()


# Plain


async def test_a_plain_answer_passes_untouched_with_its_price(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, _ = await talk(proxy, key, chat(model="raw"))
    said = plain("Grüße \u2028", usage(10, 20))
    upstream >> said
    answer = await client.answer()
    assert answer.status == 200
    assert answer.body == said.partition(b"\r\n\r\n")[2]
    (event,) = await proxy.events(key)
    assert event.charge_ucr == 10 * INPUT_UCR + 20 * OUTPUT_UCR
    assert answer.headers == {
        "content-type": "application/json",
        "content-length": str(len(answer.body)),
        "x-request-id": event.request_id,
        "x-credits-used": "0.00135",
        "x-model-used": "raw-there",
    }
    assert (event.settlement, event.outcome, event.status) == ("exact", "completed", 200)
    assert (event.model, event.served_by, event.streamed) == ("raw", "raw/raw-there", False)
    assert (event.tokens.input, event.tokens.output) == (10, 20)
    assert event.answer_bytes == len(answer.body)


async def test_the_provider_gets_its_key_and_nothing_of_the_clients(proxy: Scene) -> None:
    key = proxy.seeds.key()
    body = chat(model="raw", user="someone", logit_bias={"50256": -100}, temperature=0.70)
    client, upstream, asked = await talk(proxy, key, body, X_Secret="mine", Cookie="a=b")
    assert asked.line == "POST /v1/chat/completions HTTP/1.1"
    assert asked.headers["authorization"] == f"Bearer {PROVIDER_KEY}"
    assert asked.headers["accept-encoding"] == "identity"
    assert key.secret not in str(asked) and "mine" not in str(asked) and "a=b" not in str(asked)
    assert asked.json == body | {"model": "raw-there"}
    upstream >> plain(usage=usage(1, 1))
    answer = await client.answer()
    assert asked.headers["x-request-id"] == answer.headers["x-request-id"]


async def test_messages_pass_as_the_bytes_they_came_in(proxy: Scene) -> None:
    key = proxy.seeds.key()
    messages = rb'[ {"role" : "user", "content": "\u00fc \ud83d\ude80 1e2 1.50"} ]'
    body = b'{"messages":' + messages + b', "seed":12345678901234567890, "model":"raw"}'
    client, upstream, asked = await talk(proxy, key, body)
    assert messages in asked.body and b"12345678901234567890" in asked.body
    upstream >> plain(usage=usage(1, 1))
    assert (await client.answer()).status == 200


async def test_a_field_given_twice_means_the_same_here_and_there(proxy: Scene) -> None:
    """Else one could hold for one token and ask the provider for thousands."""
    key = proxy.seeds.key()
    body = b'{"model":"raw","messages":[],"max_tokens":1000,"max_tokens":1,"n":8,"n":1}'
    client, upstream, asked = await talk(proxy, key, body)
    assert asked.body.count(b"max_tokens") == 1 and asked.body.count(b'"n"') == 1
    upstream >> plain(usage=usage(1, 1))
    await client.answer()
    (event,) = await proxy.events(key)
    held_output = (event.hold_ucr - (len(body) + 32) * INPUT_UCR) // OUTPUT_UCR
    assert held_output == asked.json["max_tokens"] * asked.json["n"]


async def test_interim_and_chunked_answers_are_understood(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, _ = await talk(proxy, key, chat(model="raw"))
    body = plain("Hello", usage(3, 4)).partition(b"\r\n\r\n")[2]
    upstream >> b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    upstream >> b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    upstream >> b"transfer-encoding: chunked\r\n\r\n"
    upstream >> chunked(body[:20]) + chunked(body[20:]) + STREAM_END
    answer = await client.answer()
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["content-length"] == str(len(body))


async def test_an_answer_cut_at_every_byte_is_the_same_answer(proxy: Scene) -> None:
    key = proxy.seeds.key()
    said = plain("Hello", usage(3, 4))
    client, upstream, _ = await talk(proxy, key, chat(model="raw"))
    for byte in said:
        upstream >> bytes([byte])
        await upstream.flushed()
    assert (await client.answer()).body == said.partition(b"\r\n\r\n")[2]
    client >> request(key.secret, chat(model="raw"))
    await upstream.hears()  # on the same connection
    upstream >> said
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("shape", ["normal", "missing", "zero", "null"])
async def test_a_plain_answer_costs_what_its_usage_says(proxy: Scene, shape: str) -> None:
    """Without figures it is estimated: four bytes to a token; a zero is a figure."""
    key = proxy.seeds.key()
    body = chat(standin("Hello", usage=shape, prompt_tokens=9, completion_tokens=7))
    answer = await proxy.ask(key, body)
    (event,) = await proxy.events(key)
    assert credits_of(answer) == event.charge_ucr
    if shape in ("normal", "zero"):
        assert event.settlement == "exact"
        assert event.charge_ucr == (9 * INPUT_UCR + 7 * OUTPUT_UCR if shape == "normal" else 0)
    else:
        assert event.settlement == "estimated"
        inputs, outputs = len(json.dumps(body)), len(answer.body)
        assert event.tokens.input == -(-inputs // 4)
        assert event.tokens.output == min(100, -(-outputs // 4))


async def test_cached_and_reasoning_tokens_are_priced_on_their_meters(proxy: Scene) -> None:
    key = proxy.seeds.key()
    script = standin(prompt_tokens=50, completion_tokens=9, cached_tokens=33, reasoning_tokens=4)
    for stream in (False, True):
        answer = await proxy.ask(key, chat(script, stream=stream))
        event = (await proxy.events(key))[-1]
        assert (event.tokens.cached_input, event.tokens.reasoning) == (33, 4)
        exact = 17 * INPUT_UCR + 33 * CACHED_UCR + 9 * OUTPUT_UCR
        assert event.charge_ucr == math.ceil(exact) == credits_of(answer)  # rounded up, once


async def test_a_charge_never_exceeds_its_hold(proxy: Scene) -> None:
    key = proxy.seeds.key()
    for stream in (False, True):
        body = chat(standin(prompt_tokens=9, completion_tokens=5000, obey_max=0), stream=stream)
        answer = await proxy.ask(key, body)
        event = (await proxy.events(key))[-1]
        assert event.charge_ucr == event.hold_ucr == credits_of(answer)
        assert event.overrun_ucr == 9 * INPUT_UCR + 5000 * OUTPUT_UCR - event.charge_ucr


async def test_a_hold_is_the_worst_case(proxy: Scene) -> None:
    key = proxy.seeds.key()
    bodies: list[tuple[dict[str, object], int]] = [
        (chat(max_tokens=7), 7),
        (chat(max_tokens=None), 1000),
        (chat(max_tokens=None, max_completion_tokens=9), 9),
        (chat(max_tokens=5, max_completion_tokens=11), 11),
        (chat(max_tokens=90_000), 1000),
        (chat(max_tokens=7, n=3), 21),
    ]
    for body, output in bodies:
        assert (await proxy.ask(key, body)).status == 200
        event = (await proxy.events(key))[-1]
        inputs = len(json.dumps(body)) + 32
        assert event.hold_ucr == inputs * INPUT_UCR + output * OUTPUT_UCR, body
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
    assert (await proxy.ask(key, chat(messages=[image]))).status == 200
    assert (await proxy.events(key))[-1].hold_ucr == 8000 * INPUT_UCR + 100 * OUTPUT_UCR


# Streams


async def test_a_stream_passes_chunk_by_chunk_and_ends_with_its_price(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, asked = await talk(proxy, key, chat(model="raw", stream=True))
    assert asked.json["stream_options"] == {"include_usage": True}

    upstream >> STREAM_HEAD + sse(delta(""))
    status, headers = await client.status()
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert headers["x-model-used"] == "raw-there"
    assert headers["x-request-id"] == asked.headers["x-request-id"]
    assert "x-credits-used" not in headers and "x-fallback-from" not in headers
    assert "content-length" not in headers
    assert await client.event() == delta("")
    upstream >> sse(delta("Hel"))
    assert await client.event() == delta("Hel")
    upstream >> sse(delta("lo", finish="stop"))
    assert await client.event() == delta("lo", finish="stop")
    upstream >> sse(usage_chunk(10, 20)) + DONE + STREAM_END
    assert await client.event() == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "at-the-provider",
        "choices": [],
        "usage": usage(10, 20),
        "credits_used": Decimal("0.00135"),
    }
    assert await client.event() == "[DONE]"
    assert await client.event() is None

    (event,) = await proxy.events(key)
    assert event.charge_ucr == 1350
    assert (event.settlement, event.outcome, event.streamed) == ("exact", "completed", True)
    assert event.request_id == headers["x-request-id"]


async def test_content_passes_byte_for_byte(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, _ = await talk(proxy, key, chat(model="raw", stream=True))
    odd = b'data: {"choices" : [ {"delta":{"content":"\\u00e4 1.0"}} ] ,"x":1e5}\n\n'
    multi = b'data: {"choices":\ndata: []}\n\n'
    comment = b": keep-alive\n\n"
    upstream >> STREAM_HEAD + chunked(odd) + chunked(comment) + chunked(multi) + DONE + STREAM_END
    answer = await client.answer()
    assert answer.body.startswith(odd + comment + multi)


ASKED = [None, {"include_usage": False}, {"include_usage": True}, {"include_usage": None}, {}]


@pytest.mark.parametrize("options", ASKED)
@pytest.mark.parametrize("shape", ["as_asked", "normal", "every_chunk", "in_last_content_chunk"])
async def test_exactly_one_chunk_carries_usage(
    proxy: Scene, options: dict[str, object] | None, shape: str
) -> None:
    key = proxy.seeds.key()
    more = {} if options is None else {"stream_options": options}
    script = standin(usage=shape, chunks=3, prompt_tokens=10, completion_tokens=5)
    answer = await proxy.ask(key, chat(script, stream=True, **more))
    *content, last, done = answer.events
    assert done == "[DONE]"
    assert not any(chunk.get("usage") for chunk in content)
    assert all(chunk["choices"] for chunk in content)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    for field in ("id", "object", "created", "model"):
        assert last[field] == content[0][field], field
    (event,) = await proxy.events(key)
    assert event.charge_ucr == 10 * INPUT_UCR + 5 * OUTPUT_UCR == credits_of(answer)
    assert (event.settlement, event.tokens.output) == ("exact", 5)


async def test_usage_null_is_shown_only_to_those_who_asked(proxy: Scene) -> None:
    key = proxy.seeds.key()
    asked = chat(stream=True, stream_options={"include_usage": True})
    assert b'"usage":null' in (await proxy.ask(key, asked)).body
    assert b'"usage":null' not in (await proxy.ask(key, chat(stream=True))).body


async def test_credits_can_be_told_in_a_comment(proxy: Scene) -> None:
    key = proxy.seeds.key()
    answer = await proxy.ask(key, chat(stream=True), X_Tollgate_Credits_Chunk="off")
    *content, comment, done = answer.events
    (event,) = await proxy.events(key)
    assert done == "[DONE]" and comment.startswith(":")
    assert format_credits(event.charge_ucr) in comment
    assert all(chunk["choices"] for chunk in content)


async def test_who_asked_for_usage_gets_it_in_spite_of_that_header(proxy: Scene) -> None:
    key = proxy.seeds.key()
    body = chat(stream=True, stream_options={"include_usage": True})
    answer = await proxy.ask(key, body, X_Tollgate_Credits_Chunk="off")
    (event,) = await proxy.events(key)
    assert credits_of(answer) == event.charge_ucr


@pytest.mark.parametrize("shape", ["missing", "zero", "null", "late_after_done"])
async def test_a_stream_without_figures_is_estimated(proxy: Scene, shape: str) -> None:
    key = proxy.seeds.key()
    script = standin(usage=shape, chunks=10, chunk_bytes=40)
    answer = await proxy.ask(key, chat(script, stream=True))
    (event,) = await proxy.events(key)
    assert event.charge_ucr == credits_of(answer)
    assert answer.events[-1] == "[DONE]" and answer.events[-2]["choices"] == []
    if shape == "zero":
        assert (event.settlement, event.charge_ucr) == ("exact", 0)
        return
    if shape == "late_after_done" and event.settlement == "exact":
        return
    assert event.settlement == "estimated"
    assert answer.events[-2]["usage"]["estimated"] is True
    assert event.tokens.input == -(-event.request_bytes // 4)
    assert 80 <= event.tokens.output <= 100  # 400 bytes of content, at most what was asked for


@pytest.mark.parametrize("shape", ["normal", "null", "constant", "missing", "junk"])
async def test_ids_of_the_provider_matter_to_nobody(proxy: Scene, shape: str) -> None:
    key = proxy.seeds.key()
    for _ in range(2):
        answer = await proxy.ask(key, chat(standin(id=shape), stream=True))
        *_, last, done = answer.events
        assert done == "[DONE]" and isinstance(last["id"], str) and last["id"]
        if shape in ("normal", "constant", "junk"):
            assert last["id"] == answer.events[0]["id"]
        assert (await proxy.ask(key, chat(standin(id=shape)))).status == 200
    assert len(await proxy.events(key)) == 4


FORMS: list[dict[str, Any]] = [
    {"crlf": 1},
    {"no_space": 1},
    {"comments": 1},
    {"split_utf8": 1},
    {"coalesce": 1},
    {"encoding": "close"},
    *[{"split_events": 1, "seed": seed} for seed in range(4)],
    {"crlf": 1, "comments": 1, "no_space": 1, "split_events": 1},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
async def test_every_form_of_stream_says_the_same(proxy: Scene, form: dict[str, Any]) -> None:
    key = proxy.seeds.key()
    texts = []
    for script in ({"split_utf8": form.get("split_utf8", 0)}, form):
        answer = await proxy.ask(key, chat(standin(**script), stream=True))
        said = [event for event in answer.events if not str(event).startswith(":")]
        *content, last, done = said
        assert done == "[DONE]" and last["usage"]["total_tokens"]
        texts.append("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in content))
    assert texts[0] == texts[1] != ""
    first, second = await proxy.events(key)
    assert first.tokens.output == second.tokens.output
    assert second.settlement == "exact"


async def test_a_stream_cut_at_every_byte_is_the_same_stream(proxy: Scene) -> None:
    key = proxy.seeds.key()
    whole = STREAM_HEAD + sse(delta("ü🚀")) + sse(usage_chunk(3, 4)) + DONE + STREAM_END
    client, upstream, _ = await talk(proxy, key, chat(model="raw", stream=True))
    for byte in whole:
        upstream >> bytes([byte])
        await upstream.flushed()
    content, last, done = (await client.answer()).events
    assert (content, last["usage"], done) == (delta("ü🚀"), usage(3, 4), "[DONE]")


VAST: dict[str, Any] = {"model": "vast", "max_tokens": None, "stream": True}


async def test_two_thousand_chunks_pass_in_order(proxy: Scene) -> None:
    key = proxy.seeds.key()
    answer = await proxy.ask(key, chat(standin(chunks=2000, obey_max=0), **VAST))
    assert len(answer.events) > 2000
    assert (await proxy.events(key))[0].tokens.output > 1000


async def test_big_prompts_and_big_answers_pass(proxy: Scene) -> None:
    key = proxy.seeds.key()
    body = chat("x" * 1_000_000 + standin(answer_bytes=5_000_000, obey_max=0))
    answer = await proxy.ask(key, body)
    assert answer.status == 200
    assert len(answer.json["choices"][0]["message"]["content"]) == 5_000_000
    assert json.loads(proxy.main.requests[-1].body)["messages"] == body["messages"]


async def test_a_stream_over_http_1_0_is_not_chunked(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, _ = await talk(proxy, key, chat(model="raw", stream=True), version="1.0")
    upstream >> STREAM_HEAD + sse(delta("Hi", finish="stop")) + sse(usage_chunk(1, 2))
    upstream >> DONE + STREAM_END
    status, headers = await client.status()
    assert (status, headers["connection"]) == (200, "close")
    assert read_events(await client.rest())[-1] == "[DONE]"


# What clients are told of their limits


RATE = {
    "x-ratelimit-limit-requests": "60",
    "x-ratelimit-remaining-requests": "59",
    "x-ratelimit-reset-requests": "1s",
    "x-ratelimit-limit-tokens": "6000",
}


@pytest.mark.parametrize("stream", [False, True])
async def test_limits_are_told_with_each_answer(proxy: Scene, stream: bool) -> None:
    key = proxy.seeds.key(requests_per_minute=60, tokens_per_minute=6000)
    body = chat(stream=stream)
    headers = (await proxy.ask(key, body)).headers
    assert headers.items() >= RATE.items()
    held = len(json.dumps(body)) + 32 + 100
    assert abs(int(headers["x-ratelimit-remaining-tokens"]) - (6000 - held)) <= 2
    assert headers["x-ratelimit-reset-tokens"] in {f"{-(-held // 100)}s", f"{held // 100}s"}


async def test_without_limits_none_are_told(proxy: Scene) -> None:
    headers = (await proxy.ask(proxy.seeds.key(), chat())).headers
    assert not [name for name in headers if name.startswith("x-ratelimit")]


# The sum of it all


async def test_what_clients_are_told_adds_up_to_what_is_charged(start: Start) -> None:
    scene = await start()
    second = await scene.another()
    keys = [scene.seeds.key() for _ in range(3)]
    told: dict[str, int] = {}
    for number in range(60):
        key = keys[number % 3]
        script: dict[str, Any] = {"prompt_tokens": 7 * number, "cached_tokens": 3 * number}
        script["usage"] = ("as_asked", "missing", "every_chunk", "zero")[number % 4]
        body = chat(standin(**script, completion_tokens=number), stream=number % 5 < 3)
        proxy = scene.proxies[0] if number % 2 else second
        answer = await scene.ask(key, body, proxy=proxy)
        told[answer.headers["x-request-id"]] = credits_of(answer)
    charged = {e.request_id: e.charge_ucr for key in keys for e in await scene.events(key)}
    assert told == charged and sum(told.values()) > 0


def test_the_reader_of_events_is_strict() -> None:
    for broken in (b"data: {}\n", b"data: {}", b"id: 1\ndata: {}\n\n"):
        with pytest.raises(AssertionError):
            Answer(200, {}, broken).events  # noqa: B018
