"""What went over a client's wire: every request it sent, every credit it was told of.

`Tap` and `AsyncTap` sit below the official client and copy what passes, so that retries and
the last events of broken streams, which the client hides from its caller, are seen as well.
"""

import json
import re
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import httpx2

_COMMENT = ": credits_used="
_LINE_END = re.compile("\r\n|\r|\n")  # no other character ends a line of a stream


class Sent:
    """One request and what came back; `body` grows while the answer is read."""

    def __init__(self, request: httpx2.Request, response: httpx2.Response) -> None:
        self.retry_count = int(request.headers.get("x-stainless-retry-count", 0))
        self.status = response.status_code
        self.headers = response.headers
        self.body = bytearray()

    @property
    def events(self) -> list[Any]:
        """The JSON events of a stream in order, amounts exact; without `[DONE]`."""
        datas = [line[6:] for line in self._lines() if line.startswith("data: ")]
        return [json.loads(data, parse_float=Decimal) for data in datas if data != "[DONE]"]

    @property
    def credits(self) -> Decimal:
        """What this answer said that it cost; zero when it said nothing."""
        if "x-credits-used" in self.headers:
            return Decimal(self.headers["x-credits-used"])
        told = [
            Decimal(line[len(_COMMENT) :]) for line in self._lines() if line.startswith(_COMMENT)
        ]
        if "text/event-stream" in self.headers["content-type"]:
            told += [Decimal(one["credits_used"]) for one in self.events if "credits_used" in one]
        assert len(told) <= 1, "an answer says once what it cost"
        return sum(told, Decimal(0))

    def _lines(self) -> list[str]:
        return _LINE_END.split(self.body.decode())


class Seen:
    """Everything one client sent."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.elsewhere = Decimal(0)  # credits told to a client without a tap

    @property
    def credits(self) -> Decimal:
        return sum((one.credits for one in self.sent), self.elsewhere)

    def note(self, request: httpx2.Request, response: httpx2.Response) -> bytearray:
        self.sent.append(Sent(request, response))
        return self.sent[-1].body


class Tap(httpx2.BaseTransport):
    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._wire = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._wire.handle_request(request)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Copied(response.stream, self._seen.note(request, response))
        return response

    def close(self) -> None:
        self._wire.close()


class AsyncTap(httpx2.AsyncBaseTransport):
    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._wire = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._wire.handle_async_request(request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _AsyncCopied(response.stream, self._seen.note(request, response))
        return response

    async def aclose(self) -> None:
        await self._wire.aclose()


class _Copied(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, copy: bytearray) -> None:
        self._stream = stream
        self._copy = copy

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._copy += part
            yield part

    def close(self) -> None:
        self._stream.close()


class _AsyncCopied(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, copy: bytearray) -> None:
        self._stream = stream
        self._copy = copy

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self._copy += part
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
