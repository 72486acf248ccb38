"""Chunked bodies: the same however they are cut, and nothing two parsers could read differently."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.contract.errors import BodyTooLarge, Failure, MalformedHttp
from proxy.chunked import ChunkedBody

LIMIT = 1_000


def feed(pieces: list[bytes], limit: int = LIMIT) -> tuple[bytes, bytes | None]:
    """The body, and what follows it; None when it is not whole yet."""
    chunked = ChunkedBody(limit)
    rest: bytes | None = None
    for piece in pieces:
        rest = chunked.feed(piece) if rest is None else rest + piece
    return chunked.body, rest


GOOD = [
    (b"0\r\n\r\n", b""),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    (b"a\r\n0123456789\r\n000\r\n\r\n", b"0123456789"),
    (b"0005\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"5;name=value\r\nhello\r\n0;last\r\n\r\n", b"hello"),
    (b"5 ;name\r\nhello\r\n0\r\n\r\n", b"hello"),
    (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    (b"5\r\nhello\r\n0\r\nDigest: x\r\nOther: y\r\n\r\n", b"hello"),
]
BAD = [
    b"\r\n",
    b"x\r\n",
    b"-1\r\n",
    b"+5\r\nhello\r\n",
    b"0x5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b" 5\r\nhello\r\n",
    b"5_0\r\n",
    b";x\r\nhello\r\n",
    b"\xd9\xa5\r\nhello\r\n",  # a digit, but not of ours
    b"5\nhello\r\n0\r\n\r\n",
    b"5;a\nb\r\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"5\r\nhelloX\r\n0\r\n\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b"0\r\nno colon\r\n\r\n",
    b"0\r\n folded: x\r\n\r\n",
    b"0\r\n: x\r\n\r\n",
    b"0\r\na : x\r\n\r\n",
    b"0\r\na b: x\r\n\r\n",
    b"0\r\na: \0\r\n\r\n",
    b"5;a=\0\r\nhello\r\n",
    b"0\r\na: b\nc: d\r\n\r\n",
    b"1000000000000000\r\n",
    b"5;" + b"x" * 4100 + b"\r\nhello\r\n",
    b"0\r\na: " + b"x" * 4100 + b"\r\n\r\n",
    b"0\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    b"f" * 5000,
]


@pytest.mark.parametrize(("data", "body"), GOOD)
def test_a_body_cut_at_every_offset(data: bytes, body: bytes) -> None:
    data += b"GET / HTTP/1.1\r\n\r\n"
    for place in range(len(data) + 1):
        assert feed([data[:place], data[place:]]) == (body, b"GET / HTTP/1.1\r\n\r\n")
    assert feed([bytes([byte]) for byte in data]) == (body, b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize(("data", "body"), GOOD)
def test_an_unfinished_body_waits(data: bytes, body: bytes) -> None:
    for place in range(len(data)):
        assert feed([data[:place]])[1] is None


@pytest.mark.parametrize("data", BAD)
def test_what_is_malformed_is_refused_however_it_is_cut(data: bytes) -> None:
    for pieces in ([data], [bytes([byte]) for byte in data]):
        with pytest.raises(MalformedHttp):
            feed(pieces)
    for place in range(min(len(data), 40)):
        with pytest.raises(MalformedHttp):
            feed([data[:place], data[place:]])


def test_the_body_is_bounded_by_what_it_announces() -> None:
    assert feed([b"%x\r\n%b\r\n0\r\n\r\n" % (LIMIT, b"x" * LIMIT)]) == (b"x" * LIMIT, b"")
    with pytest.raises(BodyTooLarge):
        feed([b"%x\r\n" % (LIMIT + 1)])
    with pytest.raises(BodyTooLarge):
        feed([b"1\r\nx\r\n" * (LIMIT + 1)])
    with pytest.raises(BodyTooLarge):
        feed([b"fffffffffffffff\r\n"])


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 400)))
def test_any_body_cut_anywhere(parts: list[bytes], places: list[int]) -> None:
    data = b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]) + b"0\r\n\r\n"
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    assert feed([data[a:b] for a, b in pairwise(bounds)]) == (b"".join(parts), b"")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([b"5", b"\r\n", b"hello", b"0", b"\n", b";", b"a:b", b" "])), st.data()
)
def test_a_verdict_does_not_depend_on_the_cuts(words: list[bytes], chance: st.DataObject) -> None:
    data = b"".join(words)
    place = chance.draw(st.integers(0, len(data)))
    assert verdict([data]) == verdict([data[:place], data[place:]])


def verdict(pieces: list[bytes]) -> object:
    try:
        return feed(pieces)
    except Failure as failure:
        return type(failure)
