"""A client made of a bare socket: sees every byte, every write boundary and every ending."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.provider import StandInProvider

TIMEOUT_SECONDS = 5.0


class RawClient:
    """One connection; `reads` keeps the blocks as the socket delivered them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.reads: list[bytes] = []
        self.buffer = b""

    async def send(self, body: object, path: str = "/v1/chat/completions", **headers: str) -> None:
        """Send one request; `body` is JSON-encoded unless it is bytes. None means GET."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: test"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(raw)}")
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        self.writer.write(head if body is None else head + raw)
        await self.writer.drain()

    async def more(self) -> bytes:
        """The next block of bytes, b"" at the end. Raises ConnectionResetError on a reset."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            block = await self.reader.read(1 << 20)
        self.reads.append(block)
        self.buffer += block
        return block

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`; raises EOFError if it does not come."""
        while mark not in self.buffer:
            if not await self.more():
                raise EOFError(f"no {mark!r} in {self.buffer!r}")
        taken, _, self.buffer = self.buffer.partition(mark)
        return taken + mark

    async def take(self, size: int) -> bytes:
        """Exactly `size` bytes; raises EOFError if they do not come."""
        while len(self.buffer) < size:
            if not await self.more():
                raise EOFError(f"{len(self.buffer)} of {size} bytes")
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return taken

    async def to_end(self) -> bytes:
        """Everything until the server closes."""
        while await self.more():
            pass
        taken, self.buffer = self.buffer, b""
        return taken

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (lower-case names) of the next answer."""
        first, *lines = (await self.until(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}

    async def chunked(self) -> bytes:
        """A body in the chunked transfer encoding, to its proper end."""
        body = b""
        while size := int(await self.until(b"\r\n"), 16):
            body += await self.take(size)
            await self.take(2)
        await self.take(2)
        return body

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One complete answer, whatever its encoding."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, await self.chunked()
        if "content-length" in headers:
            return status, headers, await self.take(int(headers["content-length"]))
        return status, headers, await self.to_end()


@asynccontextmanager
async def connected(provider: StandInProvider) -> AsyncIterator[RawClient]:
    """A client connected to `provider`, closed afterwards."""
    reader, writer = await asyncio.open_connection(provider.host, provider.port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()


def chat(content: object = "hi", **fields: object) -> dict[str, object]:
    """A chat request with one user message."""
    return {"model": "sandbox", "messages": [{"role": "user", "content": content}], **fields}


def streamed(content: object = "hi", **fields: object) -> dict[str, object]:
    """A streamed chat request."""
    return chat(content, stream=True, **fields)


def events(body: bytes) -> list[object]:
    """The JSON (or `[DONE]`) of each event of an SSE body that must be well-formed."""
    assert body.endswith(b"\n\n"), body[-80:]
    lines = [event.removeprefix("data:").strip() for event in body.decode().split("\n\n")[:-1]]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(chunks: list[object]) -> str:
    """The content that a chat stream adds up to."""
    choices = [c for chunk in chunks if isinstance(chunk, dict) for c in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
