"""The two ends of a conversation with the proxy, each on a bare socket under the test's hand.

`client >> request` writes what a client says; `await client.answer()` or `client.event()` is
what it then reads. `upstream >> bytes` writes what a provider says; `await upstream.hears()`
is the request it got. Nothing is written, retried or closed that the test does not ask for.
"""

import asyncio
import json
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Self

TIMEOUT_SECONDS = 10.0
CHAT = "/v1/chat/completions"
_LINE_END = re.compile("\r\n|\n|\r")
_RESET = struct.pack("ii", 1, 0)


@dataclass
class Answer:
    """One HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    repeated: list[str] = field(default_factory=list)

    @property
    def json(self) -> Any:
        """Figures with a point are exact."""
        return json.loads(self.body, parse_float=Decimal)

    @property
    def events(self) -> list[Any]:
        return read_events(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a well-formed envelope."""
        assert self.headers["content-type"] == "application/json", self
        error: dict[str, Any] = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"}, error
        assert error["message"] and isinstance(error["message"], str)
        if "request_id" in error:
            assert error["request_id"] == self.headers["x-request-id"]
        return error

    @property
    def refused(self) -> tuple[int, str]:
        """Status and code of an error."""
        return self.status, self.error["code"]


def read_events(body: bytes) -> list[Any]:
    """The data of each event, decoded unless `[DONE]`; comments as `:…` strings.

    Lines end as the specification allows; what does not end in an empty line is an error.
    """
    lines = _LINE_END.split(body.decode())
    assert lines[-1] == "" and lines[-2:] in ([""], ["", ""]), body[-100:]
    found: list[Any] = []
    data: list[str] = []
    for line in lines:
        if line.startswith(":"):
            found.append(line)
        elif line:
            assert line.startswith("data:"), line[:200]
            data.append(line.removeprefix("data:").removeprefix(" "))
        elif data:
            text, data = "\n".join(data), []
            found.append(text if text == "[DONE]" else json.loads(text, parse_float=Decimal))
    return found


class End:
    """One socket, with the bytes read from it and not yet taken."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.buffer = bytearray()

    def __rshift__(self, data: bytes) -> Self:
        self.writer.write(data)
        return self

    async def more(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            block = await self.reader.read(1 << 20)
        self.buffer += block
        return block

    async def until(self, mark: bytes) -> bytes:
        start = 0
        while (at := self.buffer.find(mark, start)) < 0:
            start = max(0, len(self.buffer) - len(mark))
            if not await self.more():
                raise EOFError(f"no {mark!r} in {bytes(self.buffer[:1000])!r}")
        return self._taken(at + len(mark))

    async def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            if not await self.more():
                raise EOFError(f"{len(self.buffer)} of {size} bytes")
        return self._taken(size)

    def _taken(self, size: int) -> bytes:
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    async def rest(self) -> bytes:
        """Everything until the other side closes, or resets."""
        try:
            while await self.more():
                continue
        except ConnectionResetError:
            self.writer.transport.abort()
        return self._taken(len(self.buffer))

    async def left(self) -> bool:
        """True once the other side has gone without another word."""
        return await self.rest() == b""

    def leave(self) -> None:
        """Be gone at once."""
        self.writer.transport.abort()

    def reset(self) -> None:
        """Be gone with a TCP reset."""
        connection: socket.socket = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()

    def close(self) -> None:
        """Close in order, after what was written."""
        self.writer.close()

    async def flushed(self) -> None:
        """Let what was written reach the other side as a segment of its own."""
        connection: socket.socket = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await self.writer.drain()
        for _ in range(4):  # the proxy shares this loop: it reads in its next turn
            await asyncio.sleep(0)

    async def head(self) -> tuple[bytes, dict[str, str], list[str]]:
        """First line, headers by lower-case name, and the names that came twice."""
        first, *lines = (await self.until(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers: dict[str, str] = {}
        repeated = []
        for line in lines:
            name, _, value = line.decode("latin-1").partition(": ")
            repeated += [name.lower()] if name.lower() in headers else []
            headers[name.lower()] = value
        return first, headers, repeated

    async def chunk(self) -> bytes:
        """One HTTP chunk; empty at the end of the body."""
        size = int(await self.until(b"\r\n"), 16)
        data = await self.take(size)
        assert await self.take(2) == b"\r\n"
        return data


class Client(End):
    """A client of the proxy."""

    _events = b""

    async def status(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer; its body is still to be read."""
        first, headers, repeated = await self.head()
        assert not repeated, repeated
        assert first.startswith(b"HTTP/1.1 "), first
        return int(first.split()[1]), headers

    async def answer(self) -> Answer:
        """The next answer, read to its end."""
        status, headers = await self.status()
        if headers.get("transfer-encoding") == "chunked":
            assert "content-length" not in headers
            pieces = []
            while data := await self.chunk():
                pieces.append(data)
            body = b"".join(pieces)
        elif "content-length" in headers:
            body = await self.take(int(headers["content-length"]))
        else:
            body = await self.rest()
        return Answer(status, headers, body)

    async def event(self) -> Any:
        """The next event of a chunked stream whose head has been read; None at its end."""
        while b"\n\n" not in self._events:
            data = await self.chunk()
            if not data:
                return None
            self._events += data
        event, _, self._events = self._events.partition(b"\n\n")
        return read_events(event + b"\n\n")[0]


@dataclass
class Asked:
    """A request as a provider got it."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Upstream(End):
    """A provider's end of one connection of the proxy."""

    async def hears(self) -> Asked:
        """The next request on this connection."""
        first, headers, repeated = await self.head()
        assert not repeated
        body = await self.take(int(headers["content-length"]))
        return Asked(first.decode(), headers, body)


class Provider:
    """A listening provider whose every byte is written by the test."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[Upstream] = asyncio.Queue()
        self._all: list[Upstream] = []

    @property
    def calls(self) -> int:
        """How many connections were opened to it so far."""
        return len(self._all)

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._called, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = Upstream(reader, writer)
        self._all.append(call)
        self._calls.put_nowait(call)

    async def call(self) -> Upstream:
        """The next connection that the proxy opens."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await self._calls.get()

    async def stop(self) -> None:
        self._server.close()
        for call in self._all:
            call.leave()
        await self._server.wait_closed()


# What clients say


def request(
    secret: str,
    body: object = None,
    method: str = "POST",
    path: str = CHAT,
    version: str = "1.1",
    **headers: str,
) -> bytes:
    """One request as bytes. `body`: JSON unless bytes; None for none."""
    raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: tollgate.test"]
    if secret:
        lines.append(f"Authorization: Bearer {secret}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def chat(content: str = "hi", model: str = "small", **fields: object) -> dict[str, object]:
    """The body of a chat completion."""
    fields.setdefault("max_tokens", 100)
    return {"model": model, "messages": [{"role": "user", "content": content}], **fields}


def standin(text: str = "", **script: object) -> str:
    """A message that scripts the stand-in provider: `fault="html"`, `chunks=3`…"""
    return text + f"[[standin {'; '.join(f'{k}={v}' for k, v in script.items())}]]"


# What providers say


def http(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP answer with its length."""
    headers.setdefault("content_type", "application/json")
    headers["content_length"] = str(len(body))
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return (
        f"HTTP/1.1 {status} Status\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    )


def plain(content: str = "Hello", usage: Mapping[str, int] | None = None) -> bytes:
    """A provider's whole plain answer."""
    body: dict[str, object] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "at-the-provider",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}],
    }
    if usage is not None:
        body["usage"] = dict(usage)
    return http(200, json.dumps(body).encode())


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
STREAM_END = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """`data` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(data: object) -> bytes:
    """One event in one HTTP chunk; strings as they are, all else as JSON."""
    text = data if isinstance(data, str) else json.dumps(data)
    return chunked(f"data: {text}\n\n".encode())


def delta(content: str = "", **more: object) -> dict[str, object]:
    """A content chunk of a stream."""
    finish = more.pop("finish", None)
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "at-the-provider",
        "choices": [choice],
        **more,
    }


def usage_chunk(prompt: int, completion: int) -> dict[str, object]:
    """The provider's chunk that carries usage and no choices."""
    return delta() | {"choices": [], "usage": usage(prompt, completion)}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


DONE = sse("[DONE]")
