"""The client's side of HTTP/1.1: one request at a time, an answer noted as its bytes come in.

Owns sending and reading. What is asked, and when its client leaves, is `load`'s.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Self

import httptools

READ_BYTES, SMALL_READ_BYTES, SLOW_READS = 65536, 64, 300


class Answer:
    """What has been read of one answer; `complete` once its last byte is."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httptools.HttpParserError for what is not HTTP."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def stays_open(self) -> bool:
        return self.complete and self.headers.get("connection", "").lower() != "close"

    def json(self) -> Any:
        """Its body; exact decimals."""
        return json.loads(bytes(self.body), parse_float=Decimal)


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Self:
        """Raises OSError."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def read_into(self, answer: Answer, dice: random.Random | None = None) -> None:
        """Until the answer is complete or the connection ends; with dice slowly, for a while.

        Raises OSError when the connection is reset.
        """
        slowly = SLOW_READS if dice else 0
        while not answer.complete:
            data = await self._reader.read(SMALL_READ_BYTES if slowly else READ_BYTES)
            if not data:
                return
            answer.feed(data)
            if dice and slowly:
                slowly -= 1
                await asyncio.sleep(dice.uniform(0, 0.02))

    def leave(self, abruptly: bool = False) -> None:
        if abruptly:
            self._writer.transport.abort()
        else:
            self._writer.close()


def request(
    method: str, path: str, token: str, body: object = None, more: Mapping[str, str] | None = None
) -> bytes:
    """A whole request, its body as JSON."""
    raw = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: gateway", f"authorization: Bearer {token}"]
    lines += ["content-type: application/json", f"content-length: {len(raw)}"]
    lines += [f"{name}: {value}" for name, value in (more or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + raw


async def ask(port: int, data: bytes, seconds: float) -> Answer:
    """One answer on a connection of its own. Raises OSError, also when it takes too long."""
    async with asyncio.timeout(seconds):
        wire = await Wire.open(port)
        try:
            wire.send(data)
            answer = Answer()
            await wire.read_into(answer)
        finally:
            wire.leave(abruptly=True)
    if not answer.complete:
        raise ConnectionError("the answer was cut")
    return answer
