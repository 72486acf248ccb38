"""How the stand-in treats connections: pipelining, cuts, slow readers, leavers, closing."""

import asyncio
import json

from benchmarks.provider import StandInProvider
from benchmarks.provider.pace import Metronome
from tests.benchmarks.raw_client import chat, connected, events, streamed
from tests.waiting import eventually


def request_bytes(body: dict, *extra: str, version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: t", *extra]
    return "\r\n".join([*lines, f"Content-Length: {len(raw)}", "", ""]).encode() + raw


async def test_pipelined_requests_are_answered_in_order(provider):
    bodies = [
        streamed("[[standin chunks=3; chunk_delay_ms=5]]"),
        chat("[[standin answer_bytes=1]]"),
        chat("[[standin status=429]]"),
        chat("[[standin delay_ms=10; answer_bytes=2]]"),
    ]
    async with connected(provider) as client:
        client.writer.write(b"".join(map(request_bytes, bodies)))
        answers = [await client.answer() for _ in bodies]
    assert [status for status, _, _ in answers] == [200, 200, 429, 200]
    assert len(events(answers[0][2])) == 6
    sizes = [json.loads(answers[i][2])["usage"]["completion_tokens"] for i in (1, 3)]
    assert sizes == [1, 1]


async def test_many_pipelined_requests_wait_with_a_bound(provider):
    slow = request_bytes(chat("[[standin delay_ms=20]]"))
    async with connected(provider) as client:
        client.writer.write(slow + request_bytes(chat()) * 500)
        statuses = [(await client.answer())[0] for _ in range(501)]
    assert statuses == [200] * 501


async def test_a_request_cut_at_every_offset(provider):
    raw = request_bytes(chat(), "X-Standin: answer_bytes=3")
    async with connected(provider) as client:
        for cut in range(1, len(raw)):
            client.writer.write(raw[:cut])
            await asyncio.sleep(0)
            client.writer.write(raw[cut:])
            _, _, answer = await client.answer()
            assert len(json.loads(answer)["choices"][0]["message"]["content"]) == 3
    assert provider.served == len(raw) - 1


async def test_chunked_request_body_and_expect(provider):
    async with connected(provider) as client:
        client.writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\nExpect: 100-continue\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.writer.write(b'5\r\n{"mod\r\n8\r\nel":"m"}\r\n0\r\n\r\n')
        assert (await client.answer())[0] == 200


async def test_connection_close_and_http_1_0(provider):
    for raw in (
        request_bytes(chat(), "Connection: close"),
        request_bytes(streamed(), "Connection: close"),
        request_bytes(chat(), version="1.0"),
    ):
        async with connected(provider) as client:
            client.writer.write(raw)
            assert (await client.answer())[0] == 200
            assert await client.to_end() == b""


async def test_http_1_0_streams_are_not_chunked(provider):
    async with connected(provider) as client:
        client.writer.write(request_bytes(streamed(), version="1.0"))
        _, headers, raw = await client.answer()
    assert "transfer-encoding" not in headers
    assert events(raw)[-1] == "[DONE]"


async def test_leavers_are_counted_once_and_stop_their_stream(provider):
    async with connected(provider) as client:
        await client.send(streamed("[[standin chunks=1000; chunk_delay_ms=1]]"))
        await client.until(b"role")
        assert provider.open_connections == 1
    await provider.wait_until(lambda: provider.open_connections == 0)
    assert provider.aborted == 1


async def test_who_leaves_after_the_end_is_no_leaver(provider):
    async with connected(provider) as client:
        await client.send(streamed())
        await client.answer()
    await provider.wait_until(lambda: provider.open_connections == 0)
    assert provider.aborted == 0


async def test_a_slow_reader_holds_its_stream_back_and_misses_nothing(provider):
    async with connected(provider) as client:
        await client.send(streamed("[[standin chunks=4000; chunk_bytes=2000]]"))
        await client.head()
        (connection,) = provider._connections
        await eventually(lambda: connection._delivery.blocked)
        assert connection.transport.get_write_buffer_size() < 1 << 18
        assert b"".join(client.reads).count(b"data: ") < 4000
        while not b"".join(client.reads[-2:]).endswith(b"0\r\n\r\n"):
            client.buffer = b""
            await client.more()
        assert b"".join(client.reads).count(b"data: ") == 4000 + 3


async def test_stop_drops_connections():
    async with StandInProvider() as provider, connected(provider) as client:
        await client.send(streamed("[[standin fault=hang_mid_stream]]"))
        await client.until(b"role")
        await provider.stop()
        assert provider.open_connections == 0


class Beat:
    """Stands for a delivery: notes when it is stepped."""

    def __init__(self, metronome: Metronome) -> None:
        self.metronome, self.stepped = metronome, asyncio.Event()
        self.at = 0.0

    def step(self) -> None:
        self.at = self.metronome.now()
        self.stepped.set()


async def test_metronome_is_never_early_and_an_earlier_beat_overtakes():
    metronome = Metronome(asyncio.get_running_loop())
    start = metronome.now()
    dues = [start + 0.03, start + 0.01, start + 0.02, start + 0.01, start - 1]
    beats = [Beat(metronome) for _ in dues]
    for due, beat in zip(dues, beats, strict=True):
        metronome.at(due, beat)
    async with asyncio.timeout(5):
        await asyncio.gather(*(beat.stepped.wait() for beat in beats))
    assert all(beat.at > due - 0.001 for due, beat in zip(dues, beats, strict=True))
    assert beats[1].at <= beats[2].at <= beats[0].at
