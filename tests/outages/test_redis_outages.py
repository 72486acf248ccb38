"""Redis is down, hangs, or is full: 503 and never 401, streams end well, nothing is lost.

What a Redis that comes back has lost is the subject of `tests/proxy/test_redis_lost.py`.
"""

import asyncio
import os
import signal
import time

import pytest

from tests.outages.town import OUTAGE, SOON, Town, is_outage
from tests.proxy.ends import chat
from tests.waiting import eventually

pytestmark = pytest.mark.processes
LOST, BACK = "Redis does not answer", "Redis answers again"
MANY = 200
TIMEOUT_SECONDS = 2.0  # of the proxy's Redis, as the town sets it


async def test_redis_is_killed_and_started_again(town: Town) -> None:
    await town.serve(3)
    stream = await town.stream()
    town.begin()
    await town.kill_redis()
    await eventually(lambda: len(town.host.log("gate closed")) == 2, SOON)
    await town.refuses(20)
    is_outage(await town.host.ask("inf_" + "x" * 43, chat()))  # who knows whose it is
    is_outage(await town.account())
    is_outage(await town.host.ask(town.secret, None, method="GET", path="/v1/models"))
    await town.finish(*stream)
    assert (await town.host.get("/readyz")).status == 503
    town.start_redis()
    await town.serves_again()
    await town.books_balance()
    await town.told(*OUTAGE)
    await eventually(lambda: BACK in town.accounting.said, SOON)
    assert town.accounting.said == [LOST, "Redis has been rebuilt", BACK]


async def test_redis_hangs_and_goes_on(town: Town) -> None:
    """Who is waiting when it stops is refused at the time-out, who comes later at once."""
    await town.serve(3)
    stream = await town.stream()
    town.begin()
    os.kill(town.server.pid, signal.SIGSTOP)
    await asyncio.gather(*[town.stops_serving() for _ in range(20)])
    await eventually(lambda: len(town.host.log("gate closed")) == 2, SOON)
    took = []
    for _ in range(MANY // 2):
        began = time.monotonic()
        await town.refuses()
        took += [(time.monotonic() - began) / 2] * 2
    assert sorted(took)[MANY * 99 // 100 - 1] < TIMEOUT_SECONDS  # none has waited for Redis
    await town.finish(*stream)
    await eventually(lambda: LOST in town.accounting.said, SOON)
    os.kill(town.server.pid, signal.SIGCONT)
    await town.serves_again()
    await town.books_balance()
    await town.told(*OUTAGE)
    await eventually(lambda: BACK in town.accounting.said, SOON)
    assert town.accounting.said == [LOST, BACK]


async def test_redis_is_full(town: Town) -> None:
    """It answers, and takes nothing new; only settles get through, and make room."""
    await town.serve(3)
    stream = await town.stream()
    town.begin()
    await town.redis.config_set("maxmemory", 1)
    await town.stops_serving()
    await town.refuses(5)
    await town.finish(*stream)
    await eventually(town.is_charged, SOON)
    await town.refuses(5)
    await eventually(lambda: LOST in town.accounting.said, SOON)
    await town.redis.config_set("maxmemory", 0)
    await town.serves_again()
    await town.books_balance()
    await town.told()
    await eventually(lambda: BACK in town.accounting.said, SOON)
    assert town.accounting.said == [LOST, BACK]
