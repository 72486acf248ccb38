"""Hears recalls: a workspace whose leases must come back, from whoever changed it or needs them.

Owns a subscription of its own, beside the pipelined connection. While it is not heard,
nothing is leased ahead.
"""

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting.contract.keyspace import RECALL_CHANNEL

_RETRY_SECONDS = 0.2
_CHECK_SECONDS = 0.5


async def listen(
    url: str,
    timeout_seconds: float,
    on_recall: Callable[[str], None],
    on_change: Callable[[bool], None],
) -> None:
    """Run for ever: call `on_recall` with each workspace id, `on_change` when heard or not.

    A subscription that answers no ping in time counts as not heard.
    """
    task = asyncio.current_task()
    assert task is not None
    while not task.cancelling():  # the client library may take a cancel for a time-out
        client = Redis.from_url(url, socket_connect_timeout=timeout_seconds)
        try:
            async with client.pubsub() as subscription:
                await subscription.subscribe(RECALL_CHANNEL)
                await _hear(subscription, on_recall, on_change)
        except (RedisError, OSError, TimeoutError):
            on_change(False)
            await asyncio.sleep(_RETRY_SECONDS)
        finally:
            on_change(False)
            await client.aclose()


async def _hear(
    subscription: object, on_recall: Callable[[str], None], on_change: Callable[[bool], None]
) -> None:
    unanswered = 0
    task = asyncio.current_task()
    assert task is not None
    while unanswered < 2 and not task.cancelling():
        message = await subscription.get_message(timeout=_CHECK_SECONDS)  # type: ignore[attr-defined]
        if message is None:
            unanswered += 1
            await subscription.ping()  # type: ignore[attr-defined]
            continue
        unanswered = 0
        if message["type"] == "subscribe":
            on_change(True)
        elif message["type"] == "message":
            on_recall(message["data"].decode())
    raise TimeoutError
