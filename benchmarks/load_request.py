"""What a load asks: where requests go, and what each of them is."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec


class Target(NamedTuple):
    """Where requests go and what each of them is, byte for byte."""

    host: str
    port: int
    request: bytes


class Ask(NamedTuple):
    """One request of a load that asks different things.

    streamed     the answer is SSE
    leave_after  hang up after so many chunks
    fault        the stand-in will fail it: however it ends is well
    events       how many events its stream has; any missing are counted
    """

    request: bytes
    streamed: bool = False
    leave_after: int | None = None
    fault: bool = False
    events: int | None = None


def target_for(
    base_url: str,
    body: dict[str, object],
    key: str = "none",
    path: str = "/chat/completions",
    headers: dict[str, str] | None = None,
) -> Target:
    """A POST of `body` to `path` below `base_url` (http only) with `key` as bearer token."""
    url = urlsplit(base_url)
    if url.scheme != "http" or url.hostname is None:
        raise ValueError(f"the load client speaks plain http, not {base_url!r}")
    raw = msgspec.json.encode(body)
    port = url.port or 80
    lines = [
        f"POST {url.path.rstrip('/')}{path} HTTP/1.1",
        f"Host: {url.hostname}:{port}",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(raw)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return Target(url.hostname, port, "\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
