"""The door on bare sockets: what is refused, what is read in pieces, order, pace and time."""

import asyncio
import json
from typing import Any

import pytest

from tests.proxy.ends import CHAT, Answer, Client, chat, request, standin
from tests.proxy.harness import Key, Scene, Start
from tests.waiting import eventually

BODY = json.dumps(chat()).encode()


# HTTP as it must not be


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


POST = f"POST {CHAT} HTTP/1.1"
HOST = "Host: x"
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
WHOLE_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
MALFORMED = {
    "two equal lengths": head(POST, HOST, LENGTH, LENGTH) + BODY,
    "two lengths": head(POST, HOST, LENGTH, "Content-Length: 3") + BODY,
    "a list of lengths": head(POST, HOST, f"Content-Length: {len(BODY)}, {len(BODY)}") + BODY,
    "length and chunked": head(POST, HOST, LENGTH, CHUNKED) + WHOLE_CHUNK,
    "chunked and length": head(POST, HOST, CHUNKED, LENGTH) + WHOLE_CHUNK,
    "signed length": head(POST, HOST, f"Content-Length: +{len(BODY)}") + BODY,
    "negative length": head(POST, HOST, "Content-Length: -1") + BODY,
    "hexadecimal length": head(POST, HOST, "Content-Length: 0x10") + BODY,
    "empty length": head(POST, HOST, "Content-Length:") + BODY,
    "endless length": head(POST, HOST, "Content-Length: " + "9" * 40) + BODY,
    "chunked twice": head(POST, HOST, CHUNKED, CHUNKED) + WHOLE_CHUNK,
    "gzip, chunked": head(POST, HOST, "Transfer-Encoding: gzip, chunked") + WHOLE_CHUNK,
    "chunked, identity": head(POST, HOST, "Transfer-Encoding: chunked, identity") + WHOLE_CHUNK,
    "identity": head(POST, HOST, "Transfer-Encoding: identity") + BODY,
    "xchunked": head(POST, HOST, "Transfer-Encoding: xchunked") + WHOLE_CHUNK,
    "vertical tab": head(POST, HOST, "Transfer-Encoding: \x0bchunked") + WHOLE_CHUNK,
    "chunked in HTTP/1.0": head(f"POST {CHAT} HTTP/1.0", HOST, CHUNKED) + WHOLE_CHUNK,
    "obs-fold": head(POST, HOST, "X-Long: a", " b", LENGTH) + BODY,
    "space before colon": head(POST, HOST, f"Content-Length : {len(BODY)}") + BODY,
    "space in a name": head(POST, HOST, "Content Length: 3", LENGTH) + BODY,
    "no colon": head(POST, HOST, "Nonsense", LENGTH) + BODY,
    "no name": head(POST, HOST, ": x", LENGTH) + BODY,
    "bare LF": head(POST, HOST, LENGTH).replace(b"\r\n", b"\n") + BODY,
    "bare LF within": head(f"{POST}\n{HOST}", LENGTH) + BODY,
    "LF in a header": head(POST, HOST, f"X-A: b\nX-C: d\r\n{LENGTH}") + BODY,
    "bare CR": head(POST, HOST, f"X-A: b\rX-C: d\r\n{LENGTH}") + BODY,
    "NUL in a header": head(POST, HOST, "X-A: b\0c", LENGTH) + BODY,
    "no host": head(POST, LENGTH) + BODY,
    "two hosts": head(POST, HOST, "Host: y", LENGTH) + BODY,
    "no version": head(f"POST {CHAT}", HOST, LENGTH) + BODY,
    "HTTP/2.0": head(f"POST {CHAT} HTTP/2.0", HOST, LENGTH) + BODY,
    "HTTP/1.2": head(f"POST {CHAT} HTTP/1.2", HOST, LENGTH) + BODY,
    "HTTP/0.9": b"GET /\r\n\r\n",
    "RTSP/1.0": head(f"POST {CHAT} RTSP/1.0", HOST, LENGTH) + BODY,
    "ICE/1.0": head(f"SOURCE {CHAT} ICE/1.0", HOST),
    "two spaces before the target": head(f"POST  {CHAT} HTTP/1.1", HOST, LENGTH) + BODY,
    "two spaces after the target": head(f"POST {CHAT}  HTTP/1.1", HOST, LENGTH) + BODY,
    "LF before the request": b"\n" + head(POST, HOST, LENGTH) + BODY,
    "two empty lines before": b"\r\n\r\n" + head(POST, HOST, LENGTH) + BODY,
    "a space in the target": head(f"POST {CHAT}/a b HTTP/1.1", HOST, LENGTH) + BODY,
    "a method of small letters": head(f"post {CHAT} HTTP/1.1", HOST, LENGTH) + BODY,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n",
    "an upgrade": head(POST, HOST, "Connection: Upgrade", "Upgrade: websocket", LENGTH) + BODY,
    "a tunnel": head("CONNECT example.com:443 HTTP/1.1", HOST),
    "a chunk size of words": head(POST, HOST, CHUNKED) + b"zz\r\n",
    "a chunk size with 0x": head(POST, HOST, CHUNKED) + b"0x10\r\n",
    "a negative chunk size": head(POST, HOST, CHUNKED) + b"-1\r\n",
    "a signed chunk size": head(POST, HOST, CHUNKED) + b"+5\r\nhello\r\n",
    "an endless chunk size": head(POST, HOST, CHUNKED) + b"F" * 17 + b"\r\n",
    "an empty chunk size": head(POST, HOST, CHUNKED) + b"\r\n",
    "a chunk longer than its size": head(POST, HOST, CHUNKED) + b"3\r\nhello\r\n",
    "a chunk line with bare LF": head(POST, HOST, CHUNKED) + b"5\nhello\r\n0\r\n\r\n",
    "a long chunk extension": head(POST, HOST, CHUNKED) + b"5;" + b"a" * 5000,
    "a trailer without colon": head(POST, HOST, CHUNKED) + b"0\r\nnonsense\r\n\r\n",
    "a control in a chunk extension": head(POST, HOST, CHUNKED) + b"5;a=\0\r\nhello\r\n0\r\n\r\n",
    "a trailer with space before its colon": head(POST, HOST, CHUNKED) + b"0\r\nA : b\r\n\r\n",
    "other expectation": head(POST, HOST, LENGTH, "Expect: 200-ok") + BODY,
    "other expectation of nothing": head(POST, HOST, "Content-Length: 0", "Expect: 200-ok"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_http_is_refused_and_closed(proxy: Scene, name: str) -> None:
    key = proxy.seeds.key()
    authorized = MALFORMED[name].replace(
        b"\r\n", b"\r\nAuthorization: Bearer " + key.secret.encode() + b"\r\n", 1
    )
    if name in ("HTTP/0.9", "TLS", "bare LF", "two empty lines before"):
        authorized = MALFORMED[name]
    async with proxy.no_trace():
        client = await proxy.client()
        client >> authorized >> request(key.secret, chat())  # must not be served any more
        answer = await client.answer()
        wanted = (417, "expectation_failed") if "expect" in name else (400, "malformed_http")
        assert answer.refused == wanted
        assert answer.headers["connection"] == "close"
        assert await client.left()
    assert not proxy.main.requests


async def test_a_giant_head_is_431(start: Start) -> None:
    scene = await start(head_limit_bytes=4096)
    async with scene.no_trace():
        for end in (b"", b"\r\n\r\n"):  # on the way already, or once whole
            client = await scene.client()
            client >> b"POST / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 5000 + end
            assert (await client.answer()).refused == (431, "request_head_too_large")
            assert await client.left()


async def test_a_declared_body_over_the_limit_is_413_at_once(start: Start) -> None:
    scene = await start(body_limit_bytes=1024)
    key = scene.seeds.key()
    async with scene.no_trace():
        client = await scene.client()
        client >> head(POST, HOST, "Content-Length: 1025")
        answer = await client.answer()
        assert answer.refused == (413, "request_too_large")
        assert answer.headers["connection"] == "close"
    whole = chat("x" * (1024 - len(json.dumps(chat("")))))
    assert len(json.dumps(whole)) == 1024
    assert (await scene.ask(key, whole)).status == 200


async def test_a_chunked_body_over_the_limit_is_413(start: Start) -> None:
    scene = await start(body_limit_bytes=1024)
    async with scene.no_trace():
        client = await scene.client()
        client >> head(POST, HOST, CHUNKED) >> b"200\r\n" + b"a" * 0x200 + b"\r\n" >> b"201\r\n"
        assert (await client.answer()).refused == (413, "request_too_large")


async def test_the_refusal_of_a_body_arrives_while_it_is_still_being_sent(start: Start) -> None:
    scene = await start(body_limit_bytes=1024)
    client = await scene.client()
    client >> head(POST, HOST, "Content-Length: 4000000") + b"x" * 4_000_000
    assert (await client.answer()).refused == (413, "request_too_large")


async def test_paths_and_methods_that_are_not_there(proxy: Scene) -> None:
    key = proxy.seeds.key()
    async with proxy.no_trace():
        for path in ("/", "/v1", "/v1/chat", CHAT + "/", CHAT + "x", "/v1/nothing", "/v1/models2"):
            assert (await proxy.ask(key, chat(), path=path)).refused == (404, "not_found"), path
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
            answer = await proxy.ask(key, method=method)
            assert answer.refused == (405, "method_not_allowed"), method
            assert answer.headers["connection"] == "close"


async def test_a_head_request_gets_a_head_only(proxy: Scene) -> None:
    client = await proxy.client()
    client >> request("", method="HEAD")
    assert (await client.status())[0] == 405
    assert await client.rest() == b""


async def test_a_query_is_no_part_of_the_path(proxy: Scene) -> None:
    key = proxy.seeds.key()
    assert (await proxy.ask(key, chat(), path=CHAT + "?api-version=1")).status == 200


async def test_the_absolute_form_names_the_same_resource(proxy: Scene) -> None:
    """RFC 9112 §3.2.2: a server accepts it."""
    key = proxy.seeds.key()
    for path in ("http://tollgate.test" + CHAT, "HTTP://tollgate.test:8080" + CHAT + "?a=b"):
        assert (await proxy.ask(key, chat(), path=path)).status == 200
    async with proxy.no_trace():
        for path in ("http://tollgate.test", "http://tollgate.test/v1/nothing"):
            assert (await proxy.ask(key, chat(), path=path)).refused == (404, "not_found")


NOT_THERE = [
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/v1/chat/../chat/completions",
    "/./v1/chat/completions",
    "/v1/chat/%63ompletions",
    "/v1/chat/completions%00",
    "/V1/chat/completions",
    "/v1/chat/completions;a=b",
    "/v1/chat/completions/",
    "http://tollgate.test?/v1/chat/completions",
    "http://tollgate.test//v1/chat/completions",
    "ftp://tollgate.test/",
]
NO_TARGETS = ["*", "tollgate.test:80", "v1/chat/completions", "?/v1/chat/completions", "", "\xe4"]
NO_TARGETS += [CHAT + odd for odd in ("#", "#a", "\t", "\x7f", "\\\0")]


@pytest.mark.parametrize("target", NOT_THERE + NO_TARGETS)
async def test_an_odd_target_leads_nowhere(proxy: Scene, target: str) -> None:
    key = proxy.seeds.key()
    authorization = f"Authorization: Bearer {key.secret}"
    async with proxy.no_trace():
        client = await proxy.client()
        client >> head(f"POST {target} HTTP/1.1", HOST, LENGTH, authorization) + BODY
        answer = await client.answer()
        there = (404, "not_found") if target in NOT_THERE else (400, "malformed_http")
        assert answer.refused == there and await client.left()
    assert not proxy.main.requests


async def test_an_upgrade_that_is_offered_is_not_taken(proxy: Scene) -> None:
    """RFC 9110 §7.8: without a word in `Connection` it is no more than a header."""
    key = proxy.seeds.key()
    answer = await proxy.ask(key, chat(), Upgrade="h2c", HTTP2_Settings="AAMAAABkAAQAAP__")
    assert answer.status == 200 and "upgrade" not in answer.headers


# HTTP as it may be


async def ping(client: Client, key: Key, **more: str) -> Answer:
    client >> request(key.secret, chat(), **more)
    return await client.answer()


async def test_a_connection_serves_one_request_after_another(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    for number in range(3):
        answer = await ping(client, key)
        assert answer.status == 200 and "connection" not in answer.headers
        client >> request(key.secret, chat(model="nowhere"))
        assert (await client.answer()).status == 404
        client >> request(key.secret, chat(stream=True))
        assert (await client.answer()).events[-1] == "[DONE]", number


async def test_connection_close_is_obeyed(proxy: Scene) -> None:
    key = proxy.seeds.key()
    for stream in (False, True):
        client = await proxy.client()
        client >> request(key.secret, chat(stream=stream), Connection="close")
        answer = await client.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        assert await client.left()


async def test_connection_close_is_obeyed_after_a_request_without_a_body(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, Connection="keep-alive, Close")
    answer = await client.answer()
    assert answer.refused == (400, "invalid_json") and answer.headers["connection"] == "close"
    assert await client.left()


async def test_spaces_around_a_value_are_no_part_of_it(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    authorization = f"Authorization:Bearer {key.secret} \t"
    client >> head(POST, "Host:x ", f"Content-Length: \t {len(BODY)} \t", authorization) + BODY
    client >> head(POST, HOST, CHUNKED + " ", authorization) + WHOLE_CHUNK
    client >> head(POST, HOST, LENGTH, "Expect:100-Continue ", authorization) + BODY
    assert [(await client.answer()).status for _ in range(3)] == [200] * 3


async def test_http_1_0_gets_a_plain_body_and_a_close(proxy: Scene) -> None:
    key = proxy.seeds.key()
    for stream in (False, True):
        client = await proxy.client()
        client >> request(key.secret, chat(stream=stream), version="1.0")
        answer = await client.answer()
        assert answer.status == 200 and "transfer-encoding" not in answer.headers
        assert answer.headers["connection"] == "close"
        assert answer.events[-1] == "[DONE]" if stream else answer.json["choices"]
        assert await client.left()


async def test_http_1_0_with_keep_alive_is_never_left_waiting(proxy: Scene) -> None:
    """It must either be told that the connection stays, or see it close."""
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(), version="1.0", Connection="keep-alive")
    answer = await client.answer()
    assert answer.status == 200
    if answer.headers.get("connection") != "keep-alive":
        assert await client.left()


async def test_expect_100_continue_is_answered_before_the_body(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    whole = request(key.secret, chat(), Expect="100-continue")
    cut = whole.index(b"\r\n\r\n") + 4
    client >> whole[:cut]
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client >> whole[cut:]
    assert (await client.answer()).status == 200
    client >> whole  # the body is here already: no interim answer is needed
    assert (await client.answer()).status == 200


async def test_expect_100_continue_of_a_body_too_large_is_413_at_once(start: Start) -> None:
    scene = await start(body_limit_bytes=1024)
    client = await scene.client()
    client >> head(POST, HOST, "Content-Length: 5000", "Expect: 100-continue")
    assert (await client.answer()).refused == (413, "request_too_large")


async def test_http_1_0_gets_no_interim_answer(proxy: Scene) -> None:
    """RFC 9110 §10.1.1: the expectation of an HTTP/1.0 client is ignored."""
    key, client = proxy.seeds.key(), await proxy.client()
    whole = request(key.secret, chat(), version="1.0", Expect="100-continue")
    cut = whole.index(b"\r\n\r\n") + 4
    client >> whole[:cut]
    await eventually(lambda: any(one._reader.within == "body" for one in connections(proxy)))
    client >> whole[cut:]
    assert (await client.answer()).status == 200


def connections(scene: Scene) -> list[Any]:
    return list(scene.services.connections)


async def test_chunked_bodies_are_put_together(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    authorization = f"Authorization: Bearer {key.secret}"
    pieces = [BODY[n : n + 7] for n in range(0, len(BODY), 7)]
    body = b"".join(b"%X;name=value\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    for trailer in (b"", b"X-Trailer: 1\r\n"):
        client >> head(POST, HOST, CHUNKED, authorization) + body + b"0\r\n" + trailer + b"\r\n"
        assert (await client.answer()).status == 200
    assert json.loads(proxy.main.requests[-1].body)["messages"] == chat()["messages"]


@pytest.mark.parametrize("stream", [False, True])
async def test_pipelined_requests_are_answered_in_order(proxy: Scene, stream: bool) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    texts = [f"number {n} " + standin(delay_ms=20 - n, completion_tokens=n + 1) for n in range(20)]
    client >> b"".join(request(key.secret, chat(text, stream=stream)) for text in texts)
    for number in range(20):
        answer = await client.answer()
        body = answer.events[-2] if stream else answer.json
        assert body["usage"]["completion_tokens"] == number + 1
    assert len(await proxy.events(key)) == 20


async def test_a_refusal_between_pipelined_requests_keeps_the_order(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    good, bad = request(key.secret, chat(standin(delay_ms=20))), request(key.secret, b"{")
    client >> good + bad + good + bad + good
    assert [(await client.answer()).status for _ in range(5)] == [200, 400, 200, 400, 200]


async def test_what_follows_a_malformed_request_is_not_served(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    good = request(key.secret, chat(standin(delay_ms=20)))
    client >> good + MALFORMED["length and chunked"] + good
    assert [(await client.answer()).status for _ in range(2)] == [200, 400]
    assert await client.left()
    assert len(await proxy.events(key)) == 1


async def test_a_request_cut_at_every_byte_is_one_request(proxy: Scene) -> None:
    key = proxy.seeds.key()
    whole = request(key.secret, chat("ü"))
    clients = [await proxy.client() for _ in whole]
    for cut, client in enumerate(clients):
        client >> whole[:cut]
    await eventually(lambda: len(proxy.services.connections) == len(whole))
    await proxy.client() >> b""
    for cut, client in enumerate(clients):
        client >> whole[cut:]
    for client in clients:
        assert (await client.answer()).status == 200
    assert len(await proxy.events(key)) == len(whole)


async def test_chunked_requests_arriving_byte_by_byte(proxy: Scene) -> None:
    key = proxy.seeds.key()
    authorization = f"Authorization: Bearer {key.secret}"
    whole = head(POST, HOST, CHUNKED, authorization) + WHOLE_CHUNK
    client = await proxy.client()
    for number in range(2 * len(whole)):
        client >> whole[number % len(whole) :][:1]
        await client.flushed()
    assert [(await client.answer()).status for _ in range(2)] == [200, 200]


async def test_an_empty_line_before_a_request_is_skipped(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    for before in (b"\r\n", b"\r", b""):
        client >> before
        await client.flushed()
        client >> (b"\n" if before == b"\r" else b"") + request(key.secret, chat())
        assert (await client.answer()).status == 200


# Time


async def test_a_head_that_never_ends_is_408(start: Start) -> None:
    scene = await start(head_timeout_seconds=0.1)
    client = await scene.client()
    client >> b"POST / HT"
    answer = await client.answer()
    assert answer.refused == (408, "request_timeout")
    assert answer.headers["connection"] == "close"
    assert await client.left()


async def test_a_head_that_drips_is_408(start: Start) -> None:
    """The time counts from a head's first byte, whatever keeps coming."""
    scene = await start(head_timeout_seconds=0.2)
    client = await scene.client()
    client >> b"POST / HTTP/1.1\r\nX-Drip: "
    answered = asyncio.ensure_future(client.more())
    for _ in range(300):
        client >> b"x"
        if (await asyncio.wait([answered], timeout=0.01))[0]:
            break
    await answered
    assert (await client.answer()).refused == (408, "request_timeout")


async def test_a_body_that_never_ends_is_408(start: Start) -> None:
    scene = await start(body_timeout_seconds=0.1)
    key = scene.seeds.key()
    async with scene.no_trace():
        client = await scene.client()
        client >> request(key.secret, chat())[:-1]
        assert (await client.answer()).refused == (408, "request_timeout")
        assert await client.left()


@pytest.mark.parametrize("framing", ["Content-Length: 1000", CHUNKED])
async def test_a_body_that_drips_is_408(start: Start, framing: str) -> None:
    scene = await start(body_timeout_seconds=0.2)
    client = await scene.client()
    client >> head(POST, HOST, framing) + (b"200\r\n" if framing == CHUNKED else b"")
    answered = asyncio.ensure_future(client.more())
    for _ in range(300):
        client >> b"x"
        if (await asyncio.wait([answered], timeout=0.01))[0]:
            break
    await answered
    assert (await client.answer()).refused == (408, "request_timeout")


async def test_an_idle_connection_is_closed_without_a_word(start: Start) -> None:
    scene = await start(idle_timeout_seconds=0.1)
    key = scene.seeds.key()
    fresh, used = await scene.client(), await scene.client()
    assert (await ping(used, key)).status == 200
    assert await fresh.left() and await used.left()


async def test_a_request_under_way_is_not_idle(start: Start) -> None:
    scene = await start(idle_timeout_seconds=0.1, head_timeout_seconds=0.1)
    key, client = scene.seeds.key(), await scene.client()
    slow = chat(standin(delay_ms=400))
    client >> request(key.secret, slow)
    assert (await client.answer()).status == 200


async def test_a_client_that_closes_its_side_has_left(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), await proxy.client()
    client >> request(key.secret, chat(standin(fault="hang_before_head")))
    await proxy.main.wait_until(lambda: bool(proxy.main.requests))
    client.writer.write_eof()
    await proxy.main.wait_until(lambda: proxy.main.aborted == 1)
    (event,) = await proxy.events(key)
    assert (event.outcome, event.charge_ucr) == ("client_left", 0)


async def test_connections_beyond_the_limit_are_503(start: Start) -> None:
    scene = await start(connections=2)
    kept = [await scene.client() for _ in range(2)]
    key = scene.seeds.key()
    assert (await ping(kept[0], key)).status == 200
    client = await scene.client()
    assert (await client.answer()).refused == (503, "service_unavailable")
    client.close()
    kept[1].leave()
    await eventually(lambda: len(scene.services.connections) < 2)
    assert (await scene.ask(key, chat())).status == 200


# Pace


async def test_pipelining_without_reading_is_bounded(start: Start) -> None:
    """Answers nobody reads stop the reading of requests."""
    scene = await start(write_buffer_bytes=4096, pipeline_depth=4)
    key, client = scene.seeds.key(), await scene.client()
    one = request(key.secret, chat(standin(answer_bytes=200_000, obey_max=0, completion_tokens=5)))
    client.reader._limit = 4096
    for _ in range(200):
        client >> one
    seen = await steady(lambda: scene.main.served)
    assert seen < 60  # the kernel's buffers take some megabytes, the proxy a few answers
    for _ in range(200):
        assert (await client.answer()).status == 200
    assert len(await scene.events(key)) == 200


async def steady(figure) -> int:
    """The figure once it has not moved for a quarter of a second."""
    last, same = -1, 0
    while same < 25:
        await asyncio.sleep(0.01)
        now = figure()
        last, same = (now, same + 1) if now == last else (now, 0)
    return last
