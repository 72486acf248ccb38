"""What a well-behaved stand-in answers, and where a script may come from."""

import base64
import json
import struct

import pytest

from benchmarks.provider import ScriptError, StandInProvider, script_from
from benchmarks.provider.answers import DEFAULT_TEXT
from tests.benchmarks.raw_client import chat, connected, events, streamed, text_of


async def ask(provider: StandInProvider, body: object, path: str = "", **headers: str):
    async with connected(provider) as client:
        await client.send(body, path or "/v1/chat/completions", **headers)
        status, answer_headers, raw = await client.answer()
        return status, answer_headers, raw


async def plain(provider: StandInProvider, body: object, **headers: str) -> dict:
    status, _, raw = await ask(provider, body, **headers)
    assert status == 200, raw
    return json.loads(raw)


async def stream(provider: StandInProvider, body: object, **headers: str) -> list:
    status, answer_headers, raw = await ask(provider, body, **headers)
    assert status == 200, raw
    assert answer_headers["content-type"].startswith("text/event-stream")
    return events(raw)


async def test_plain_answer_has_openai_shape(provider):
    answer = await plain(provider, chat(), x_standin="prompt_tokens=7;cached_tokens=3")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "sandbox"
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": DEFAULT_TEXT,
        "refusal": None,
    }
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    tokens = -(-len(DEFAULT_TEXT) // 4)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, tokens)
    assert usage["total_tokens"] == 7 + tokens
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


async def test_ids_are_unique_on_one_connection(provider):
    async with connected(provider) as client:
        ids = set()
        for _ in range(3):
            await client.send(chat())
            ids.add(json.loads((await client.answer())[2])["id"])
    assert len(ids) == 3


async def test_stream_without_usage_has_role_content_finish_done(provider):
    chunks = await stream(provider, streamed())
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert text_of(chunks) == DEFAULT_TEXT
    assert not any("usage" in chunk for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}


async def test_stream_with_usage_asked_for(provider):
    body = streamed(stream_options={"include_usage": True})
    *chunks, usage, done = await stream(provider, body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == -(-len(DEFAULT_TEXT) // 4)
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_ceiling_cuts_text_and_usage(provider, name):
    answer = await plain(provider, chat(**{name: 3}))
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["message"]["content"] == DEFAULT_TEXT[:12]
    assert answer["choices"][0]["finish_reason"] == "length"
    body = streamed(stream_options={"include_usage": True}, **{name: 3})
    chunks = await stream(provider, body)
    assert text_of(chunks) == DEFAULT_TEXT[:12]
    assert chunks[-2]["usage"]["completion_tokens"] == 3


async def test_ceiling_holds_against_scripted_tokens_unless_told(provider):
    script = "completion_tokens=50;reasoning_tokens=20"
    usage = (await plain(provider, chat(max_tokens=9), x_standin=script))["usage"]
    assert usage["completion_tokens"] == 9
    usage = (await plain(provider, chat(max_tokens=9), x_standin=script + ";obey_max=0"))["usage"]
    assert usage["completion_tokens"] == 50
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 20


async def test_completions_endpoint(provider):
    status, _, raw = await ask(provider, {"model": "m", "prompt": "hi"}, "/v1/completions")
    answer = json.loads(raw)
    assert (status, answer["object"]) == (200, "text_completion")
    assert answer["choices"][0]["text"] == DEFAULT_TEXT
    body = {"model": "m", "prompt": "x [[standin chunks=2; stamp=1]]", "stream": True}
    _, _, raw = await ask(provider, body, "/v1/completions")
    *chunks, finish, done = events(raw)
    assert [chunk["choices"][0]["text"][0] for chunk in chunks] == ["@", "@"]
    assert (finish["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")


async def test_embeddings_as_floats_and_base64(provider):
    body = {"model": "e", "input": ["a", "b"], "dimensions": 4}
    floats = json.loads((await ask(provider, body, "/v1/embeddings"))[2])
    assert [len(item["embedding"]) for item in floats["data"]] == [4, 4]
    assert floats["usage"]["total_tokens"] == floats["usage"]["prompt_tokens"] > 0
    body |= {"encoding_format": "base64", "input": "a"}
    packed = json.loads((await ask(provider, body, "/v1/embeddings"))[2])
    vector = struct.unpack("<4f", base64.b64decode(packed["data"][0]["embedding"]))
    assert vector == pytest.approx(floats["data"][0]["embedding"])


async def test_models_and_unknown_paths(provider):
    status, _, raw = await ask(provider, None, "/v1/models")
    assert status == 200
    assert "sandbox" in [model["id"] for model in json.loads(raw)["data"]]
    status, _, raw = await ask(provider, {}, "/v1/nowhere")
    assert (status, json.loads(raw)["error"]["code"]) == (404, "unknown_url")
    assert (await ask(provider, {}, "/v1/models"))[0] == 405
    assert (await ask(provider, None, "/v1/embeddings"))[0] == 405


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages":[]}', b'{"model":1}', b"\xff"])
async def test_bad_bodies_answer_400(provider, body):
    status, _, raw = await ask(provider, body)
    assert (status, json.loads(raw)["error"]["type"]) == (400, "invalid_request_error")


async def test_not_http_is_refused_and_closed(provider):
    async with connected(provider) as client:
        client.writer.write(b"\x00\x01 nonsense\r\n\r\n")
        assert (await client.to_end()).startswith(b"HTTP/1.1 400 ")


async def test_only_the_api_key_is_let_in():
    async with StandInProvider(api_key="right") as provider:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
            status, _, raw = await ask(provider, chat(), **headers)
            assert (status, json.loads(raw)["error"]["code"]) == (401, "invalid_api_key")
        assert (await ask(provider, chat(), authorization="Bearer right"))[0] == 200


async def test_requests_are_recorded_and_bounded():
    async with StandInProvider(recorded=2) as provider:
        for word in ("one", "two", "three"):
            await ask(provider, chat(word), X_Request_Id=word)
        assert [request.headers["x-request-id"] for request in provider.requests] == [
            "two",
            "three",
        ]
        last = provider.requests[-1]
        assert (last.method, last.path) == ("POST", "/v1/chat/completions")
        assert json.loads(last.body)["messages"][0]["content"] == "three"
        assert provider.served == 3


async def test_scripts_come_from_everywhere_and_the_nearest_wins():
    default = script_from({"prompt_tokens": 1, "cached_tokens": 1, "reasoning_tokens": 1})
    async with StandInProvider(default_script=default) as provider:
        provider.script(cached_tokens=2, completion_tokens=2, reasoning_tokens=2)
        body = chat("[[standin completion_tokens=4]]") | {
            "model": "m[[standin reasoning_tokens=3;completion_tokens=3]]"
        }
        answer = await plain(provider, body, x_standin="finish_reason=queue")
        assert answer["model"] == "m"
        assert answer["choices"][0]["finish_reason"] == "queue"
        usage = answer["usage"]
        assert usage["prompt_tokens"] == 1
        assert usage["prompt_tokens_details"]["cached_tokens"] == 2
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 3
        assert usage["completion_tokens"] == 4
        assert (await plain(provider, chat()))["usage"]["completion_tokens"] != 2


async def test_directive_is_read_from_the_last_user_message_and_its_parts(provider):
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "[[standin status=503]]"}]
    assert (await ask(provider, chat(parts)))[0] == 503
    body = chat("[[standin status=503]]")
    body["messages"] += [{"role": "user", "content": "again, please"}]
    assert (await ask(provider, body))[0] == 200


async def test_queue_serves_as_many_requests_as_told(provider):
    provider.script(times=2, status=500)
    assert [(await ask(provider, chat()))[0] for _ in range(3)] == [500, 500, 200]


async def test_bad_scripts_are_named(provider):
    for text in ("bogus=1", "usage=odd", "chunks", "chunks=-1", "status=200", "chunks=99999999"):
        status, _, raw = await ask(provider, chat(), x_standin=text)
        error = json.loads(raw)["error"]
        assert (status, error["code"]) == (400, "standin_script"), text
        assert text.split("=")[0] in error["message"]
    with pytest.raises(ScriptError, match="bogus"):
        provider.script(bogus=1)
