"""Clients that leave: at each moment, the provider is cut off at once and one bill is written.

Nothing relayed: void. The provider's figures seen: exact, also when they are zero. Else an
estimate of what was relayed. The hold is gone within a second.
"""

import asyncio
import json
from collections.abc import Callable

import pytest

from tests.proxy.ends import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    Client,
    Upstream,
    chat,
    delta,
    plain,
    request,
    sse,
    standin,
    usage,
    usage_chunk,
)
from tests.proxy.harness import INPUT_UCR, OUTPUT_UCR, Key, Scene, Start
from tests.waiting import eventually

BODY = chat(model="raw")
STREAMED = chat(model="raw", stream=True)
WAYS: dict[str, Callable[[Client], None]] = {
    "close": Client.close,
    "abort": Client.leave,
    "reset": Client.reset,
}
LEAVING = pytest.mark.parametrize("leave", WAYS.values(), ids=WAYS)
USAGE = {"normal": usage(30, 7), "missing": None, "zero": usage(0, 0)}


async def begun(
    proxy: Scene, body: object = STREAMED, **rules: int
) -> tuple[Key, Client, Upstream]:
    key, client = proxy.seeds.key(**rules), await proxy.client()
    client >> request(key.secret, body)
    upstream = await proxy.raw.call()
    await upstream.hears()
    return key, client, upstream


async def is_settled(proxy: Scene, key: Key, upstream: Upstream) -> None:
    """The provider hears it at once, and within a second no hold is left."""
    assert await upstream.left()
    store = proxy.seeds.store
    await eventually(lambda: store.wallet(key.workspace_id).held == 0, timeout_seconds=1.0)
    await proxy.quiet(1.0)


@LEAVING
@pytest.mark.parametrize("body", [BODY, STREAMED], ids=["plain", "stream"])
async def test_before_the_first_byte_nothing_is_charged(
    proxy: Scene, body: dict[str, object], leave: Callable[[Client], None]
) -> None:
    key, client, upstream = await begun(proxy, body, requests_per_minute=1)
    leave(client)
    await is_settled(proxy, key, upstream)
    (event,) = await proxy.events(key)
    assert (event.outcome, event.settlement, event.charge_ucr) == ("client_left", "void", 0)
    answer = await proxy.ask(key, chat())  # its one request a minute is still there
    assert answer.status == 200


@pytest.mark.parametrize("shape", USAGE)
@pytest.mark.parametrize("part", ["head", "some", "content", "all but a byte"])
async def test_a_plain_answer_not_delivered_is_not_charged(
    proxy: Scene, part: str, shape: str
) -> None:
    key, client, upstream = await begun(proxy, BODY)
    said = plain("Hello " * 20, USAGE[shape])
    cuts = {"head": said.index(b"{"), "some": said.index(b"Hello") + 9, "all but a byte": -1}
    cuts["content"] = said.rindex(b"Hello") + 6
    upstream >> said[: cuts[part]]
    await upstream.flushed()
    await eventually(lambda: all(one._relay.status for one in proxy.services.exchanges))
    client.leave()
    await is_settled(proxy, key, upstream)
    (event,) = await proxy.events(key)
    assert (event.outcome, event.settlement, event.charge_ucr) == ("client_left", "void", 0)


@LEAVING
@pytest.mark.parametrize("shape", USAGE)
@pytest.mark.parametrize("moment", ["one chunk", "finish", "usage"])
async def test_within_a_stream_what_was_relayed_is_charged(
    proxy: Scene, moment: str, shape: str, leave: Callable[[Client], None]
) -> None:
    key, client, upstream = await begun(proxy)
    upstream >> STREAM_HEAD + sse(delta("")) + sse(delta("Hello, world"))
    await client.status()
    await client.event()
    assert await client.event() == delta("Hello, world")
    if moment != "one chunk":
        upstream >> sse(delta("", finish="stop"))
        await client.event()
    figures = USAGE[shape] if moment == "usage" else None
    if figures is not None:
        upstream >> sse(usage_chunk(figures["prompt_tokens"], figures["completion_tokens"]))
        await eventually(lambda: all(one._relay.scanner.usage for one in proxy.services.exchanges))
    leave(client)
    await is_settled(proxy, key, upstream)
    (event,) = await proxy.events(key)
    assert event.outcome == "client_left"
    if figures is None:
        assert event.settlement == "estimated"
        assert event.tokens.input == -(-len(json.dumps(STREAMED)) // 4)
        assert 2 <= event.tokens.output <= 8  # twelve bytes
    else:
        assert event.settlement == "exact"
        tokens = event.tokens.input, event.tokens.output
        assert tokens == (figures["prompt_tokens"], figures["completion_tokens"])
    cost = event.tokens.input * INPUT_UCR + event.tokens.output * OUTPUT_UCR
    assert event.charge_ucr == cost


async def test_usage_that_passed_with_the_content_is_exact(proxy: Scene) -> None:
    key, client, upstream = await begun(proxy)
    upstream >> STREAM_HEAD + sse(delta("Hello", usage=usage(9, 2)))
    await client.status()
    await client.event()
    client.leave()
    await is_settled(proxy, key, upstream)
    (event,) = await proxy.events(key)
    assert (event.settlement, event.charge_ucr) == ("exact", 9 * INPUT_UCR + 2 * OUTPUT_UCR)


async def test_a_head_or_a_comment_is_nothing_relayed(proxy: Scene) -> None:
    comment = b"8\r\n: ping\n\n\r\n"
    for said in (STREAM_HEAD, STREAM_HEAD + comment):
        key, client, upstream = await begun(proxy)
        upstream >> said
        if comment in said:
            await client.until(b": ping")
        await eventually(lambda: all(one._relay.status for one in proxy.services.exchanges))
        client.leave()
        await is_settled(proxy, key, upstream)
        (event,) = await proxy.events(key)
        assert (event.settlement, event.charge_ucr) == ("void", 0)


async def test_after_done_it_is_an_ordinary_end(proxy: Scene) -> None:
    key, client, upstream = await begun(proxy)
    upstream >> STREAM_HEAD + sse(delta("Hi")) + sse(usage_chunk(3, 4)) + DONE
    await client.until(b"[DONE]")
    client.leave()
    upstream >> STREAM_END
    (event,) = await proxy.events(key)
    assert (event.outcome, event.charge_ucr) == ("completed", 3 * INPUT_UCR + 4 * OUTPUT_UCR)


async def test_the_end_cut_before_done_is_no_free_answer(proxy: Scene) -> None:
    """All of the answer has passed, the figures come late: who leaves then still pays."""
    key, client, upstream = await begun(proxy)
    upstream >> STREAM_HEAD + sse(delta("")) + b"".join(sse(delta("word ")) for _ in range(50))
    await client.status()
    for _ in range(51):
        await client.event()
    client.leave()
    await is_settled(proxy, key, upstream)
    (event,) = await proxy.events(key)
    assert 50 <= event.tokens.output <= 80


async def test_while_waiting_for_a_connection(start: Start) -> None:
    scene = await start(upstream_connections=1)
    first, holder, upstream = await begun(scene)
    waiting = await scene.client()
    key = scene.seeds.key()
    waiting >> request(key.secret, STREAMED)
    await eventually(lambda: scene.seeds.counters(key).open == 1)
    waiting.leave()
    (event,) = await eventually(lambda: scene.seeds.events(key))
    assert (event.outcome, event.charge_ucr) == ("client_left", 0)
    upstream >> STREAM_HEAD + sse(delta("Hi", finish="stop")) + DONE + STREAM_END
    assert (await holder.answer()).events[-1] == "[DONE]"
    assert len(await scene.events(first)) == 1 and scene.raw.calls == 1


async def test_while_the_decision_is_on_its_way(proxy: Scene) -> None:
    """Redis answers late: the hold it grants to nobody is given back."""
    keys = [proxy.seeds.key(concurrency=1) for _ in range(20)]
    warm = await asyncio.gather(*[proxy.ask(key, chat()) for key in keys[:10]])
    assert all(answer.status == 200 for answer in warm)
    await proxy.quiet()
    clients = [await proxy.client() for _ in keys]
    proxy.seeds.store.client.client_pause(200)
    for key, client in zip(keys, clients, strict=True):
        client >> request(key.secret, STREAMED)
    await eventually(lambda: len(proxy.services.exchanges) == len(keys))
    for client in clients:
        client.leave()
    await eventually(lambda: not proxy.services.connections)
    await proxy.quiet()
    for key in keys:
        answer = await eventually(lambda key=key: proxy.ask(key, chat()))
        assert answer.status == 200  # its one slot is free
        assert all(not event.charge_ucr for event in proxy.seeds.events(key)[1:-1])


async def test_a_pipeline_is_left_as_a_whole(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    one = request(key.secret, chat(standin(fault="hang_before_head")))
    client >> one + one + one
    await proxy.main.wait_until(lambda: len(proxy.main.requests) == 1)
    client.leave()
    await proxy.main.wait_until(lambda: proxy.main.aborted == 1)
    assert len(await proxy.events(key)) == 1  # what was not begun costs nothing


async def test_a_deep_pipeline_is_left_too(start: Start) -> None:
    """More than is read ahead: the leaving must be seen all the same."""
    scene = await start(pipeline_depth=2)
    key, client = scene.seeds.key(), await scene.client()
    hang = request(key.secret, chat(standin(fault="hang_before_head")))
    client >> hang * 10
    await scene.main.wait_until(lambda: len(scene.main.requests) == 1)
    client.leave()
    await scene.main.wait_until(lambda: scene.main.aborted == 1, timeout_seconds=2.0)
    assert len(await scene.events(key)) == 1


async def test_a_hundred_leave_at_random_moments(proxy: Scene) -> None:
    """Whatever the moment: one event each, and the oracle finds every hold gone."""
    keys = [proxy.seeds.key() for _ in range(4)]
    script = standin(first_chunk_delay_ms=5, chunk_delay_ms=3, chunks=12)

    async def visit(number: int) -> None:
        client = await proxy.client()
        key = keys[number % 4]
        client >> request(key.secret, chat(script, stream=number % 3 > 0))
        try:
            async with asyncio.timeout(number * 0.0006):
                await client.rest()
        except TimeoutError:
            client.leave()

    await asyncio.gather(*[visit(number) for number in range(100)])
    events = [event for key in keys for event in await proxy.events(key)]
    assert {event.outcome for event in events} <= {"completed", "client_left"}
    assert len({event.request_id for event in events}) == len(events) <= 100
