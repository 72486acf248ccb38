"""Nobody overspends, at any concurrency, on any route: exactly what is paid for is served.

A new billable route has to be added to `ROUTES`, or the first test fails.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from accounting.contract.money import parse_credits
from benchmarks.provider import script_from
from proxy import aiohttp_lane
from proxy.request_reader import FAST_PATHS
from tests.proxy.ends import CHAT, Answer, chat, request
from tests.proxy.harness import INPUT_UCR, OUTPUT_UCR, Key, Scene, Seeds, Start
from tests.proxy.host import Host
from tests.waiting import eventually

ROUTES = {CHAT.encode()}
FREE = ("/v1/account/", "/v1/usage")  # passed on to the admin API, which sells nothing
WORKERS, K, TIMES = 3, 4, 50
BODIES: dict[str, dict[str, Any]] = {
    "plain": chat(max_tokens=20),
    "stream": chat(max_tokens=20, stream=True),
    "no ceiling": chat(max_tokens=None),
}
EVERY_BODY = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())


def test_every_billable_route_is_here() -> None:
    assert FAST_PATHS == ROUTES
    assert aiohttp_lane._PASSED_ON == FREE


def cost_of(body: dict[str, Any], provider: Any) -> int:
    """What a request holds; the provider then uses all of it."""
    sent = {name: value for name, value in body.items() if value is not None}
    prompt = len(json.dumps(body)) + 32
    output = int(sent.get("max_tokens", 1000))
    provider.default_script = script_from(
        {"prompt_tokens": prompt, "completion_tokens": output, "chunks": 3}
    )
    return prompt * INPUT_UCR + output * OUTPUT_UCR


@contextmanager
def watched(seeds: Seeds, key: Key) -> Iterator[None]:
    """The wallet, looked at again and again from a thread: never below zero."""
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            wallet = seeds.store.wallet(key.workspace_id)
            seen.append((wallet.balance, wallet.held))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()
    assert len(seen) > 1 and all(0 <= held <= balance for balance, held in seen), min(seen)


def served(answers: list[Answer]) -> int:
    return sum(answer.status == 200 for answer in answers)


@EVERY_BODY
@pytest.mark.processes
async def test_a_wallet_for_k_serves_k_of_many(
    host: Host, seeds: Seeds, body: dict[str, Any]
) -> None:
    """A new key, asked for by all at once, on workers that have never seen it."""
    host.env["TOLLGATE_WORKERS"] = str(WORKERS)
    cost = cost_of(body, host.main)
    await (await host.start()).until_ready()
    key = seeds.key(balance_ucr=K * cost + cost // 2)
    with watched(seeds, key):
        answers = await asyncio.gather(*[host.ask(key.secret, body) for _ in range(K * TIMES)])
    assert served(answers) == host.main.served == K
    for answer in answers:
        if answer.status != 200:
            assert answer.refused == (402, "INSUFFICIENT_CREDIT")
            facts = answer.error["metadata"]
            assert parse_credits(facts["required_credits"]) == cost
            assert 0 <= parse_credits(facts["affordable_credits"]) < cost
    await eventually(lambda: seeds.store.wallet(key.workspace_id).balance == cost // 2)


@EVERY_BODY
@pytest.mark.processes
async def test_a_cap_for_k_serves_k_of_many(host: Host, seeds: Seeds, body: dict[str, Any]) -> None:
    """The key's cost cap is far below the wallet."""
    host.env["TOLLGATE_WORKERS"] = str(WORKERS)
    cost = cost_of(body, host.main)
    await (await host.start()).until_ready()
    key = seeds.key(cost_cap_ucr=K * cost + cost // 2)
    with watched(seeds, key):
        answers = await asyncio.gather(*[host.ask(key.secret, body) for _ in range(K * TIMES)])
    assert served(answers) == host.main.served == K
    refused = {answer.refused for answer in answers if answer.status != 200}
    assert refused == {(403, "plan_limit_exceeded")}
    await eventually(lambda: seeds.counters(key).spent_ucr == K * cost)


@pytest.mark.parametrize("ahead", [True, False], ids=["leasing ahead", "lease by lease"])
@pytest.mark.parametrize("limit", ["wallet", "cap"])
async def test_hot_or_cold_it_ends_at_the_last_credit(
    start: Start, monkeypatch: pytest.MonkeyPatch, ahead: bool, limit: str
) -> None:
    """Clients that ask one request after the other, until each is refused."""
    scene = await start()
    for _ in range(WORKERS - 1):
        await scene.another()
    await eventually(lambda: all(proxy.services.leases.may_lease_ahead for proxy in scene.proxies))
    if not ahead:
        for proxy in scene.proxies:
            proxy.services.leases.may_lease_ahead = False
    cost, k = cost_of(BODIES["plain"], scene.main), 90
    more = {"balance_ucr": k * cost} if limit == "wallet" else {"cost_cap_ucr": k * cost}
    key = scene.seeds.key(**more)
    with watched(scene.seeds, key):
        counts = await asyncio.gather(
            *[until_refused(scene, key, number % WORKERS) for number in range(24)]
        )
    assert sum(counts) == scene.main.served == k
    await scene.given_back()
    assert scene.seeds.counters(key).spent_ucr == k * cost


async def until_refused(scene: Scene, key: Key, worker: int) -> int:
    client, count = await scene.client(scene.proxies[worker]), 0
    while True:
        client >> request(key.secret, BODIES["plain"])
        answer = await client.answer()
        if answer.status != 200:
            assert answer.status in (402, 403)
            return count
        count += 1
