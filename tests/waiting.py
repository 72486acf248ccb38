"""Waiting without guessing: poll a condition with a bound, and find a free port.

Tests never sleep a fixed time in the hope that something has happened by then.
"""

import asyncio
import inspect
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

_POLL_SECONDS = 0.01


async def eventually(
    condition: Callable[[], Any | Awaitable[Any]], timeout_seconds: float = 5.0
) -> Any:
    """Return the first true answer of `condition` (a function or a coroutine function).

    Raises AssertionError with its last answer when none comes in time. An exception of the
    condition is not swallowed.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_seconds} s, but {answer!r}")
        await asyncio.sleep(_POLL_SECONDS)


def eventually_blocking(condition: Callable[[], Any], timeout_seconds: float = 5.0) -> Any:
    """The same for tests without an event loop."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {timeout_seconds} s, but {answer!r}")
        time.sleep(_POLL_SECONDS)


def free_port() -> int:
    """A loopback TCP port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
