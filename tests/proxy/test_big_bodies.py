"""A big prompt costs a bounded multiple of its bytes, from its first piece to what is sent."""

import json
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from accounting.contract.settings import Settings
from proxy.request_head import body_for, has_audio, input_bound, parse
from proxy.request_reader import RequestReader
from proxy.sse import EventSplitter

MIB = 1024 * 1024
BODY_BYTES = 8 * MIB
PIECE_BYTES = 65_536
BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "some words " * (BODY_BYTES // 11)}]}
).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


def whole() -> Iterator[bytes]:
    """The body as one, announced by its length."""
    yield HEAD + b"content-length: %d\r\n\r\n" % len(BODY)
    for at in range(0, len(BODY), PIECE_BYTES):
        yield BODY[at : at + PIECE_BYTES]


def chunked() -> Iterator[bytes]:
    """The body in chunks that end anywhere in what is read at a time."""
    yield HEAD + b"transfer-encoding: chunked\r\n\r\n"
    for at in range(0, len(BODY), PIECE_BYTES):
        piece = BODY[at : at + PIECE_BYTES]
        yield b"%x\r\n%b" % (len(piece), piece)
        yield b"\r\n"
    yield b"0\r\n\r\n"


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    """The most memory that was in use at a time since the test began."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()


@pytest.mark.parametrize("pieces", [whole, chunked])
def test_a_big_prompt_is_there_three_times_at_most(
    pieces: Callable[[], Iterator[bytes]], peak: Callable[[], int]
) -> None:
    reader = RequestReader(Settings())
    for piece in pieces():
        reader.feed(piece)
    (request,) = reader.requests
    head = parse(request.body)
    assert input_bound(request.body, head, 10**9) == len(BODY) + 32
    assert not has_audio(request.body)
    sent = body_for(head, "there")
    assert len(BODY) < peak() <= 3 * len(BODY)
    assert json.loads(sent) == json.loads(BODY) | {"model": "there"}


def test_an_event_that_does_not_end_is_kept_about_once(peak: Callable[[], int]) -> None:
    splitter = EventSplitter(BODY_BYTES)
    for _ in range(BODY_BYTES // PIECE_BYTES):
        assert splitter.whole_events(b"x" * PIECE_BYTES) == b""
    assert peak() <= 1.5 * BODY_BYTES
