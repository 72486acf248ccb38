"""Providers at their worst: refusals, faults before and within answers, the next target, pools."""

import asyncio
import json
from typing import Any

import pytest

from benchmarks.provider import script_from
from tests.proxy.ends import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    chat,
    chunked,
    delta,
    http,
    plain,
    request,
    sse,
    standin,
    usage,
    usage_chunk,
)
from tests.proxy.harness import INPUT_UCR, PROVIDER_KEY, Scene, Start, credits_of
from tests.waiting import eventually

# Before anything has gone to the client

REFUSALS = {
    400: (400, "bad_request"),
    413: (413, "bad_request"),
    422: (422, "bad_request"),
    401: (502, "provider_misconfigured"),
    402: (502, "provider_misconfigured"),
    403: (502, "provider_misconfigured"),
    404: (502, "provider_misconfigured"),
    405: (502, "provider_misconfigured"),
    429: (429, "provider_rate_limited"),
    408: (502, "provider_error"),
    409: (502, "provider_error"),
    418: (502, "provider_error"),
    500: (502, "provider_error"),
    503: (502, "provider_error"),
    529: (502, "provider_error"),
}
FAULTS = {
    "garbage": (502, "provider_bad_response"),
    "html": (502, "provider_bad_response"),
    "garbage_json": (502, "provider_bad_response"),
    "reset_before_head": (502, "provider_broke_off"),
    "hang_before_head": (504, "provider_timeout"),
}
PLAIN_FAULTS = {
    "truncated_body": (502, "provider_broke_off"),
    "reset_mid_stream": (502, "provider_broke_off"),
    "eof_mid_stream": (502, "provider_broke_off"),
    "hang_mid_stream": (504, "provider_timeout"),
}
IMPATIENT = {"first_byte_timeout_seconds": 0.15, "chunk_timeout_seconds": 0.15}
EITHER = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


async def failed(scene: Scene, stream: bool, **script: Any) -> tuple[int, str]:
    """What the client is told when its provider fails; nothing may be charged or counted."""
    key = scene.seeds.key(requests_per_minute=1, tokens_per_minute=5000, tokens_per_day=5000)
    answer = await scene.ask(key, chat(standin(**script), stream=stream))
    assert answer.headers["x-request-id"] == answer.error["request_id"]
    assert "x-credits-used" not in answer.headers
    for secret in (PROVIDER_KEY, str(scene.main.port), "127.0.0.1"):
        assert secret not in answer.body.decode() + str(answer.headers)
    (event,) = await scene.events(key)
    assert (event.settlement, event.outcome) == ("void", "provider_failed")
    assert (event.charge_ucr, event.status) == (0, answer.status)
    counters = scene.seeds.counters(key)
    assert counters.spent_ucr == counters.day_tokens == 0
    assert (await scene.ask(key, chat())).status == 200  # its one request a minute is still there
    return answer.refused


@EITHER
async def test_refusals_of_a_provider_are_translated(proxy: Scene, stream: bool) -> None:
    for status, wanted in REFUSALS.items():
        assert await failed(proxy, stream, status=status) == wanted, status


@EITHER
@pytest.mark.parametrize("fault", FAULTS)
async def test_no_answer_is_translated(start: Start, fault: str, stream: bool) -> None:
    scene = await start(**IMPATIENT)
    assert await failed(scene, stream, fault=fault) == FAULTS[fault]


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
async def test_half_a_plain_answer_is_none(start: Start, fault: str) -> None:
    scene = await start(**IMPATIENT)
    assert await failed(scene, False, fault=fault) == PLAIN_FAULTS[fault]
    if fault == "truncated_body":
        assert await failed(scene, False, fault=fault, encoding="chunked") == PLAIN_FAULTS[fault]


@EITHER
async def test_a_provider_that_cannot_be_reached(proxy: Scene, stream: bool) -> None:
    key = proxy.seeds.key()
    answer = await proxy.ask(key, chat(model="dead", stream=stream))
    assert answer.refused == (502, "provider_unreachable")
    (event,) = await proxy.events(key)
    assert (event.settlement, event.charge_ucr) == ("void", 0)


@pytest.mark.parametrize(("given", "told"), [(7, "7"), (0, "1"), (100_000, None), (None, None)])
async def test_a_providers_retry_after_is_passed_on(
    proxy: Scene, given: int | None, told: str | None
) -> None:
    key = proxy.seeds.key()
    script = {"status": 429} | ({} if given is None else {"retry_after": given})
    answer = await proxy.ask(key, chat(standin(**script)))
    assert answer.headers.get("retry-after") == told


@EITHER
@pytest.mark.parametrize("status", [400, 401, 500])
async def test_neither_key_nor_address_of_a_provider_is_told(
    proxy: Scene, status: int, stream: bool
) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw", stream=stream))
    upstream = await proxy.raw.call()
    await upstream.hears()
    address = f"127.0.0.1:{proxy.raw.port}"
    message = f"Bad key {PROVIDER_KEY} (…{PROVIDER_KEY[-4:]}) at http://{address}/v1"
    error = {"message": message, "type": "x", "code": "odd", "param": "model"}
    upstream >> http(status, json.dumps({"error": error}).encode(), x_secret=PROVIDER_KEY)
    answer = await client.answer()
    told = answer.body.decode() + str(answer.headers)
    for secret in (PROVIDER_KEY, PROVIDER_KEY[-4:], "127.0.0.1", str(proxy.raw.port)):
        assert secret not in told
    assert (answer.error["code"] == "odd") == (status == 400)


async def test_an_error_in_a_200_is_an_error(proxy: Scene) -> None:
    """The first event of a stream: a status can still be sent."""
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw", stream=True))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> STREAM_HEAD + sse({"error": {"message": f"Overloaded {PROVIDER_KEY}"}})
    answer = await client.answer()
    assert answer.refused == (502, "provider_error")
    assert PROVIDER_KEY not in answer.body.decode()
    (event,) = await proxy.events(key)
    assert event.charge_ucr == 0


async def test_an_answer_beyond_the_limit_is_refused(start: Start) -> None:
    scene = await start(answer_limit_bytes=10_000)
    wanted = (502, "provider_bad_response")
    assert await failed(scene, False, answer_bytes=20_000, obey_max=0) == wanted


async def test_an_encoded_answer_is_refused(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> http(200, b"\x1f\x8b", content_encoding="gzip")
    assert (await client.answer()).refused == (502, "provider_bad_response")


# The next target


@EITHER
@pytest.mark.parametrize(
    "script",
    [{"status": status} for status in (401, 404, 429, 500)] + [{"fault": f} for f in FAULTS],
    ids=str,
)
async def test_the_second_target_serves_when_the_first_fails(
    start: Start, script: dict[str, Any], stream: bool
) -> None:
    scene = await start(**IMPATIENT)
    key = scene.seeds.key()
    scene.main.script(**script)
    answer = await scene.ask(key, chat(model="pair", stream=stream))
    assert answer.status == 200
    assert answer.headers["x-model-used"] == "pair-spare"
    assert answer.headers["x-fallback-from"] == "pair-main"
    assert json.loads(scene.spare.requests[-1].body)["model"] == "pair-spare"
    ids = {one.headers["x-request-id"] for one in (*scene.main.requests, *scene.spare.requests)}
    assert ids == {answer.headers["x-request-id"]}
    (event,) = await scene.events(key)
    assert (event.fallback_depth, event.served_by) == (1, "spare/pair-spare")
    assert event.charge_ucr == credits_of(answer) > 0


async def test_a_refused_connection_falls_back_too(proxy: Scene) -> None:
    answer = await proxy.ask(proxy.seeds.key(), chat(model="dead-pair"))
    assert (answer.status, answer.headers["x-fallback-from"]) == (200, "gone")


async def test_what_the_client_did_wrong_is_not_tried_elsewhere(proxy: Scene) -> None:
    key = proxy.seeds.key()
    proxy.main.script(status=400)
    answer = await proxy.ask(key, chat(model="pair"))
    assert answer.status == 400 and "x-fallback-from" not in answer.headers
    assert not proxy.spare.requests


async def test_when_all_targets_fail_nothing_is_charged(proxy: Scene) -> None:
    key = proxy.seeds.key()
    proxy.main.script(status=500)
    proxy.spare.script(status=429, retry_after=9)
    answer = await proxy.ask(key, chat(model="pair"))
    assert answer.status in (429, 502)
    (event,) = await proxy.events(key)
    assert (event.charge_ucr, event.settlement, event.fallback_depth) == (0, "void", 1)


async def test_without_a_fallback_none_is_told(proxy: Scene) -> None:
    answer = await proxy.ask(proxy.seeds.key(), chat(model="pair"))
    assert answer.headers["x-model-used"] == "pair-main"
    assert "x-fallback-from" not in answer.headers


async def test_once_a_byte_has_gone_out_there_is_no_second_target(proxy: Scene) -> None:
    key = proxy.seeds.key()
    proxy.main.script(fault="reset_mid_stream")
    answer = await proxy.ask(key, chat(model="pair", stream=True))
    assert answer.events[-1]["error"]["code"] == "provider_broke_off"
    assert not proxy.spare.requests


# Within a stream

MID_STREAM = {
    "reset_mid_stream": "provider_broke_off",
    "eof_mid_stream": "provider_broke_off",
    "end_mid_stream": "provider_error",
    "error_event": "provider_error",
    "hang_mid_stream": "provider_timeout",
    "oversized_line": "provider_bad_response",
}


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("fault", MID_STREAM)
async def test_a_broken_stream_ends_with_an_error_and_a_bill(
    start: Start, fault: str, asked: bool
) -> None:
    scene = await start(event_limit_bytes=65_536, **IMPATIENT)
    key, client = scene.seeds.key(), await scene.client()
    script = standin(fault=fault, fault_after=3, chunks=6, chunk_bytes=8)
    more = {"stream_options": {"include_usage": True}} if asked else {}
    client >> request(key.secret, chat(script, stream=True, **more))
    answer = await client.answer()  # a well-formed end of the HTTP body
    *content, last = answer.events
    assert len(content) == 4 and not any("error" in chunk for chunk in content)
    assert last["error"]["code"] == MID_STREAM[fault]
    assert set(last["error"]) >= {"message", "type", "param", "code"}
    assert "Nothing was charged" not in last["error"]["message"]
    assert [choice["finish_reason"] for choice in last["choices"]] == ["error"]
    for field in ("id", "object", "created", "model"):
        assert last[field] == content[0][field]
    (event,) = await scene.events(key)
    assert (event.settlement, event.outcome) == ("estimated", "provider_failed")
    assert 0 < event.charge_ucr == credits_of(answer) <= event.hold_ucr
    assert event.tokens.input == -(-event.request_bytes // 4)
    assert 3 <= event.tokens.output <= 16  # 24 bytes in three chunks, and the role's
    assert last["usage"]["completion_tokens"] == event.tokens.output
    client >> request(key.secret, chat())  # the connection goes on
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("shape", ["as_asked", "missing"])
async def test_an_end_without_done_after_the_finish_is_an_end(proxy: Scene, shape: str) -> None:
    key = proxy.seeds.key()
    script = standin(fault="eof_without_done", usage=shape)
    answer = await proxy.ask(key, chat(script, stream=True))
    assert answer.events[-1] == "[DONE]"
    (event,) = await proxy.events(key)
    assert event.settlement == ("exact" if shape == "as_asked" else "estimated")
    assert event.charge_ucr == credits_of(answer) > 0


async def test_usage_seen_before_the_break_is_the_bill(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw", stream=True))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> STREAM_HEAD + sse(delta("Hi", usage=usage(11, 1)))
    await client.status()
    await client.event()
    upstream.reset()
    last = await client.event()
    assert last["error"]["code"] == "provider_broke_off"
    (event,) = await proxy.events(key)
    assert (event.settlement, event.tokens.input) == ("exact", 11)
    assert event.charge_ucr == 11 * INPUT_UCR + 60


async def test_a_stream_beyond_its_total_time_is_cut_in_order(start: Start) -> None:
    scene = await start(total_timeout_seconds=0.2)
    key = scene.seeds.key()
    answer = await scene.ask(key, chat(standin(chunk_delay_ms=20, chunks=90), stream=True))
    assert answer.events[-1]["error"]["code"] == "provider_timeout"
    (event,) = await scene.events(key)
    assert event.charge_ucr == credits_of(answer) > 0


async def test_a_slow_stream_within_its_time_outs_is_left_alone(start: Start) -> None:
    scene = await start(**IMPATIENT)
    key = scene.seeds.key()
    answer = await scene.ask(key, chat(standin(chunk_delay_ms=30, chunks=10), stream=True))
    assert answer.events[-1] == "[DONE]"


# Connections


async def test_one_connection_serves_many_requests(proxy: Scene) -> None:
    key = proxy.seeds.key()
    for number in range(6):
        assert (await proxy.ask(key, chat(stream=number % 2 == 0))).status == 200
    assert proxy.main.open_connections == 1


@pytest.mark.parametrize(
    "after",
    [b"junk", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b"HTTP/1.1 200 OK\r\ncont"],
    ids=["junk", "answer", "half"],
)
async def test_a_connection_that_says_too_much_is_not_used_again(
    proxy: Scene, after: bytes
) -> None:
    """What comes after an answer must never be taken for the next client's answer."""
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await proxy.raw.call()
    await upstream.hears()
    said = plain("first", usage(1, 1))
    upstream >> said + after
    assert (await client.answer()).body == said.partition(b"\r\n\r\n")[2]
    client >> request(key.secret, chat(model="raw"))
    second = await proxy.raw.call()
    await second.hears()
    second >> plain("second", usage(1, 1))
    assert b"second" in (await client.answer()).body
    assert await upstream.left()


@pytest.mark.parametrize("how", ["close header", "until close", "HTTP/1.0"])
async def test_a_connection_that_is_to_close_is_not_used_again(proxy: Scene, how: str) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    body = plain("x", usage(1, 1)).partition(b"\r\n\r\n")[2]
    for _ in range(2):
        client >> request(key.secret, chat(model="raw"))
        upstream = await proxy.raw.call()
        await upstream.hears()
        if how == "close header":
            upstream >> http(200, body, connection="close")
        elif how == "HTTP/1.0":
            upstream >> http(200, body).replace(b"HTTP/1.1", b"HTTP/1.0")
        else:
            upstream >> b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n" + body
            upstream.close()
        assert (await client.answer()).body == body


async def test_a_stale_connection_is_tried_anew_once(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    ask = request(key.secret, chat(model="raw"))
    client >> ask
    pooled = await proxy.raw.call()
    await pooled.hears()
    pooled >> plain("one", usage(1, 1))
    assert (await client.answer()).status == 200

    client >> ask
    await pooled.hears()  # sent on the pooled connection, which the provider then drops
    pooled.reset()
    fresh = await proxy.raw.call()
    await fresh.hears()
    fresh >> plain("two", usage(1, 1))
    assert b"two" in (await client.answer()).body

    client >> ask
    await fresh.hears()
    fresh.reset()
    last = await proxy.raw.call()
    await last.hears()
    last.reset()  # not stale but broken: no third time
    assert (await client.answer()).refused == (502, "provider_broke_off")
    assert proxy.raw.calls == 3
    assert [event.status for event in await proxy.events(key)] == [200, 200, 502]


async def test_a_fresh_connection_is_not_tried_twice(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream.reset()
    assert (await client.answer()).refused == (502, "provider_broke_off")
    assert proxy.raw.calls == 1


async def test_once_answered_a_pooled_connection_is_not_tried_anew(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> plain("one", usage(1, 1))
    assert (await client.answer()).status == 200
    client >> request(key.secret, chat(model="raw"))
    await upstream.hears()
    upstream >> b"HTTP/1.1 200 OK\r\n"
    await upstream.flushed()
    await eventually(lambda: _heard(proxy))
    upstream.reset()
    assert (await client.answer()).refused == (502, "provider_broke_off")
    assert proxy.raw.calls == 1


def _heard(proxy: Scene) -> bool:
    return all(exchange._relay._connection.heard for exchange in proxy.services.exchanges)


async def test_connections_to_a_provider_are_bounded(start: Start) -> None:
    scene = await start(upstream_connections=2, upstream_waiting=6)
    key = scene.seeds.key()
    body = chat(standin(delay_ms=20))
    answers = await asyncio.gather(*[scene.ask(key, body) for _ in range(8)])
    assert [answer.status for answer in answers] == [200] * 8
    assert scene.main.open_connections == 2


async def test_beyond_the_waiting_ones_it_is_503(start: Start) -> None:
    scene = await start(upstream_connections=1, upstream_waiting=1)
    key = scene.seeds.key()
    body = chat(standin(delay_ms=100))
    answers = await asyncio.gather(*[scene.ask(key, body) for _ in range(5)])
    statuses = sorted(answer.status for answer in answers)
    assert statuses == [200, 200, 503, 503, 503]
    assert len([event for event in await scene.events(key) if event.charge_ucr]) == 2


async def test_idle_connections_are_closed(start: Start) -> None:
    scene = await start(upstream_idle_seconds=0.1)
    assert (await scene.ask(scene.seeds.key(), chat())).status == 200
    await scene.main.wait_until(lambda: scene.main.open_connections == 0)


async def test_a_connection_closed_while_idle_is_noticed(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> plain("one", usage(1, 1))
    assert (await client.answer()).status == 200
    upstream.close()
    assert await upstream.left()
    client >> request(key.secret, chat(model="raw"))
    second = await proxy.raw.call()
    await second.hears()
    second >> plain("two", usage(1, 1))
    assert (await client.answer()).status == 200


# Pace


async def test_a_reader_that_never_reads_costs_a_bounded_buffer(start: Start) -> None:
    scene = await start(write_buffer_bytes=65_536, stalled_client_seconds=1.0)
    key, client = scene.seeds.key(), await scene.client()
    client.writer.transport.pause_reading()
    scene.main.default_script = script_from(
        {"chunks": 100_000, "chunk_bytes": 1000, "coalesce": True, "obey_max": False}
    )
    client >> request(key.secret, chat(model="vast", max_tokens=None, stream=True))
    await eventually(lambda: any(one._blocked for one in scene.main._connections))
    (door,) = scene.services.connections
    assert door._transport.get_write_buffer_size() < 65_536 + 300_000
    assert scene.main.aborted == 0
    await scene.main.wait_until(lambda: scene.main.aborted == 1)  # given up after its second
    (event,) = await scene.events(key)
    assert (event.outcome, event.settlement) == ("client_left", "estimated")
    assert 0 < event.charge_ucr <= event.hold_ucr
    assert event.answer_bytes < 20_000_000


async def test_what_has_come_at_once_is_not_all_taken_at_once(start: Start) -> None:
    """A provider's bytes wait in its socket, not here, while the client reads nothing."""
    scene = await start(write_buffer_bytes=300_000)
    key, client = scene.seeds.key(), await scene.client()
    client.writer.transport.pause_reading()
    client >> request(key.secret, chat(model="raw-vast", max_tokens=None, stream=True))
    upstream = await scene.raw.call()
    await upstream.hears()
    event = b"data: %b\n\n" % json.dumps(delta("x" * 10_000)).encode()
    most = 0

    def paused() -> bool:
        nonlocal most
        (door,) = scene.services.connections
        waiting = sum(map(len, door._outgoing)) + door._transport.get_write_buffer_size()
        most = max(most, waiting)
        return bool(door._paused_at)

    upstream >> STREAM_HEAD + chunked(event) * 3000
    await eventually(paused)
    assert paused() and 0 < most <= 300_000
    client.writer.transport.resume_reading()
    upstream >> sse(usage_chunk(1, 1)) + DONE + STREAM_END
    answer = await client.answer()
    assert len(answer.events) == 3000 + 2 and answer.events[-1] == "[DONE]"


async def test_a_reader_that_pauses_misses_nothing(start: Start) -> None:
    scene = await start(write_buffer_bytes=65_536, chunk_timeout_seconds=0.2)
    key, client = scene.seeds.key(), await scene.client()
    client.writer.transport.pause_reading()
    script = standin(chunks=20_000, chunk_bytes=1000, coalesce=1, obey_max=0)
    client >> request(key.secret, chat(script, model="vast", max_tokens=None, stream=True))
    await eventually(lambda: any(one._blocked for one in scene.main._connections))
    client.writer.transport.resume_reading()
    answer = await client.answer()
    assert len(answer.events) == 20_000 + 4 and answer.events[-1] == "[DONE]"


async def test_a_connection_returned_under_a_slow_reader_still_listens(start: Start) -> None:
    """The end of an answer that filled the client's buffer must not leave the pool deaf."""
    scene = await start(write_buffer_bytes=4096)
    key, slow, other = scene.seeds.key(), await scene.client(), await scene.client()
    slow.writer.transport.pause_reading()
    slow >> request(key.secret, chat(model="raw", stream=True))
    upstream = await scene.raw.call()
    await upstream.hears()
    big = chunked(b"data: %b\n\n" % json.dumps(delta("x" * 7_900_000)).encode())
    upstream >> STREAM_HEAD + big + sse(usage_chunk(1, 1)) + DONE + STREAM_END
    await eventually(lambda: not scene.services.exchanges)
    other >> request(key.secret, chat(model="raw"))
    await upstream.hears()
    upstream >> plain("heard", usage(1, 1))
    assert b"heard" in (await other.answer()).body
    slow.writer.transport.resume_reading()
    assert (await slow.answer()).events[-1] == "[DONE]"
