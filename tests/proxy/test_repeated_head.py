"""A head that repeats is taken for what reading it again would give, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting.contract.errors import BodyTooLarge
from accounting.contract.settings import Settings
from proxy.http_head import Request
from proxy.request_reader import RequestReader

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer x\r\n"
    b"Content-Length: %b\r\naccept: */*\r\n\r\n"
)


def request(body: bytes) -> bytes:
    return HEAD % str(len(body)).encode() + body


def read(*pieces: bytes) -> tuple[list[Request], RequestReader]:
    reader = RequestReader(Settings(body_limit_bytes=1000, pipeline_depth=100))
    for piece in pieces:
        reader.feed(piece)
    return list(reader.requests), reader


def outcome(*pieces: bytes) -> object:
    """All that a reader makes of some bytes."""
    requests, reader = read(*pieces)
    seen = [
        (one.head.headers | {b"content-length": b""}, one.head.path, one.keep_alive, one.body,
         type(one.failure)) for one in requests
    ]  # fmt: skip
    return seen, reader.foreign, reader.ended, reader.within


def alone(data: bytes) -> object:
    """The same, by a reader that knows no head."""
    return outcome(data)


def test_requests_of_one_head_share_it() -> None:
    bodies = [b"one", b"", b"three three", b"4" * 1000]
    requests, _ = read(*map(request, bodies))
    assert [one.body for one in requests] == bodies
    assert len({id(one.head) for one in requests}) == 1
    assert all(one.keep_alive and one.failure is None for one in requests)


def test_what_one_request_is_told_others_are_not() -> None:
    requests, _ = read(request(b"one"), request(b"two"))
    requests[0].keep_alive = False
    assert requests[1].keep_alive and requests[1].head.keep_alive


@given(st.lists(st.integers(0, 300), max_size=6))
def test_cut_anywhere_it_is_read_the_same(cuts: list[int]) -> None:
    data = request(b"one") + request(b"twenty-two") + request(b"")
    places = sorted({min(cut, len(data)) for cut in cuts})
    pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    assert outcome(*pieces) == outcome(data)


@pytest.mark.parametrize(
    "changed",
    [
        HEAD % b"3" + b"two",
        HEAD % b"03" + b"two",
        HEAD % b"+3" + b"two",
        HEAD % b"-3" + b"two",
        HEAD % b"" + b"two",
        HEAD % b"3 " + b"two",
        HEAD % b"3\t" + b"two",
        HEAD % b"3,3" + b"two",
        HEAD % b"3\r\nContent-Length: 3" + b"two",
        HEAD % b"3\r\ntransfer-encoding: chunked" + b"two",
        HEAD % b"3\n" + b"two",
        HEAD % b"\xd9\xa3" + b"two",  # a digit, but not of ASCII
        HEAD % b"1001" + b"two",
        HEAD % (b"0" * 15 + b"3") + b"two",
        HEAD % b"9" * 40,
        (HEAD % b"3").replace(b"Bearer x", b"Bearer y") + b"two",
        (HEAD % b"3").replace(b"accept", b"expect") + b"two",
        (HEAD % b"3").replace(b"*/*\r\n\r\n", b"*/*\r\nx: y\r\n\r\n") + b"two",
        (HEAD % b"3").replace(b"POST", b"PUT") + b"two",
        (HEAD % b"3").replace(b"chat/completions", b"models") + b"two",
        b"\r\n" + HEAD % b"3" + b"two",
    ],
)
def test_what_follows_is_read_as_by_one_who_knows_nothing(changed: bytes) -> None:
    first, fresh = outcome(request(b"one")), alone(changed)
    assert isinstance(first, tuple) and isinstance(fresh, tuple)
    both = outcome(request(b"one"), changed)
    assert both == (first[0] + fresh[0], *fresh[1:])


def test_a_longer_body_is_waited_for() -> None:
    reader = RequestReader(Settings())
    reader.feed(request(b"one"))
    reader.feed(request(b"x" * 100)[:-1])
    assert len(reader.requests) == 1 and reader.within == "body"
    reader.feed(b"x")
    assert [one.body for one in reader.requests] == [b"one", b"x" * 100]


def test_a_body_above_the_limit_is_refused() -> None:
    requests, reader = read(request(b"one"), HEAD % b"1001")
    assert isinstance(requests[1].failure, BodyTooLarge) and reader.ended


def test_with_the_pipeline_full_it_waits() -> None:
    reader = RequestReader(Settings(pipeline_depth=2))
    reader.feed(request(b"1") + request(b"2") + request(b"3"))
    assert [one.body for one in reader.requests] == [b"1", b"2"]
    reader.requests.popleft()
    reader.feed(b"")
    assert [one.body for one in reader.requests] == [b"2", b"3"]


def test_its_secret_is_not_shown() -> None:
    _, reader = read(request(b"one"), request(b"two"))
    assert "Bearer" not in repr(reader) + repr(reader._known) + repr(reader._known.head)  # type: ignore[union-attr]
