"""Answers of providers, cut at every offset, early, odd and endless: what a connection makes of
them, and whether it may carry another request."""

import asyncio
from typing import Any

import pytest

from proxy.turn_end import TurnEnd
from proxy.upstream_connection import UpstreamConnection
from tests.proxy.ends import STREAM_END, STREAM_HEAD, http, sse

BODY = b'{"answer": 42}'
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WHOLE = CHUNKED + b"7\r\n" + BODY[:7] + b"\r\n7;why=not\r\n" + BODY[7:] + b"\r\n0\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.reading = True
        self.unsent = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def setsockopt(self, *option: int) -> None:
        self.option = option

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def writelines(self, pieces: Any) -> None:
        self.written = b"".join(pieces)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


class Use:
    """A pool and a user in one; `story` is what they were told."""

    def __init__(self, *, pause: bool = False) -> None:
        self.wire = Wire()
        self.kept = 0
        self.learnt = 0
        self.pause = pause
        self.turn_end: TurnEnd | None = None
        self.connection = UpstreamConnection(self)  # type: ignore[arg-type]
        self.connection.connection_made(self.wire)
        self.take()

    def take(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.ended = ""
        self.connection.user = self  # type: ignore[assignment]

    def says(self, data: bytes, step: int = 0) -> None:
        """What the provider says, in blocks of `step` bytes."""
        for start in range(0, len(data), step or len(data)):
            if not self.wire.closed:
                self.connection.data_received(data[start : start + (step or len(data))])

    def closes(self, error: Exception | None = None) -> None:
        self.wire.closed = True
        self.connection.connection_lost(error)

    # The pool

    def put_back(self, connection: UpstreamConnection) -> None:
        self.kept += 1

    def closed(self, connection: UpstreamConnection) -> None:
        self.kept = 0

    def learned(self, connection: UpstreamConnection) -> None:
        self.learnt += 1

    # The user

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert not self.status and not self.ended
        self.status, self.headers = status, dict(headers)

    def upstream_body(self, data: bytes) -> None:
        assert self.status and not self.ended and data
        self.body += data
        if self.pause:
            self.connection.pause()

    def upstream_end(self) -> None:
        assert self.status and not self.ended
        self.ended = "end"

    def upstream_lost(self, garbled: bool) -> None:
        assert not self.ended
        self.ended = "garbled" if garbled else "lost"

    @property
    def outcome(self) -> tuple[str, int, bytes]:
        return self.ended, self.status, self.body


ANSWERS = {
    "length": http(200, BODY),
    "chunked": WHOLE + b"\r\n",
    "trailers": WHOLE + b"X-Checksum: 1\r\nx-usage: 3\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + http(200, BODY),
    "hints": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 3 + http(200, BODY),
    "stream": STREAM_HEAD + sse("x") + STREAM_END,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
}
BODIES = {"stream": b"data: x\n\n", "no content": b""}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_the_same_however_it_is_cut(name: str) -> None:
    answer = ANSWERS[name]
    wanted = ("end", 204 if name == "no content" else 200, BODIES.get(name, BODY))
    for cut in range(1, len(answer)):
        use = Use()
        use.says(answer[:cut])
        assert not use.ended and not use.kept
        use.says(answer[cut:])
        assert use.outcome == wanted, cut
        assert use.kept == use.learnt == 1
        assert b"link" not in use.headers and b"x-checksum" not in use.headers


@pytest.mark.parametrize("step", [1, 7, 0])
def test_a_connection_carries_answer_after_answer(step: int) -> None:
    use = Use()
    for number, name in enumerate(ANSWERS, 1):
        use.take()
        use.says(ANSWERS[name], step)
        assert (use.ended, use.kept, use.learnt) == ("end", number, 1)
        assert use.connection.reused and not use.connection.heard


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (http(200, BODY, connection="close"), BODY),
        (http(200, BODY).replace(b"HTTP/1.1", b"HTTP/1.0"), BODY),
        (WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1) + b"\r\n", BODY),
    ],
)
def test_what_is_to_close_is_not_kept(answer: bytes, body: bytes) -> None:
    use = Use()
    use.says(answer)
    assert use.outcome == ("end", 200, body)
    assert use.wire.closed and not use.kept


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_without_a_length_the_close_is_the_end(version: bytes) -> None:
    head = b"HTTP/%b 200 OK\r\ncontent-type: application/json\r\n\r\n" % version
    whole, broken = Use(), Use()
    for use in (whole, broken):
        use.says(head + BODY, 5)
        assert not use.ended
    whole.closes()
    assert whole.outcome == ("end", 200, BODY) and not whole.kept
    broken.closes(ConnectionResetError())
    assert broken.ended == "lost"


@pytest.mark.parametrize("name", ["length", "chunked", "trailers", "stream"])
def test_a_cut_answer_is_lost(name: str) -> None:
    answer = ANSWERS[name]
    for cut in range(len(answer)):
        use = Use()
        if cut:
            use.says(answer[:cut])
        use.closes()
        assert use.ended == "lost", cut


GARBLED = {
    "not HTTP": b"SSH-2.0-OpenSSH_9\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n\0\0",
    "both lengths": CHUNKED.replace(b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n") + b"0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    "a bad length": b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\nhello",
    "a bad chunk": CHUNKED + b"xyz\r\n",
    "a coding": CHUNKED.replace(b": chunked", b": gzip, chunked") + b"0\r\n\r\n",
    "a second coding": CHUNKED.replace(b"transfer", b"transfer-encoding: gzip\r\ntransfer"),
    "a folded line": b"HTTP/1.1 200 OK\r\na: b\r\n c\r\ncontent-length: 0\r\n\r\n",
}


@pytest.mark.parametrize("step", [1, 0])
@pytest.mark.parametrize("name", GARBLED)
def test_what_is_not_understood_is_garbled(name: str, step: int) -> None:
    use = Use()
    use.says(GARBLED[name], step)
    assert use.ended == "garbled" and use.wire.closed and not use.kept


ENDLESS = {
    "a head": (b"HTTP/1.1 200 OK\r\n", b"x-%d: y\r\n"),
    "one header": (b"HTTP/1.1 200 OK\r\nx: ", b"abcdefgh%d"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\nx: %d\r\n\r\n"),
    "trailers": (WHOLE, b"x-%d: y\r\n"),
    "a chunk's extension": (CHUNKED + b"7;", b"abcdefgh%d"),
}


@pytest.mark.parametrize("block", [40, 16_384])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_brings_no_body_is_bounded(name: str, block: int) -> None:
    use = Use()
    start, more = ENDLESS[name]
    if start:
        use.says(start)
    said = 0
    while not use.ended and said < 1_000_000:
        piece = b"".join(more % number for number in range(block // len(more)))
        use.says(piece)
        said += len(piece)
    assert use.ended == "garbled" and use.wire.closed
    assert said <= 65_536 + block


def test_a_header_that_comes_twice_is_a_list() -> None:
    use = Use()
    use.says(http(200, BODY, content_encoding="identity\r\nContent-Encoding: gzip"))
    assert use.headers[b"content-encoding"] == b"identity, gzip"


def test_a_long_stream_of_small_blocks_is_not_taken_for_mute() -> None:
    use = Use()
    use.says(STREAM_HEAD)
    for _ in range(20_000):
        use.says(b"3\r\n")
        use.says(b"abc\r\n")
    use.says(STREAM_END)
    assert (use.ended, len(use.body), use.kept) == ("end", 60_000, 1)


async def test_an_answer_before_its_request_was_sent_out_ends_the_connection() -> None:
    """What is still unsent would go before the next request."""
    use = Use()
    use.turn_end = TurnEnd(asyncio.get_running_loop())
    use.connection.send(b"head", b"body")
    use.wire.unsent = 1
    use.says(http(413, BODY))
    assert use.outcome == ("end", 413, BODY)
    assert use.wire.closed and not use.kept


def test_a_kept_connection_listens() -> None:
    use = Use(pause=True)
    use.says(STREAM_HEAD + sse("x"))
    assert not use.wire.reading
    use.says(STREAM_END)  # was on its way
    assert use.wire.reading and use.kept == 1


@pytest.mark.parametrize("rest", [b"", BODY[:3], BODY], ids=len)
async def test_a_user_that_needs_only_the_head_gets_no_more(rest: bytes) -> None:
    class Hasty(Use):
        def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
            super().upstream_head(status, headers)
            self.connection.release()

    use = Hasty()
    answer = http(503, BODY)
    cut = len(answer) - len(BODY) + len(rest)
    use.says(answer[:cut])
    if answer[cut:]:
        use.says(answer[cut:])
    assert use.outcome == ("", 503, b"") and use.kept == 1 and not use.wire.closed


@pytest.mark.parametrize("word", [b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"\0", b"\r\n"])
def test_an_idle_connection_that_speaks_is_closed(word: bytes) -> None:
    use = Use()
    use.says(http(200, BODY))
    use.says(word)
    assert use.wire.closed and use.outcome == ("end", 200, BODY)
