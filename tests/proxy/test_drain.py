"""A worker that stops, seen by its clients: no reset, no request without an answer."""

import asyncio
import os
import socket

from tests.proxy.ends import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    Client,
    chat,
    delta,
    plain,
    request,
    sse,
    standin,
    usage_chunk,
)
from tests.proxy.harness import Scene, Start
from tests.waiting import eventually

LONG = {"drain_timeout_seconds": 30.0, "drain_idle_seconds": 30.0}


async def draining(scene: Scene) -> None:
    """The worker has been told to stop, and has heard it."""
    scene.proxies[0].worker._stopping.set()
    await eventually(lambda: scene.services.draining)


async def ended(scene: Scene) -> None:
    await eventually(lambda: scene.proxies[0]._task.done(), 20.0)
    await scene.proxies[0]._task


async def test_an_idle_connection_may_ask_once_more(start: Start) -> None:
    scene = await start(**LONG)
    key = scene.seeds.key()
    client = await scene.client()
    client >> request(key.secret, chat())
    assert "connection" not in (await client.answer()).headers
    await draining(scene)
    client >> request(key.secret, chat())
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.left()
    client.close()
    await ended(scene)
    assert len(await scene.events(key)) == 2


async def test_an_answer_under_way_says_that_it_is_the_last(start: Start) -> None:
    scene = await start(**LONG)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat(model="raw"))
    upstream = await scene.raw.call()
    await upstream.hears()
    await draining(scene)
    upstream >> plain(usage={"prompt_tokens": 1, "completion_tokens": 1})
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.left()


async def test_a_refusal_in_a_drain_says_that_it_is_the_last(start: Start) -> None:
    scene = await start(**LONG)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat())
    await client.answer()
    await draining(scene)
    client >> request(scene.seeds.key().secret, chat(model="unknown"))
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (404, "close")


async def test_a_connection_without_a_request_yet_is_served(start: Start) -> None:
    scene = await start(**LONG)
    client = await scene.client()
    await eventually(lambda: scene.services.connections)
    await draining(scene)
    client >> request(scene.seeds.key().secret, chat())
    assert (await client.answer()).status == 200


async def test_a_connection_not_yet_accepted_is_served(start: Start) -> None:
    scene = await start(**LONG)
    made = [socket.create_connection(("127.0.0.1", scene.proxies[0].port)) for _ in range(5)]
    scene.proxies[0].worker._stopping.set()  # the loop has had no turn to accept them
    for one in made:
        one.setblocking(False)
        client = Client(*await asyncio.open_connection(sock=one))
        client >> request(scene.seeds.key().secret, chat())
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        client.close()
    await ended(scene)


async def test_a_request_that_has_begun_to_come_in_is_served(start: Start) -> None:
    scene = await start(drain_timeout_seconds=30.0, drain_idle_seconds=0.0)
    whole = request(scene.seeds.key().secret, chat())
    in_head, in_body = await scene.client(), await scene.client()
    in_head >> whole[:20]
    in_body >> whole[:-20]
    await eventually(lambda: {c._reader.within for c in scene.services.connections} >= {"head"})
    await eventually(lambda: {c._reader.within for c in scene.services.connections} >= {"body"})
    await draining(scene)
    for client, rest in ((in_head, whole[20:]), (in_body, whole[-20:])):
        client >> rest
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_requests_read_ahead_are_all_answered(start: Start) -> None:
    scene = await start(**LONG)
    key = scene.seeds.key()
    client = await scene.client()
    client >> request(key.secret, chat(model="raw"))
    upstream = await scene.raw.call()
    await upstream.hears()
    client >> request(key.secret, chat()) >> request(key.secret, chat())
    await eventually(lambda: any(len(c._reader.requests) == 2 for c in scene.services.connections))
    await draining(scene)
    upstream >> plain()
    answers = [await client.answer() for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert ["connection" in answer.headers for answer in answers] == [False, False, True]


async def test_after_a_stream_that_could_not_say_so_a_connection_may_ask_once_more(
    start: Start,
) -> None:
    scene = await start(**LONG)
    key = scene.seeds.key()
    client = await scene.client()
    client >> request(key.secret, chat(model="raw", stream=True))
    upstream = await scene.raw.call()
    await upstream.hears()
    upstream >> STREAM_HEAD + sse(delta("Hello"))
    assert "connection" not in (await client.status())[1]
    await draining(scene)
    upstream >> sse(delta("!", finish="stop")) + sse(usage_chunk(3, 4)) + DONE + STREAM_END
    while await client.event() is not None:
        continue
    client >> request(key.secret, chat())
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_a_quiet_connection_is_closed_after_a_while(start: Start) -> None:
    scene = await start(drain_timeout_seconds=30.0, drain_idle_seconds=0.05)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat())
    await client.answer()
    await draining(scene)
    assert await client.left()
    client.close()
    await ended(scene)


async def test_a_request_that_crosses_the_close_meets_an_end_and_no_reset(start: Start) -> None:
    scene = await start(drain_timeout_seconds=30.0, drain_idle_seconds=0.0)
    key = scene.seeds.key()
    client = await scene.client()
    client >> request(key.secret, chat())
    await client.answer()
    await draining(scene)
    await eventually(lambda: all(c._lingering for c in scene.services.connections))
    client >> request(key.secret, chat())
    await client.flushed()
    assert await client.more() == b""  # an orderly end: a reset would raise
    client.close()
    await ended(scene)
    assert len(await scene.events(key)) == 1


async def test_a_request_in_the_socket_is_answered_not_closed_upon(start: Start) -> None:
    """The look at the clock comes before the look at the socket: it must not close then."""
    scene = await start(idle_timeout_seconds=0.1)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat())
    await client.answer()
    (door,) = scene.services.connections
    descriptor = client.writer.get_extra_info("socket").fileno()
    os.write(descriptor, request(scene.seeds.key().secret, chat()))  # the loop has no turn
    door.check_time(scene.services.now() + 60)
    assert (await client.answer()).status == 200


async def test_what_lasts_too_long_is_told_so(start: Start) -> None:
    scene = await start(drain_timeout_seconds=0.1, drain_idle_seconds=0.1)
    key = scene.seeds.key()
    streaming, half = await scene.client(), await scene.client()
    streaming >> request(key.secret, chat(standin(chunks=500, chunk_delay_ms=20), stream=True))
    assert (await streaming.status())[0] == 200
    half >> request(key.secret, chat())[:-5]
    await eventually(lambda: any(c._reader.within == "body" for c in scene.services.connections))
    await draining(scene)
    assert (await half.answer()).refused == (503, "service_unavailable")
    assert await half.left()
    last = None
    while (event := await streaming.event()) is not None:
        last = event
    assert last["error"]["code"] == "service_unavailable" and last["credits_used"] > 0
    assert await streaming.left()
    for client in (streaming, half):
        client.close()
    await ended(scene)
    (settled,) = scene.seeds.events(key)
    assert (settled.outcome, settled.settlement) == ("cut", "estimated")


async def test_a_model_list_under_way_is_answered(start: Start) -> None:
    scene = await start(**LONG)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, method="GET", path="/v1/models")
    scene.proxies[0].worker._stopping.set()
    assert (await client.answer()).status == 200
    client.close()
    await ended(scene)
