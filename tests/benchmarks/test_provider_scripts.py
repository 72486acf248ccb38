"""Each script field does on the wire what its table says."""

import asyncio
import json
import time

import pytest

from benchmarks.provider.answers import (
    CONSTANT_ID,
    DEFAULT_TEXT,
    JUNK_ID,
    MULTIBYTE_TEXT,
    OVERSIZED_LINE_BYTES,
)
from tests.benchmarks.raw_client import chat, connected, events, streamed, text_of

ASKED = {"stream_options": {"include_usage": True}}


async def wire(provider, script, body=None) -> bytes:
    """The body bytes of a stream under `script`, chunked encoding taken off."""
    async with connected(provider) as client:
        await client.send(body or streamed(), x_standin=script)
        return (await client.answer())[2]


async def stream(provider, script, **fields) -> list:
    return events(await wire(provider, script, streamed(**fields)))


async def plain(provider, script) -> dict:
    return json.loads(await wire(provider, script, chat()))


async def test_sizes(provider):
    chunks = await stream(provider, "chunks=5;chunk_bytes=33")
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks[1:-2]]
    assert [len(content) for content in contents] == [33] * 5
    assert len(text_of(await stream(provider, "chunks=100"))) > len(DEFAULT_TEXT)
    assert len(await stream(provider, "chunks=0")) == 3
    answer = await plain(provider, "answer_bytes=5000")
    assert len(answer["choices"][0]["message"]["content"]) == 5000


async def test_reported_tokens(provider):
    script = "prompt_tokens=11;completion_tokens=22;cached_tokens=3;reasoning_tokens=4"
    for usage in (
        (await plain(provider, script))["usage"],
        (await stream(provider, script, **ASKED))[-2]["usage"],
    ):
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 22)
        assert usage["total_tokens"] == 33
        assert usage["prompt_tokens_details"]["cached_tokens"] == 3
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 4


async def test_usage_shapes_of_plain_answers(provider):
    assert "usage" not in await plain(provider, "usage=missing")
    assert (await plain(provider, "usage=null"))["usage"] is None
    assert (await plain(provider, "usage=zero"))["usage"]["total_tokens"] == 0
    assert (await plain(provider, "usage=normal"))["usage"]["total_tokens"] > 0


async def test_usage_normal_is_sent_though_not_asked_for(provider):
    *_, usage, done = await stream(provider, "usage=normal")
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["total_tokens"] > 0


async def test_usage_missing_zero_null_in_streams(provider):
    chunks = await stream(provider, "usage=missing", **ASKED)
    assert all(chunk["choices"] for chunk in chunks[:-1])
    zero = (await stream(provider, "usage=zero", **ASKED))[-2]
    assert (zero["choices"], zero["usage"]["total_tokens"]) == ([], 0)
    null = (await stream(provider, "usage=null", **ASKED))[-2]
    assert (null["choices"], null["usage"]) == ([], None)


async def test_usage_in_the_last_chunk_with_a_choice(provider):
    *_, finish, done = await stream(provider, "usage=in_last_content_chunk", **ASKED)
    assert done == "[DONE]"
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["usage"]["completion_tokens"] > 0


async def test_usage_in_every_chunk_grows(provider):
    chunks = await stream(provider, "usage=every_chunk;chunks=4;chunk_bytes=8")
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[1:-1]]
    assert counts == [2, 4, 6, 8, 8, 8]


async def test_usage_after_done(provider):
    *_, finish, done, late = await stream(provider, "usage=late_after_done")
    assert (finish["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")
    assert (late["choices"], late["usage"]["total_tokens"] > 0) == ([], True)


async def test_ids(provider):
    expected = {"null": None, "constant": CONSTANT_ID, "junk": JUNK_ID}
    for shape, value in expected.items():
        assert (await plain(provider, f"id={shape}"))["id"] == value
        chunks = await stream(provider, f"id={shape}")
        assert {chunk["id"] for chunk in chunks[:-1]} == {value}
    assert "id" not in await plain(provider, "id=missing")
    assert not any("id" in chunk for chunk in (await stream(provider, "id=missing"))[:-1])


async def test_finish_reason(provider):
    answer = await plain(provider, "finish_reason=content_filter")
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    chunks = await stream(provider, "finish_reason=tool_calls")
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("status", [400, 401, 404, 418, 429, 500, 503, 529])
async def test_statuses(provider, status):
    async with connected(provider) as client:
        for body in (chat(), streamed()):
            await client.send(body, x_standin=f"status={status};retry_after=7")
            got, headers, raw = await client.answer()
            assert (got, headers["retry-after"]) == (status, "7")
            assert headers["content-type"] == "application/json"
            assert set(json.loads(raw)["error"]) == {"message", "type", "param", "code"}


async def test_delays_happen_in_their_places(provider):
    started = time.monotonic()
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="delay_ms=30;first_chunk_delay_ms=20;chunks=1")
        await client.head()
        head_after = time.monotonic() - started
        assert client.buffer == b""
        await client.until(b"role")
        first_after = time.monotonic() - started
    assert head_after >= 0.03
    assert first_after >= 0.05


async def test_chunks_keep_their_schedule(provider):
    started = time.monotonic()
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="chunk_delay_ms=10;chunks=5")
        _, _, raw = await client.answer()
    assert time.monotonic() - started >= 6 * 0.01
    assert len(events(raw)) == 5 + 3
    assert len(client.reads) >= 6


async def test_plain_delay(provider):
    started = time.monotonic()
    await plain(provider, "delay_ms=25")
    assert time.monotonic() - started >= 0.025


@pytest.mark.parametrize("encoding", ["chunked", "content_length", "close"])
async def test_encodings_of_plain_answers(provider, encoding):
    async with connected(provider) as client:
        await client.send(chat(), x_standin=f"encoding={encoding}")
        _, headers, raw = await client.answer()
        assert ("transfer-encoding" in headers) == (encoding == "chunked")
        assert ("content-length" in headers) == (encoding == "content_length")
        assert json.loads(raw)["usage"]
        if encoding == "close":
            assert client.reader.at_eof()


async def test_stream_that_ends_by_closing(provider):
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="encoding=close")
        _, headers, raw = await client.answer()
    assert "transfer-encoding" not in headers
    assert events(raw)[-1] == "[DONE]"


async def test_crlf(provider):
    raw = await wire(provider, "crlf=1")
    assert raw.count(b"\r\n\r\n") == raw.count(b"data: ")
    assert raw.count(b"\n") == raw.count(b"\r\n")


async def test_no_space(provider):
    raw = await wire(provider, "no_space=1")
    assert b"data: " not in raw
    assert raw.startswith(b"data:{")
    assert raw.endswith(b"data:[DONE]\n\n")


async def test_comments(provider):
    raw = await wire(provider, "comments=1;chunks=2")
    assert raw.count(b": ping\n\ndata: ") == raw.count(b"data: ") == 5


async def test_split_utf8_cuts_inside_characters(provider):
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="split_utf8=1;chunks=6;chunk_delay_ms=5")
        _, _, raw = await client.answer()
    assert MULTIBYTE_TEXT.startswith(text_of(events(raw)).rstrip())
    cuts = [block.removesuffix(b"\r\n")[-1] >= 0xC0 for block in client.reads]
    assert any(cuts)


async def test_split_events_cuts_them_at_seeded_offsets(provider):
    async def blocks(seed):
        async with connected(provider) as client:
            script = f"split_events=1;seed={seed};chunks=4;chunk_delay_ms=5;id=constant"
            await client.send(streamed(), x_standin=script)
            _, _, raw = await client.answer()
            assert text_of(events(raw))
            return len(client.reads)

    assert await blocks(3) > 7


async def test_coalesce_gathers_events(provider):
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="coalesce=1;chunks=12;chunk_delay_ms=1")
        await client.head()
        first = await client.take(int(await client.until(b"\r\n"), 16))
        assert first.count(b"\n\n") == 8
        await client.take(2)
        assert len(events(first + await client.chunked())) == 12 + 3


async def test_stamp_is_the_clock_at_the_write(provider):
    before = time.monotonic_ns()
    chunks = await stream(provider, "stamp=1;chunks=3;chunk_bytes=40;chunk_delay_ms=5")
    contents = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:4]]
    stamps = [int(content[1:20]) for content in contents]
    assert [len(content) for content in contents] == [40] * 3
    assert before < stamps[0] < stamps[1] < stamps[2] < time.monotonic_ns()


@pytest.mark.parametrize("body", [chat(), streamed()])
async def test_reset_before_head(provider, body):
    async with connected(provider) as client:
        await client.send(body, x_standin="fault=reset_before_head")
        with pytest.raises(ConnectionResetError):
            await client.to_end()
    assert client.buffer == b""


@pytest.mark.parametrize("body", [chat(), streamed()])
async def test_reset_mid_stream(provider, body):
    async with connected(provider) as client:
        await client.send(body, x_standin="fault=reset_mid_stream;chunks=6;chunk_bytes=9")
        with pytest.raises(ConnectionResetError):
            await client.to_end()
    assert b"[DONE]" not in client.buffer
    if body == streamed():
        assert client.buffer.count(b"data: ") == 1 + 3


async def test_eof_mid_stream_leaves_out_the_last_http_chunk(provider):
    async with connected(provider) as client:
        await client.send(streamed(), x_standin="fault=eof_mid_stream;chunks=6;fault_after=2")
        raw = await client.to_end()
    assert raw.count(b"data: ") == 1 + 2
    assert not raw.endswith(b"0\r\n\r\n")
    async with connected(provider) as client:
        await client.send(chat(), x_standin="fault=eof_mid_stream")
        with pytest.raises(EOFError):
            await client.answer()


async def test_end_mid_stream_is_well_formed_http(provider):
    chunks = await stream(provider, "fault=end_mid_stream;chunks=4;fault_after=1")
    assert len(chunks) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] is None


async def test_eof_without_done(provider):
    chunks = await stream(provider, "fault=eof_without_done", **ASKED)
    assert chunks[-1]["choices"] == []
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


async def test_error_event_in_a_200(provider):
    chunks = await stream(provider, "fault=error_event;chunks=4")
    assert len(chunks) == 1 + 2 + 1
    assert chunks[-1]["error"]["type"] == "server_error"
    assert (await plain(provider, "fault=error_event"))["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    ("fault", "body", "parts"),
    [
        ("hang_before_head", chat(), 0),
        ("hang_before_head", streamed(), 0),
        ("hang_mid_stream", streamed(), 3),
    ],
)
async def test_hangs_last_until_the_client_leaves(provider, fault, body, parts):
    async with connected(provider) as client:
        await client.send(body, x_standin=f"fault={fault};chunks=4")
        if parts:
            while client.buffer.count(b"data: ") < parts:
                await client.more()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await client.more()
        assert (provider.aborted, provider.open_connections) == (0, 1)
    await provider.wait_until(lambda: provider.aborted == 1)
    assert provider.open_connections == 0


async def test_garbage_is_not_http(provider):
    async with connected(provider) as client:
        await client.send(chat(), x_standin="fault=garbage")
        assert not (await client.to_end()).startswith(b"HTTP/")


async def test_garbage_json(provider):
    async with connected(provider) as client:
        await client.send(chat(), x_standin="fault=garbage_json")
        status, headers, raw = await client.answer()
    assert (status, headers["content-type"]) == (200, "application/json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(raw)


@pytest.mark.parametrize("body", [chat(), streamed()])
async def test_html(provider, body):
    async with connected(provider) as client:
        await client.send(body, x_standin="fault=html")
        status, headers, raw = await client.answer()
    assert (status, headers["content-type"]) == (200, "text/html")
    assert raw.startswith(b"<!DOCTYPE html>")


async def test_oversized_line_and_the_stream_goes_on(provider):
    chunks = await stream(provider, "fault=oversized_line;chunks=2;chunk_bytes=5")
    sizes = [len(chunk["choices"][0]["delta"].get("content", "")) for chunk in chunks[1:-1]]
    assert sizes == [5, OVERSIZED_LINE_BYTES, 5, 0]
    assert chunks[-1] == "[DONE]"


@pytest.mark.parametrize("body", [chat(), streamed()])
async def test_truncated_body(provider, body):
    async with connected(provider) as client:
        await client.send(body, x_standin="fault=truncated_body")
        _, headers = await client.head()
        raw = await client.to_end()
    assert 0 < len(raw) < int(headers["content-length"])
