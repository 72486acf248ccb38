"""The chain of targets: which is tried next and when, time-outs, early answers, cool-downs."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.metrics import CELLS
from tests.proxy import harness
from tests.proxy.ends import (
    DONE,
    STREAM_HEAD,
    Client,
    Upstream,
    chat,
    delta,
    http,
    plain,
    request,
    sse,
    standin,
    usage,
    usage_chunk,
)
from tests.proxy.harness import Key, Scene, Start, credits_of
from tests.waiting import eventually

EITHER = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
SERVED = STREAM_HEAD + sse(delta("Hi")) + sse(delta(finish="stop")) + sse(usage_chunk(1, 1)) + DONE


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains beyond those of the harness."""
    for name, targets in {
        "trio": ["main/one", "raw/two", "spare/three"],
        "raw-first": ["raw/first", "main/second"],
    }.items():
        monkeypatch.setitem(harness.MODELS, name, targets)


def provider_setting(monkeypatch: pytest.MonkeyPatch, name: str, line: str) -> None:
    """One more line of a provider's table in the catalogue."""
    table = f"[providers.{name}]\n"
    text = harness.CATALOGUE.replace(table, f"{table}{line}\n")
    monkeypatch.setattr(harness, "CATALOGUE", text)


def count(scene: Scene, name: str, value: str = "") -> int:
    return int(scene.services.counters.cells[CELLS[name, value]])


async def asks(scene: Scene, key: Key, model: str, stream: bool = False) -> Client:
    client = await scene.client()
    client >> request(key.secret, chat(model=model, stream=stream))
    return client


async def called(scene: Scene) -> Upstream:
    """The raw provider's next connection, its request read."""
    upstream = await scene.raw.call()
    await upstream.hears()
    return upstream


# From target to target


async def test_down_the_whole_chain(proxy: Scene) -> None:
    """A refusal, a 200 that breaks before its first event, then an answer: said once, paid
    once, at the depth that served."""
    key = proxy.seeds.key()
    proxy.main.script(status=500)
    client = await asks(proxy, key, "trio", stream=True)
    upstream = await called(proxy)
    upstream >> STREAM_HEAD + b"1\r\n:\r\n"
    await upstream.flushed()
    upstream.reset()
    answer = await client.answer()
    assert answer.events[-1] == "[DONE]"
    assert answer.headers["x-model-used"] == "three"
    assert answer.headers["x-fallback-from"] == "one"
    (event,) = await proxy.events(key)
    assert (event.fallback_depth, event.served_by) == (2, "spare/three")
    assert event.charge_ucr == credits_of(answer) > 0
    assert count(proxy, "tollgate_upstream_failures", "provider_error") == 1
    assert count(proxy, "tollgate_upstream_failures", "provider_broke_off") == 1


async def test_the_last_failure_is_the_answer(proxy: Scene) -> None:
    key = proxy.seeds.key()
    proxy.main.script(status=500)
    proxy.spare.script(status=429, retry_after=9)
    client = await asks(proxy, key, "trio")
    (await called(proxy)).reset()
    answer = await client.answer()
    assert answer.refused == (429, "provider_rate_limited")
    assert answer.headers["retry-after"] == "9"
    (event,) = await proxy.events(key)
    assert (event.charge_ucr, event.settlement, event.fallback_depth) == (0, "void", 2)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 408, 429, 500, 503, 529])
async def test_a_status_is_enough_to_go_on(proxy: Scene, status: int) -> None:
    """The body may never come; when it does, the connection is kept."""
    key = proxy.seeds.key()
    client = await asks(proxy, key, "raw-first")
    upstream = await called(proxy)
    head, _, body = http(status, b'{"error": {}}').partition(b"\r\n\r\n")
    upstream >> head + b"\r\n\r\n"
    answer = await client.answer()
    assert (answer.status, answer.headers["x-model-used"]) == (200, "second")
    upstream >> body
    client >> request(key.secret, chat(model="raw-first"))
    await upstream.hears()  # the same connection
    upstream >> plain("again", usage(1, 1))
    assert b"again" in (await client.answer()).body


@pytest.mark.parametrize("status", [400, 413, 415, 422])
async def test_a_clients_fault_stays_its_own_though_the_body_breaks(
    proxy: Scene, status: int
) -> None:
    client = await asks(proxy, proxy.seeds.key(), "raw-first")
    upstream = await called(proxy)
    upstream >> http(status, b'{"error": {"message": "no"}}')[:-5]
    await upstream.flushed()
    upstream.close()
    assert (await client.answer()).status == status
    assert not proxy.main.requests


async def test_a_full_pool_is_passed_by(start: Start) -> None:
    scene = await start(upstream_connections=1, upstream_waiting=0)
    key = scene.seeds.key()
    first = await asks(scene, key, "raw-first")
    upstream = await called(scene)
    answer = await scene.ask(key, chat(model="raw-first"))
    assert (answer.status, answer.headers["x-model-used"]) == (200, "second")
    upstream >> plain("first", usage(1, 1))
    assert b"first" in (await first.answer()).body
    assert count(scene, "tollgate_upstream_failures", "service_unavailable") == 1


async def test_waiting_for_a_connection_has_an_end(start: Start) -> None:
    scene = await start(upstream_connections=1, first_byte_timeout_seconds=0.15)
    key = scene.seeds.key()
    first = await asks(scene, key, "raw", stream=True)
    upstream = await called(scene)
    upstream >> STREAM_HEAD + sse(delta("Hi"))
    await first.status()
    answer = await scene.ask(key, chat(model="raw-first"))
    assert (answer.status, answer.headers["x-model-used"]) == (200, "second")
    assert (await scene.ask(key, chat(model="raw"))).refused == (503, "service_unavailable")


async def test_who_waited_is_served_when_a_dial_fails(start: Start) -> None:
    """One may connect at a time, to a provider that is not there: each gets its own answer."""
    scene = await start(upstream_connections=1)
    key = scene.seeds.key()
    body = chat(model="dead-pair")
    answers = await asyncio.gather(*[scene.ask(key, body) for _ in range(10)])
    assert [answer.status for answer in answers] == [200] * 10


# Time-outs, as the catalogue has them


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port that answers no connection: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for caller in callers:
            caller.close()


async def test_connecting_takes_no_longer_than_the_provider_may(
    start: Start, monkeypatch: pytest.MonkeyPatch, deaf: int
) -> None:
    provider_setting(monkeypatch, "dead", "connect_timeout_seconds = 0.1")
    text = harness.CATALOGUE.replace("{dead}", str(deaf))
    monkeypatch.setattr(harness, "CATALOGUE", text)
    scene = await start()
    key = scene.seeds.key()
    assert (await scene.ask(key, chat(model="dead"))).refused == (502, "provider_unreachable")
    answer = await scene.ask(key, chat(model="dead-pair"))
    assert (answer.status, answer.headers["x-fallback-from"]) == (200, "gone")


@EITHER
async def test_a_silent_provider_is_left_for_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    provider_setting(monkeypatch, "raw", "first_byte_timeout_seconds = 0.1")
    scene = await start()
    client = await asks(scene, scene.seeds.key(), "raw-first", stream)
    upstream = await called(scene)
    answer = await client.answer()
    assert (answer.status, answer.headers["x-fallback-from"]) == (200, "first")
    assert await upstream.left()
    assert (await scene.ask(scene.seeds.key(), chat(model="small"))).status == 200


async def test_interim_answers_are_no_first_byte(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider_setting(monkeypatch, "raw", "first_byte_timeout_seconds = 0.1")
    scene = await start()
    client = await asks(scene, scene.seeds.key(), "raw-first")
    (await called(scene)) >> b"HTTP/1.1 102 Processing\r\n\r\n"
    assert (await client.answer()).headers["x-model-used"] == "second"


async def test_silence_within_an_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything was relayed the next target serves; after, there is no next."""
    provider_setting(monkeypatch, "raw", "chunk_timeout_seconds = 0.1")
    scene = await start()
    key = scene.seeds.key()
    client = await asks(scene, key, "raw-first")
    (await called(scene)) >> plain("Hello")[:-5]
    assert (await client.answer()).headers["x-model-used"] == "second"
    client = await asks(scene, key, "raw-first", stream=True)
    (await called(scene)) >> STREAM_HEAD + sse(delta("Hi"))
    answer = await client.answer()
    assert answer.events[-1]["error"]["code"] == "provider_timeout"
    assert "x-fallback-from" not in answer.headers
    assert [event.fallback_depth for event in await scene.events(key)] == [1, 0]


async def test_the_total_time_has_no_second_target(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider_setting(monkeypatch, "raw", "total_timeout_seconds = 0.1")
    scene = await start()
    key = scene.seeds.key()
    client = await asks(scene, key, "raw-first")
    upstream = await called(scene)
    assert (await client.answer()).refused == (504, "provider_timeout")
    assert await upstream.left() and not scene.main.requests
    (event,) = await scene.events(key)
    assert (event.outcome, event.charge_ucr) == ("cut", 0)


# Answers before the request was read


@pytest.mark.parametrize("closes", [False, True])
async def test_a_large_request_refused_early(proxy: Scene, closes: bool) -> None:
    """The provider answers by the head alone: the client hears why, and the next request is
    not sent behind the rest of this one."""
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat("x" * 12_000_000, model="raw", max_tokens=1))
    upstream = await proxy.raw.call()
    await upstream.head()
    upstream >> http(413, b'{"error": {"message": "Too long."}}')
    if closes:
        await upstream.flushed()
        upstream.leave()
    answer = await client.answer()
    assert answer.status == 413 and answer.error["message"] == "Too long."
    client >> request(key.secret, chat(model="raw"))
    (await called(proxy)) >> plain("next", usage(1, 1))
    assert b"next" in (await client.answer()).body
    assert proxy.raw.calls == 2


async def test_an_answer_in_a_coding_nobody_asked_for(proxy: Scene) -> None:
    for coding in (b"content-encoding: gzip\r\n", b"transfer-encoding: gzip, chunked\r\n"):
        client = await asks(proxy, proxy.seeds.key(), "raw", stream=True)
        upstream = await called(proxy)
        upstream >> STREAM_HEAD.replace(b"content-type", coding + b"content-type")
        assert (await client.answer()).refused == (502, "provider_bad_response")


@EITHER
async def test_a_provider_that_would_switch_protocols_has_not_answered(
    proxy: Scene, stream: bool
) -> None:
    """101 is an upgrade that nobody asked for; what follows it is not HTTP."""
    key = proxy.seeds.key()
    client = await asks(proxy, key, "raw", stream=stream)
    upstream = await called(proxy)
    upstream >> b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    upstream >> plain("not for anyone", usage(1, 1))
    assert (await client.answer()).refused == (502, "provider_bad_response")
    assert await upstream.left()
    (event,) = await proxy.events(key)
    assert (event.settlement, event.charge_ucr) == ("void", 0)


# Cool-downs


async def fail(scene: Scene, key: Key, times: int, **script: Any) -> None:
    for _ in range(times):
        scene.main.script(**(script or {"status": 500}))
        answer = await scene.ask(key, chat(model="pair"))
        assert answer.headers["x-model-used"] == "pair-spare"


async def test_a_target_that_keeps_failing_is_passed_over(start: Start, capfd: Any) -> None:
    scene = await start(cooldown_failures=3, cooldown_seconds=60)
    key = scene.seeds.key()
    await fail(scene, key, 3)
    assert len(scene.main.requests) == 3
    answer = await scene.ask(key, chat(model="pair", stream=True))
    assert len(scene.main.requests) == 3
    assert (answer.headers["x-model-used"], answer.headers["x-fallback-from"]) == (
        *("pair-spare", "pair-main"),
    )
    assert [event.fallback_depth for event in await scene.events(key)] == [1] * 4
    assert count(scene, "tollgate_cooldowns") == 1
    await eventually(lambda: count(scene, "tollgate_targets_cooling") == 1)
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (entered,) = [line for line in said if line["event"] == "target passed over"]
    assert (entered["target"], entered["seconds"]) == ("main/pair-main", 60)
    other = await scene.ask(key, chat(model="small"))  # another target of the same provider
    assert other.status == 200 and len(scene.main.requests) == 4


async def test_it_serves_again_after_its_probe(start: Start, capfd: Any) -> None:
    scene = await start(cooldown_failures=2, cooldown_seconds=0.05)
    key = scene.seeds.key()
    await fail(scene, key, 2)

    async def served_by_the_first() -> bool:
        answer = await scene.ask(key, chat(model="pair"))
        return answer.headers["x-model-used"] == "pair-main"

    await eventually(served_by_the_first)
    assert await served_by_the_first()
    await eventually(lambda: count(scene, "tollgate_targets_cooling") == 0)
    assert count(scene, "tollgate_cooldowns") == 1
    assert '"target serves again"' in capfd.readouterr().err


@pytest.mark.parametrize("ending", ["serves", "fails", "client leaves"])
async def test_only_one_probes(start: Start, ending: str) -> None:
    scene = await start(cooldown_failures=1, cooldown_seconds=0.05)
    key = scene.seeds.key()
    client = await asks(scene, key, "raw-first")
    (await called(scene)).reset()
    assert (await client.answer()).headers["x-model-used"] == "second"
    cooldown = scene.services.routing.route("raw-first").stop.cooldown
    await eventually(lambda: scene.services.now() > cooldown.until)
    prober = await asks(scene, key, "raw-first", stream=True)
    probe = await called(scene)
    for _ in range(3):
        answer = await scene.ask(key, chat(model="raw-first"))
        assert answer.headers["x-model-used"] == "second"
    assert scene.raw.calls == 2
    if ending == "serves":
        probe >> STREAM_HEAD  # the head is enough: others need not wait for its end
        await eventually(lambda: not cooldown.cooling)
        probe >> SERVED.removeprefix(STREAM_HEAD)
        assert (await prober.answer()).headers["x-model-used"] == "first"
    elif ending == "fails":
        until = cooldown.until
        probe.reset()
        assert (await prober.answer()).headers["x-model-used"] == "second"
        assert cooldown.cooling and cooldown.until >= until + 0.1
        assert count(scene, "tollgate_cooldowns") == 2
    else:
        prober.leave()
        assert await probe.left()
        await scene.quiet()
        client = await asks(scene, key, "raw-first")
        (await called(scene)) >> plain("next probe", usage(1, 1))
        assert (await client.answer()).headers["x-model-used"] == "first"
        assert not cooldown.cooling


async def test_if_all_cool_they_are_tried_anyway(start: Start) -> None:
    """Those first that may recover soonest; one that serves is back at once."""
    scene = await start(cooldown_failures=1, cooldown_seconds=60)
    key = scene.seeds.key()
    scene.main.script(status=429, retry_after=200)
    scene.spare.script(status=500)
    assert (await scene.ask(key, chat(model="pair"))).status == 502
    assert count(scene, "tollgate_cooldowns") == 2
    scene.spare.script(status=500)
    answer = await scene.ask(key, chat(model="pair"))
    assert answer.headers["x-model-used"] == "pair-main"
    assert (len(scene.main.requests), len(scene.spare.requests)) == (2, 2)
    assert "x-fallback-from" not in answer.headers
    assert scene.services.routing.cooling == 1
    assert [event.fallback_depth for event in await scene.events(key)] == [1, 0]


async def test_an_only_target_is_always_tried(start: Start) -> None:
    scene = await start(cooldown_failures=1, cooldown_seconds=60)
    key = scene.seeds.key()
    for _ in range(3):
        scene.main.script(status=500)
        assert (await scene.ask(key, chat())).status == 502
    assert (await scene.ask(key, chat())).status == 200
    assert len(scene.main.requests) == 4 and not scene.services.routing.cooling


async def test_retry_after_is_obeyed_at_once(start: Start) -> None:
    scene = await start(cooldown_failures=100, cooldown_limit_seconds=50)
    key = scene.seeds.key()
    await fail(scene, key, 1, status=429)
    await fail(scene, key, 1, status=429, retry_after=3600)
    asked = len(scene.main.requests)
    assert asked == 2
    assert (await scene.ask(key, chat(model="pair"))).headers["x-model-used"] == "pair-spare"
    assert len(scene.main.requests) == asked
    cooldown = scene.services.routing.route("pair").stop.cooldown
    assert 0 < cooldown.until - scene.services.now() <= 50


COUNTS: dict[str, tuple[dict[str, Any], bool]] = {
    "its own fault": ({"status": 500}, True),
    "its rate limit": ({"status": 429}, True),
    "our account": ({"status": 401}, True),
    "no answer": ({"fault": "hang_before_head"}, True),
    "a reset": ({"fault": "reset_before_head"}, True),
    "nonsense": ({"fault": "garbage_json"}, True),
    "a broken body": ({"fault": "truncated_body"}, True),
    "the client's fault": ({"status": 400}, False),
    "a large request": ({"status": 413}, False),
}


@pytest.mark.parametrize("what", COUNTS)
async def test_what_counts_against_a_target(start: Start, what: str) -> None:
    scene = await start(cooldown_failures=1, cooldown_seconds=60, first_byte_timeout_seconds=0.15)
    script, counts = COUNTS[what]
    scene.main.script(**script)
    await scene.ask(scene.seeds.key(), chat(model="pair"))
    await scene.quiet()
    assert count(scene, "tollgate_cooldowns") == counts


@pytest.mark.parametrize("fault", ["reset_mid_stream", "error_event", "hang_mid_stream"])
async def test_a_stream_that_breaks_counts(start: Start, fault: str) -> None:
    scene = await start(cooldown_failures=1, cooldown_seconds=60, chunk_timeout_seconds=0.15)
    body = chat(standin(fault=fault), model="pair", stream=True)
    answer = await scene.ask(scene.seeds.key(), body)
    assert "error" in answer.events[-1]
    assert count(scene, "tollgate_cooldowns") == 1


async def test_what_we_cut_does_not_count(start: Start) -> None:
    scene = await start(cooldown_failures=1, total_timeout_seconds=0.15)
    key = scene.seeds.key()
    answer = await scene.ask(key, chat(standin(chunk_delay_ms=20, chunks=90), stream=True))
    assert answer.events[-1]["error"]["code"] == "provider_timeout"
    client = await asks(scene, key, "raw", stream=True)
    upstream = await called(scene)
    client.leave()
    assert await upstream.left()
    await scene.quiet()
    assert count(scene, "tollgate_cooldowns") == 0
