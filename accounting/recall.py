"""Recall leases: from the return on, no worker admits on what it took before a change.

A worker may hold credits, requests and slots it leased ahead, and admit from them without
asking. Whoever tightens what a workspace or key may do changes Redis first, then recalls.
"""

import asyncio

from redis.asyncio import Redis

from accounting.contract import keyspace, scripts

_LOOK_SECONDS = 0.002
_LONGEST_SECONDS = 1.5  # longer than any right to admit lasts


async def recall(redis: Redis, workspace_id: str) -> None:
    """Wait until nothing is leased ahead under the workspace, at most for a lease's life.

    What is behind requests in flight stays held. Raises redis.exceptions.RedisError.
    """
    workspace_key = keyspace.workspace_key(workspace_id)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _LONGEST_SECONDS
    while await scripts.call(redis, "ahead", [workspace_key], []):
        if loop.time() > deadline:
            return
        await redis.publish(keyspace.RECALL_CHANNEL, workspace_id)
        await asyncio.sleep(_LOOK_SECONDS)
