"""Answers of providers, any bytes cut anywhere: one reading, and never the answer of another."""

from typing import NamedTuple

from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzz.effort import search
from tests.fuzz.http_grammar import CUTS, cut, listed
from tests.proxy.test_upstream_connection import Use

_INTERIM = st.sampled_from(
    [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\n"]
)
_STATUS = st.sampled_from([200] * 6 + [204, 304, 404, 429, 500, 101])
_FIELDS = st.lists(
    st.sampled_from(
        listed(
            """content-type: text/event-stream|connection: close|Connection: keep-alive
    keep-alive: timeout=5|retry-after: 3|x: a|x: b|server:"""
        )
    ),
    max_size=3,
)
_LINES = """content-length: 3|content-length: 1, 1|content-length : 3|content-length: -1
    content-length: 99999999999999|transfer-encoding: gzip|transfer-encoding: chunked
    upgrade: h2c\r\aconnection: upgrade|x|: x| fold|HTTP/1.1 200 OK|HTTP/2 200||0\r\a|5|zz
    ffffffffffffffff"""
_WORDS = st.sampled_from([line + b"\r\n" for line in listed(_LINES)] + listed("\a|\r|\0| |\xff"))


@st.composite
def _answers(draw: st.DrawFn) -> bytes:
    """One valid answer."""
    body = draw(st.binary(max_size=40))
    status, fields = draw(_STATUS), draw(_FIELDS)
    form = draw(st.integers(0, 4))
    if status in (101, 204, 304):
        body = b""
    elif form == 0:
        fields.append(b"connection: close")  # until it closes
    elif form < 3:
        fields.append(b"Content-Length: %d" % len(body))
    else:
        fields.append(b"Transfer-Encoding: chunked")
        size = draw(st.integers(1, 20))
        pieces = [body[n : n + size] for n in range(0, len(body), size)]
        trailer = draw(st.sampled_from([b"", b"x-sum: 1\r\n"]))
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        body += b"0\r\n" + trailer + b"\r\n"
    head = b"".join(line + b"\r\n" for line in [b"HTTP/1.1 %d Status" % status, *fields])
    return draw(_INTERIM) + head + b"\r\n" + body


@st.composite
def _bytes(draw: st.DrawFn) -> bytes:
    data = b"".join(draw(st.lists(_answers(), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        if draw(st.booleans()):
            at = data.rfind(b"\r\n", 0, at) + 2 if b"\r\n" in data[:at] else at
        data = data[:at] + draw(_WORDS) + data[at + draw(st.integers(0, 3)) :]
    return data


class Told(NamedTuple):
    """What the one who asked was told, and whether the connection may be used again."""

    ended: str
    status: int
    headers: dict[bytes, bytes]
    body: bytes
    kept: bool


def answer(pieces: list[bytes], closes: bool) -> Told:
    """One use of a fresh connection; the rest of the bytes come when nobody waits any more."""
    use = Use()
    for piece in pieces:
        if not use.wire.closed:
            use.connection.data_received(piece)
            assert not (use.kept and use.connection.user)
    kept = bool(use.kept) and not use.wire.closed
    if closes and not use.ended:
        use.closes()
    return Told(use.ended, use.status, use.headers, use.body, kept)


@search(400)
@given(_bytes(), CUTS, st.booleans())
def test_an_answer_cut_anywhere_is_the_same_answer(
    data: bytes, places: list[int], closes: bool
) -> None:
    whole = answer([data], closes)
    event(f"{whole.ended or 'waits'} {whole.status}")
    assert not (whole.kept and whole.ended != "end")
    for pieces in (cut(data, places), [data[n : n + 1] for n in range(len(data))]):
        found = answer(pieces, closes)
        if whole.ended == "garbled":
            # What came before the fault may be told; a whole answer before it may stand.
            assert found.ended in ("garbled", "end") and not found.kept
            assert found.body.startswith(whole.body)
        else:
            assert found[:-1] == whole[:-1]
            assert found.kept <= whole.kept  # empty lines that come alone are one too many


@search(200)
@given(st.lists(_answers(), min_size=1, max_size=4), CUTS)
def test_a_valid_answer_is_told_as_it_was_said(said: list[bytes], places: list[int]) -> None:
    """Each on its own turn: the next begins only where the last has ended."""
    use = Use()
    for data in said:
        if use.wire.closed or use.connection.user is not None:
            return
        use.take()
        for piece in cut(data, places):
            if not use.wire.closed:
                use.connection.data_received(piece)
        if b"connection: close" in data and not use.ended:
            use.closes()
        if b" 101 " in data:
            assert use.ended in ("garbled", "lost", "")
            return
        assert use.ended == "end" and b" %d " % use.status in data
        assert b"x-sum" not in use.headers and b"link" not in use.headers
