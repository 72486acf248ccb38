"""The load client counts exactly what a server did, good and bad."""

import asyncio
from array import array
from decimal import Decimal

import pytest

from benchmarks.load import Load, run_plain, run_streams
from benchmarks.load_connection import credits_in, percentiles
from benchmarks.load_request import Ask, Target, target_for
from benchmarks.provider import StandInProvider


def target(provider: StandInProvider, script: str = "", stream: bool = False) -> Target:
    content = f"hi [[standin {script}]]" if script else "hi"
    body = {"model": "m", "stream": stream, "messages": [{"role": "user", "content": content}]}
    return target_for(provider.base_url, body, key="k", headers={"x-extra": "1"})


async def test_plain_count(provider):
    result = await run_plain(target(provider), concurrency=4, count=50)
    assert (result.requests, result.requests_total, result.errors) == (50, 50, {})
    assert provider.served == 50
    assert result.latency_ms.count == result.first_chunk_ms.count == 50
    assert provider.requests[0].headers["authorization"] == "Bearer k"
    assert provider.requests[0].headers["x-extra"] == "1"
    await provider.wait_until(lambda: provider.open_connections == 0)
    assert provider.aborted == 0


async def test_fewer_requests_than_connections(provider):
    result = await run_plain(target(provider), concurrency=8, count=3)
    assert (result.requests, provider.served) == (3, 3)


async def test_streams_count_every_chunk(provider):
    result = await run_streams(target(provider, "chunks=7", True), concurrency=3, count=9)
    assert (result.requests, result.chunks, result.errors) == (9, 9 * (7 + 3), {})
    assert result.chunk_age_ms is None


async def test_stamped_chunks_have_an_age(provider):
    result = await run_streams(target(provider, "stamp=1;chunks=6", True), concurrency=2, count=4)
    assert result.chunk_age_ms.count == 24
    assert 0 <= result.chunk_age_ms.p50 <= result.chunk_age_ms.max


async def test_duration_measures_a_window_and_lets_streams_end(provider):
    edges = []
    load = Load(
        target(provider, "chunks=30;chunk_delay_ms=2", True),
        streamed=True,
        concurrency=5,
        duration_seconds=0.05,
        opening_seconds=0.01,
        steady=True,
        at_edges=lambda: edges.append(load.chunks),
    )
    result = await load.run()
    assert result.chunks == edges[1] - edges[0] > 0
    assert result.requests_total >= 5
    assert (load.errors, provider.aborted) == ({}, 0)


async def test_open_loop_counts_from_when_a_request_was_due(provider):
    slow = target(provider, "delay_ms=10")
    result = await run_plain(slow, concurrency=1, count=5, rate_per_second=1000)
    assert (result.requests, provider.served, result.errors) == (5, 5, {})
    # All five are due within 4 ms and one connection serves them: the last waits for four.
    assert result.latency_ms.max > 4 * 10


@pytest.mark.parametrize(
    ("script", "stream", "error"),
    [
        ("status=429", False, "status 429"),
        ("status=500", True, "status 500"),
        ("fault=reset_before_head", False, "cut before its head"),
        ("fault=truncated_body", False, "cut after its head"),
        ("fault=eof_mid_stream", True, "cut after its head"),
        ("fault=garbage", False, "not HTTP"),
        ("fault=error_event", True, "error event"),
        ("fault=eof_without_done", True, "no [DONE]"),
    ],
)
async def test_errors_have_names(provider, script, stream, error):
    load = Load(target(provider, script, stream), streamed=stream, concurrency=2, count=6)
    result = await load.run()
    assert (result.requests, result.errors) == (0, {error: 6})


async def test_a_server_that_is_gone_is_counted_not_waited_for():
    async with StandInProvider() as provider:
        aim = target(provider, "delay_ms=1")
        load = Load(aim, concurrency=2, count=20)
        running = asyncio.create_task(load.run())
        await provider.wait_until(lambda: provider.served >= 2)
    result = await running
    assert result.requests + sum(result.errors.values()) == 20
    assert any(error.startswith("connect") for error in result.errors)


async def test_standing_still_is_an_error(provider):
    load = Load(
        target(provider, "fault=hang_before_head"), concurrency=1, count=1, limit_seconds=0.05
    )
    with pytest.raises(TimeoutError, match="stands still"):
        await load.run()
    await provider.wait_until(lambda: provider.open_connections == 0)
    assert provider.aborted == 1


async def answers(reader, writer, answer: bytes) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        await reader.readexactly(2)
        writer.write(answer)


async def serve(answer: bytes):
    async def conversation(reader, writer):
        try:
            await answers(reader, writer, answer)
        except asyncio.IncompleteReadError:
            writer.close()

    return await asyncio.start_server(conversation, "127.0.0.1", 0)


def fixed_target(server: asyncio.Server) -> Target:
    return target_for(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", {})


async def test_credits_of_plain_answers_are_summed_exactly():
    async with await serve(
        b"HTTP/1.1 200 OK\r\nX-Credits-Used: 0.10000001\r\ncontent-length: 0\r\n\r\n"
    ) as server:
        result = await run_plain(fixed_target(server), concurrency=2, count=3)
    assert result.credits_total == Decimal("0.30000003")


async def test_credits_of_streams_come_from_the_last_event():
    body = (
        b'data: {"choices":[{"delta":{"content":"\\"credits_used\\":9"}}]}\n\n'
        b'data: {"choices":[],"usage":{},"credits_used":0.00000001}\n\ndata: [DONE]\n\n'
    )
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with await serve(head + body) as server:
        result = await run_streams(fixed_target(server), concurrency=1, count=3)
    assert (result.requests, result.credits_total) == (3, Decimal("0.00000003"))


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'"credits_used":1.5}', b"1.5"),
        (b'"credits_used": "0.25"}', b"0.25"),
        (b'"credits_used":1,"credits_used":1e-8}', b"1e-8"),
        (b'"credits_used":null}', None),
        (b"nothing", None),
    ],
)
def test_credits_in(tail, expected):
    assert credits_in(tail) == expected


def test_percentiles():
    assert percentiles(array("q")) is None
    found = percentiles(array("q", range(1_000_000, 101_000_000, 1_000_000)))
    assert (found.count, found.p50, found.p99, found.max) == (100, 50.0, 99.0, 100.0)


async def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="http"):
        target_for("https://example.org/v1", {})
    with pytest.raises(ValueError, match="duration or a count"):
        Load(Target("h", 1, b""), concurrency=1)


def asked(provider: StandInProvider, script: str, **more: object) -> Ask:
    return Ask(target(provider, script, stream=True).request, streamed=True, **more)


async def test_asks_are_made_in_turn_and_told_apart(provider):
    asks = [
        Ask(target(provider).request),
        asked(provider, "chunks=30;chunk_delay_ms=5", leave_after=3),
        asked(provider, "chunks=5;fault=reset_mid_stream", fault=True),
        asked(provider, "chunks=4", events=4 + 3),
        asked(provider, "chunks=4", events=4 + 5),
    ]
    result = await run_plain(target(provider), concurrency=1, count=10, asks=asks)
    assert (result.requests_total, result.errors) == (10, {})
    assert (result.left_total, result.faults_total, result.missed_total) == (2, 2, 2 * 2)
    await provider.wait_until(lambda: provider.aborted >= 2)


async def test_an_error_after_the_window_is_counted_while_answers_end(provider):
    result = await run_streams(
        target(provider, "chunks=20;chunk_delay_ms=5;fault=eof_mid_stream;fault_after=19", True),
        concurrency=2,
        duration_seconds=0.02,
        steady=True,
    )
    assert sum(result.errors.values()) == 2


async def test_events_cut_between_two_reads_are_counted(provider):
    script = "chunks=40;split_events=1"
    result = await run_plain(
        target(provider), concurrency=1, count=3, asks=[asked(provider, script, events=43)]
    )
    assert (result.missed_total, result.chunks, result.errors) == (0, 3 * 43, {})
