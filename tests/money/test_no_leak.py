"""Three in ten clients leave, at any moment: nothing stays held, queued or journaled.

`python -m tests.chaos` and the benchmark `mixed` are the long forms.
"""

import asyncio
import random

import pytest

from proxy.front_door import FrontDoor
from tests.proxy.ends import chat, request, standin
from tests.proxy.harness import Key, Scene, Start

SEED, CLIENTS, EACH, LEAVE = 4, 40, 25, 0.3
SCRIPTS = ({}, {"chunks": 5}, {"chunks": 20, "chunk_delay_ms": 1}, {"fault": "reset_mid_stream"})


@pytest.mark.parametrize("keys", [1, 10])
async def test_a_thousand_requests_with_aborts_leak_nothing(start: Start, keys: int) -> None:
    scene = await start()
    await scene.another()
    found = [scene.seeds.key(concurrency=1000) for _ in range(keys)]
    dice = random.Random(SEED)
    seeds = [dice.random() for _ in range(CLIENTS)]
    await asyncio.gather(
        *[busy(scene, found[n % keys], n, random.Random(seed)) for n, seed in enumerate(seeds)]
    )
    await scene.given_back()
    for proxy in scene.proxies:
        services = proxy.services
        assert not services.exchanges and not services.journal.used
        assert not services.settlement.unacknowledged
        assert all(isinstance(one, FrontDoor) for one in services.connections)
    for key in found:
        counters = scene.seeds.counters(key)
        assert (counters.open, counters.held_ucr, counters.held_tokens) == (0, 0, 0)


async def busy(scene: Scene, key: Key, number: int, dice: random.Random) -> None:
    client = await scene.client(scene.proxies[number % 2])
    for _ in range(EACH):
        stream = dice.random() < 0.5
        body = chat(standin("", **dice.choice(SCRIPTS)), stream=stream)
        client >> request(key.secret, body)
        if dice.random() < LEAVE:
            for _ in range(dice.randrange(20)):
                await asyncio.sleep(0)
            client.leave()
            client = await scene.client(scene.proxies[number % 2])
        elif stream and (await client.status())[0] == 200:
            while await client.event() is not None:
                continue
        elif not stream:
            await client.answer()
        else:
            client.leave()
            client = await scene.client(scene.proxies[number % 2])
    client.close()
