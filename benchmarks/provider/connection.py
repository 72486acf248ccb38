"""One client connection of the stand-in provider: HTTP/1.1 in, answers out, in order.

Owns parsing, keep-alive, pipelining, back-pressure and how a connection ends. Leaves
what to answer to the provider (`answer`), and when to `pace`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httptools

from benchmarks.provider import answers
from benchmarks.provider.framing import Ending, Step, whole
from benchmarks.provider.pace import Delivery

if TYPE_CHECKING:
    from benchmarks.provider.server import StandInProvider

MAX_WAITING_REQUESTS = 64
MAX_BODY_BYTES = 64 * 1024 * 1024
LINGER_AND_RESET = struct.pack("ii", 1, 0)


class Request:
    """One request as it came; `headers` has lower-case names."""

    __slots__ = ("body", "keep_alive", "method", "path", "raw_headers", "script_text", "version")

    def __init__(
        self,
        method: str,
        path: str,
        raw_headers: list[tuple[bytes, bytes]],
        body: bytes,
        script_text: str | None,
        keep_alive: bool,
        version: str,
    ) -> None:
        self.method = method
        self.path = path
        self.raw_headers = raw_headers
        self.body = body
        self.script_text = script_text
        self.keep_alive = keep_alive
        self.version = version

    @property
    def headers(self) -> dict[str, str]:
        """Header values by lower-case name; the last of a repeated name."""
        return {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in self.raw_headers}

    def __repr__(self) -> str:
        return f"Request({self.method} {self.path}, {len(self.body)} bytes)"


class ProviderConnection(asyncio.Protocol):
    """The protocol object of one accepted connection."""

    def __init__(self, provider: StandInProvider) -> None:
        self.transport: asyncio.Transport
        self._provider = provider
        self._parser = httptools.HttpRequestParser(self)
        self._delivery: Delivery | None = None
        self._current: Request | None = None
        self._waiting: deque[Request] = deque()
        self._blocked = False
        self._closing = False
        self._reading = True
        self._forget_request()

    def _forget_request(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._script_text: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._provider.connection_opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        left = len(self._waiting)
        self._waiting.clear()
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None
            left += 1
        self._closing = True
        self._provider.connection_closed(self, left)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "Upgrades are not supported.")
        except httptools.HttpParserError as problem:
            self._refuse(400, f"Not HTTP: {problem}")

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        if len(name) == 9 and name.lower() == b"x-standin":
            self._script_text = value.decode("latin-1")
        elif len(name) == 6 and name.lower() == b"expect" and self._delivery is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._refuse(413, "The body is too large.")
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._closing:
            return
        parser, body = self._parser, self._body
        request = Request(
            parser.get_method().decode(),
            self._url.decode("latin-1"),
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
            self._script_text,
            parser.should_keep_alive(),
            parser.get_http_version(),
        )
        self._forget_request()
        if self._delivery is None and not self._blocked:
            self._answer(request)
        else:
            self._wait(request)

    def _wait(self, request: Request) -> None:
        self._waiting.append(request)
        if self._reading and len(self._waiting) >= MAX_WAITING_REQUESTS:
            self._reading = False
            self.transport.pause_reading()

    def _answer(self, request: Request) -> None:
        answer = self._provider.answer(request)
        self._current = request
        if answer.__class__ is bytes:
            self.transport.write(answer)
            if not request.keep_alive:
                self._close()
        else:
            self._deliver(answer)  # type: ignore[arg-type]

    def _deliver(self, steps: Iterator[Step]) -> None:
        self._delivery = Delivery(self, self._provider.metronome, steps)
        self._delivery.advance()

    def answer_ended(self, ending: Ending) -> None:
        """The delivery has done its last step."""
        if ending is Ending.HANG:
            return
        self._delivery = None
        if ending is Ending.RESET:
            self._reset()
        elif ending is Ending.CLOSE or (self._current and not self._current.keep_alive):
            self._close()
        else:
            self._answer_waiting()

    def _answer_waiting(self) -> None:
        while self._waiting and self._delivery is None and not (self._blocked or self._closing):
            self._answer(self._waiting.popleft())
        if not self._reading and not self._closing and len(self._waiting) < MAX_WAITING_REQUESTS:
            self._reading = True
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self._blocked = True
        if self._delivery is not None:
            self._delivery.blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        if self._delivery is not None:
            self._delivery.resume()
        else:
            self._answer_waiting()

    def _refuse(self, status: int, message: str) -> None:
        if not self._closing:
            self.transport.write(whole(status, answers.error_body(status, message)))
            self._close()

    def _close(self) -> None:
        self._closing = True
        self._waiting.clear()
        self.transport.close()

    def _reset(self) -> None:
        """Close with a TCP reset: what is unsent is dropped, the peer sees ECONNRESET."""
        self._closing = True
        self._waiting.clear()
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_AND_RESET)
        self.transport.abort()

    def abort(self) -> None:
        """Drop the connection because the provider stops."""
        if self._delivery is not None:
            self._delivery.cancel()
            self._delivery = None
        self._waiting.clear()
        self.transport.abort()
