"""A provider that goes on beyond what was held: the stream ends there, as at its ceiling."""

import json
from decimal import Decimal
from typing import Any

import pytest

from proxy.provider_usage import is_beyond
from proxy.usage_scanner import UNBOUNDED, StreamScanner
from tests.proxy.ends import (
    DONE,
    STREAM_END,
    STREAM_HEAD,
    Client,
    Upstream,
    chat,
    delta,
    request,
    sse,
    usage_chunk,
)
from tests.proxy.harness import INPUT_UCR, OUTPUT_UCR, Key, Scene

WORD = "longer "


async def begun(proxy: Scene, key: Key, **fields: Any) -> tuple[Client, Upstream, int]:
    """A stream whose first chunk has passed, and how many tokens its hold can pay."""
    body = chat(model="raw", stream=True, max_tokens=5, **fields)
    client = await proxy.client()
    headers = {"x_tollgate_credits_chunk": "off"} if "n" in fields else {}
    client >> request(key.secret, body, **headers)
    upstream = await proxy.raw.call()
    await upstream.hears()
    upstream >> STREAM_HEAD + sse(delta(""))
    assert (await client.status())[0] == 200
    await client.event()
    held = (len(json.dumps(body)) + 32) * INPUT_UCR + 5 * fields.get("n", 1) * OUTPUT_UCR
    return client, upstream, held // OUTPUT_UCR


async def until_stopped(client: Client, upstream: Upstream, limit: int, chunk: Any) -> int:
    """Send until the client gets something else; how many it got."""
    for count in range(limit):
        upstream >> sse(chunk)
        found = await client.event()
        if found != chunk:
            assert found["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "length"}
            return count
    raise AssertionError("it was never stopped")


async def test_a_stream_that_outruns_its_hold_is_ended_with_what_was_paid(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, payable = await begun(proxy, key)
    passed = await until_stopped(client, upstream, 1000, delta(WORD))
    assert payable < passed < payable * 1.25 + 70
    priced = await client.event()
    assert priced["choices"] == [] and priced["usage"]["completion_tokens"] == 5
    assert await client.event() == "[DONE]"
    assert await client.event() is None
    assert await upstream.left()
    (event,) = await proxy.events(key)
    assert (event.outcome, event.settlement, event.status) == ("cut", "estimated", 200)
    assert priced["credits_used"] == Decimal(event.charge_ucr).scaleb(-6)
    assert 5 * OUTPUT_UCR < event.charge_ucr <= event.hold_ucr
    # The connection serves on, and the target is not held to have failed.
    client >> request(key.secret, chat())
    assert (await client.answer()).status == 200


async def test_what_the_provider_says_was_used_is_paid_up_to_the_hold(proxy: Scene) -> None:
    """It tells its usage in every chunk."""
    key = proxy.seeds.key()
    client, upstream, payable = await begun(proxy, key, stream_options={"include_usage": True})
    told = delta(WORD) | {"usage": usage_chunk(10, 5000)["usage"]}
    for _ in range(2 * payable + 100):
        upstream >> sse(told)
    events = [await client.event()]
    while events[-1] != "[DONE]":
        events.append(await client.event())
    assert events[-3]["choices"][0]["finish_reason"] == "length"
    (event,) = await proxy.events(key)
    assert event.charge_ucr == event.hold_ucr == int(events[-2]["credits_used"] * 1_000_000)
    assert event.overrun_ucr == 10 * INPUT_UCR + 5000 * OUTPUT_UCR - event.hold_ucr


async def test_every_choice_is_ended_and_the_price_may_be_a_comment(proxy: Scene) -> None:
    key = proxy.seeds.key()
    client, upstream, payable = await begun(proxy, key, n=2)
    for _ in range(2 * payable + 100):
        upstream >> sse(delta(WORD))
    events = [await client.event()]
    while events[-1] != "[DONE]":
        events.append(await client.event())
    choices = events[-3]["choices"]
    assert [(one["index"], one["finish_reason"]) for one in choices] == [
        (0, "length"),
        (1, "length"),
    ]
    assert events[-2].startswith(": credits_used=")


@pytest.mark.parametrize(
    ("content", "times"), [("x", 2), ("\u4f60", 1)], ids=["letters", "signs written as escapes"]
)
async def test_small_events_are_no_proof(proxy: Scene, content: str, times: int) -> None:
    """A letter each are more events than tokens; a sign of six bytes is one token."""
    key = proxy.seeds.key()
    client, upstream, payable = await begun(proxy, key)
    chunk = delta(content)
    for _ in range(times * (payable * 5 // 4 + 64)):
        upstream >> sse(chunk)
        assert await client.event() == chunk
    await ends_well(client, upstream)


async def test_large_events_are_no_proof(proxy: Scene) -> None:
    """Much beside each token: probabilities of others, sound, padding."""
    key = proxy.seeds.key()
    client, upstream, payable = await begun(proxy, key)
    chunk = delta(WORD, logprobs=[{"token": WORD * 10, "bytes": [1] * 200}])
    for _ in range(payable):
        upstream >> sse(chunk)
        assert await client.event() == chunk
    await ends_well(client, upstream)


async def ends_well(client: Client, upstream: Upstream) -> None:
    upstream >> sse(delta(finish="stop")) + sse(usage_chunk(10, 5)) + DONE + STREAM_END
    assert (await client.event())["choices"][0]["finish_reason"] == "stop"
    assert (await client.event())["credits_used"] == Decimal("0.00045")
    assert await client.event() == "[DONE]"


def test_both_measures_must_say_so() -> None:
    assert not is_beyond(100, 100 * 200 + 300, 100, 200)
    assert not is_beyond(100, 150 * 200 + 300, 150, 200)
    assert not is_beyond(100, 90 * 200 + 90_000, 90, 200)
    assert is_beyond(100, 150 * 200 + 600, 150, 200)


def test_without_a_bound_nothing_is_beyond_it() -> None:
    scanner = StreamScanner(1 << 20, False)
    assert scanner.enough == UNBOUNDED
    scanner.pass_on(f"data: {json.dumps(delta(WORD))}\n\n".encode() * 5000)
    assert not scanner.has_outrun
    scanner.enough = 5000
    assert not scanner.has_outrun
    scanner.enough = 4000
    assert scanner.has_outrun
