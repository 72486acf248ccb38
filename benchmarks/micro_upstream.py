"""The hot steps on a connection to a provider: a plain answer read, one chunk read.

Owns what stands in for the pool, the socket and the exchange. See `micro`.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

from benchmarks.provider.framing import http_chunk, whole
from proxy.upstream_connection import UpstreamConnection

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


class NoPool:
    """Takes a connection back and does nothing with it."""

    def put_back(self, connection: UpstreamConnection) -> None:
        """It stays where it is."""

    def learned(self, connection: UpstreamConnection) -> None:
        """Nothing is remembered."""

    def closed(self, connection: UpstreamConnection) -> None:
        """Nothing is counted."""


class NoTransport:
    """A transport that is always open and has nothing unsent."""

    def __init__(self, opened: socket.socket) -> None:
        self._opened = opened

    def get_extra_info(self, name: str) -> socket.socket | None:
        """The socket."""
        return self._opened if name == "socket" else None

    def is_closing(self) -> bool:
        """It is open."""
        return False

    def get_write_buffer_size(self) -> int:
        """Nothing is unsent."""
        return 0

    def writelines(self, pieces: list[bytes]) -> None:
        """Nothing is sent."""

    def abort(self) -> None:
        """Nothing to close."""


class Reader:
    """Whoever waits for the answer: counts what it gets."""

    def __init__(self) -> None:
        self.heads = self.body_bytes = self.ends = 0

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """One head."""
        self.heads += 1

    def upstream_body(self, data: bytes) -> None:
        """Some of a body."""
        self.body_bytes += len(data)

    def upstream_end(self) -> None:
        """The end of an answer."""
        self.ends += 1

    def upstream_lost(self, garbled: bool) -> None:
        """A step that cannot read what it is given measures nothing."""
        raise AssertionError("the answer was not understood")


@contextlib.contextmanager
def upstream_calls(
    body: bytes, event: bytes, reader: Reader
) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Two calls: read a whole plain answer with `body`; read one chunk that is `event`."""
    answer, chunk = whole(200, body), http_chunk(event)
    with socket.socket() as opened:
        plain, streamed = (UpstreamConnection(NoPool()) for _ in range(2))
        for connection in (plain, streamed):
            connection.connection_made(NoTransport(opened))
            connection.user = reader
        streamed.data_received(STREAM_HEAD)

        def read_answer() -> None:
            plain.user = reader
            plain.data_received(answer)

        yield read_answer, lambda: streamed.data_received(chunk)
