"""Every limit, exact under parallel load: what fits is served, the rest leaves no trace.

The stand-in reports as many tokens as are held, so each request costs exactly its hold, and
a wallet or cap for k requests serves k, whatever the order in which they are settled.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable

import pytest

from accounting.contract.keyspace import KeyRecord
from benchmarks.provider import script_from
from proxy.key_lease import Ask, KeyLease
from tests.proxy.ends import Answer, chat, request, standin
from tests.proxy.harness import INPUT_UCR, OUTPUT_UCR, Key, Proxy, Scene, Start
from tests.waiting import eventually

OUTPUT = 20
BODY = chat(max_tokens=OUTPUT)
INPUT = len(json.dumps(BODY)) + 32
TOKENS = INPUT + OUTPUT
COST = INPUT * INPUT_UCR + OUTPUT * OUTPUT_UCR
K = 4


@pytest.fixture
async def scene(start: Start) -> Scene:
    """Two workers, and a provider that uses all that was held."""
    scene = await start()
    await scene.another()
    script = {"prompt_tokens": INPUT, "completion_tokens": OUTPUT}
    scene.main.default_script = script_from(script)
    return scene


async def storm(scene: Scene, key: Key, number: int) -> list[Answer]:
    """`number` requests at once over twenty connections and all workers."""

    async def visit(proxy: Proxy, count: int) -> list[Answer]:
        client = await scene.client(proxy)
        answers = []
        for _ in range(count):
            client >> request(key.secret, BODY)
            answers.append(await client.answer())
        return answers

    visits = [visit(scene.proxies[n % len(scene.proxies)], number // 20) for n in range(20)]
    found = await asyncio.gather(*visits)
    await scene.given_back()
    return [answer for answers in found for answer in answers]


def served(answers: list[Answer]) -> int:
    return sum(answer.status == 200 for answer in answers)


def refused(answers: list[Answer]) -> Counter[tuple[int, str, str]]:
    errors = [answer for answer in answers if answer.status != 200]
    return Counter((a.status, a.error["code"], a.error["type"]) for a in errors)


async def test_a_wallet_for_k_requests_serves_k(scene: Scene) -> None:
    key = scene.seeds.key(balance_ucr=K * COST)
    answers = await storm(scene, key, 50 * K)
    assert served(answers) == K
    assert refused(answers) == {(402, "INSUFFICIENT_CREDIT", "insufficient_quota"): 49 * K}
    assert scene.seeds.store.wallet(key.workspace_id).balance == 0
    assert scene.main.served == K == len(await scene.events(key))


async def test_a_wallet_one_short_serves_one_less(scene: Scene) -> None:
    key = scene.seeds.key(balance_ucr=K * COST - 1)
    assert served(await storm(scene, key, 20 * K)) == K - 1


async def test_two_keys_share_one_wallet(scene: Scene) -> None:
    key = scene.seeds.key(balance_ucr=K * COST)
    store = scene.seeds.store
    second = Key(f"inf_{'z' * 43}", "key_second", key.workspace_id, key.balance_ucr)
    scene.seeds.rules(second, version=1)
    scene.seeds.record(second)
    found = await asyncio.gather(storm(scene, key, 20 * K), storm(scene, second, 20 * K))
    assert served(found[0]) + served(found[1]) == K
    wallet = store.wallet(key.workspace_id)
    assert (wallet.balance, wallet.held) == (0, 0)
    spent = [scene.seeds.counters(one).spent_ucr for one in (key, second)]
    assert sum(spent) == K * COST
    scene.seeds.keys.remove(key)  # the oracle knows wallets of one key only


async def test_a_cost_cap_for_k_requests_serves_k(scene: Scene) -> None:
    key = scene.seeds.key(cost_cap_ucr=K * COST)
    answers = await storm(scene, key, 50 * K)
    assert served(answers) == K
    assert refused(answers) == {(403, "plan_limit_exceeded", "permission_error"): 49 * K}
    assert scene.seeds.counters(key).spent_ucr == K * COST
    last = await scene.ask(key, BODY)
    assert last.error["metadata"]["limit_source"] == "key_cost_cap"
    assert "retry-after" not in last.headers


async def test_requests_per_minute(scene: Scene) -> None:
    key = scene.seeds.key(requests_per_minute=K)
    answers = await storm(scene, key, 50 * K)
    assert served(answers) == K
    assert refused(answers) == {(429, "rate_limit_exceeded", "requests"): 49 * K}
    waits = {int(a.headers["retry-after"]) for a in answers if a.status == 429}
    assert waits <= {14, 15}  # one request a quarter of a minute
    left = sorted(int(a.headers["x-ratelimit-remaining-requests"]) for a in answers if served([a]))
    assert left == list(range(K))
    assert {a.headers["x-ratelimit-limit-requests"] for a in answers if served([a])} == {str(K)}


async def test_tokens_per_minute(scene: Scene) -> None:
    key = scene.seeds.key(tokens_per_minute=K * TOKENS)
    answers = await storm(scene, key, 50 * K)
    assert served(answers) == K
    assert refused(answers) == {(429, "rate_limit_exceeded", "tokens"): 49 * K}
    assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers if a.status == 429)


async def test_tokens_per_day(scene: Scene) -> None:
    key = scene.seeds.key(tokens_per_day=K * TOKENS)
    answers = await storm(scene, key, 50 * K)
    assert served(answers) == K
    assert refused(answers) == {(429, "rate_limit_exceeded", "tokens"): 49 * K}
    assert all(1 <= int(a.headers["retry-after"]) <= 86_400 for a in answers if a.status == 429)
    assert scene.seeds.counters(key).day_tokens == K * TOKENS


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day"])
async def test_a_request_above_a_limit_for_ever_is_told_so(scene: Scene, limit: str) -> None:
    key = scene.seeds.key(**{limit: TOKENS - 1})
    async with scene.no_trace():
        answer = await scene.ask(key, BODY)
        assert answer.refused == (429, "rate_limit_exceeded")
        assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
        said = answer.error["metadata"]
        assert (said["limit_tokens"], said["required_tokens"]) == (TOKENS - 1, TOKENS)


@pytest.mark.parametrize("stream", [False, True])
async def test_concurrency(scene: Scene, stream: bool) -> None:
    key = scene.seeds.key(concurrency=K)
    body = chat(standin(fault="hang_before_head"), stream=stream)
    clients = [await scene.client(scene.proxies[n % 2]) for n in range(10 * K)]
    for client in clients:
        client >> request(key.secret, body)
    answers = [asyncio.ensure_future(client.answer()) for client in clients]
    await scene.main.wait_until(lambda: len(scene.main.requests) == K)
    await eventually(lambda: sum(one.done() for one in answers) == 9 * K)
    told = [one.result() for one in answers if one.done()]
    assert refused(told) == {(429, "rate_limit_exceeded", "concurrency"): 9 * K}
    assert scene.seeds.counters(key).open == K
    for one, client in zip(answers, clients, strict=True):
        one.cancel()
        client.leave()
    await scene.quiet()
    assert served(await storm(scene, key, 20)) >= 1  # the slots are free again


ABOVE = {
    "wallet": lambda s: s.key(balance_ucr=COST - 1),
    "cap": lambda s: s.key(cost_cap_ucr=COST - 1),
    "tokens": lambda s: s.key(tokens_per_minute=TOKENS - 1),
}


@pytest.mark.parametrize("limit", ABOVE)
async def test_a_refused_storm_leaves_no_trace(scene: Scene, limit: str) -> None:
    key = ABOVE[limit](scene.seeds)
    async with scene.no_trace():
        assert served(await storm(scene, key, 100)) == 0


async def test_a_used_up_limit_leaves_no_trace_either(scene: Scene) -> None:
    keys = [
        scene.seeds.key(requests_per_minute=1),
        scene.seeds.key(tokens_per_minute=TOKENS),
        scene.seeds.key(tokens_per_day=TOKENS),
        scene.seeds.key(cost_cap_ucr=COST),
        scene.seeds.key(balance_ucr=COST),
    ]
    for key in keys:
        assert (await scene.ask(key, BODY)).status == 200
    async with scene.no_trace():
        for key in keys:
            answers = [await scene.ask(key, BODY, proxy=proxy) for proxy in scene.proxies]
            assert served(answers) == 0


PRECEDENCE: list[tuple[dict[str, int], tuple[int, str]]] = [
    ({"expires_at_us": 1, "requests_per_minute": 1}, (401, "invalid_api_key")),
    ({"requests_per_minute": 1, "cost_cap_ucr": 0}, (429, "rate_limit_exceeded")),
    ({"tokens_per_minute": TOKENS, "cost_cap_ucr": 0}, (429, "rate_limit_exceeded")),
    ({"cost_cap_ucr": 0}, (403, "plan_limit_exceeded")),
    ({}, (402, "INSUFFICIENT_CREDIT")),
]


@pytest.mark.parametrize(("rules", "wanted"), PRECEDENCE)
async def test_refusals_by_precedence(
    scene: Scene, rules: dict[str, int], wanted: tuple[int, str]
) -> None:
    """All limits are used up at once; the first in order is told."""
    key = scene.seeds.key(balance_ucr=COST)
    assert (await scene.ask(key, BODY)).status == 200
    await scene.given_back()
    full = scene.seeds.counters(key)
    full.requests_tat = full.tokens_tat = scene.seeds.store.now() + 60_000_000
    scene.seeds.store.write_counters(key.workspace_id, full, key.key_id)
    scene.seeds.rules(key, version=1, **rules)
    assert (await scene.ask(key, BODY)).refused == wanted


async def test_a_void_gives_its_share_of_every_limit_back(scene: Scene) -> None:
    key = scene.seeds.key(
        balance_ucr=COST,
        cost_cap_ucr=COST,
        requests_per_minute=1,
        tokens_per_minute=TOKENS,
        tokens_per_day=TOKENS,
        concurrency=1,
    )
    for _ in range(3):
        scene.main.script(status=500)
        assert (await scene.ask(key, BODY)).status == 502
        await scene.quiet()
    assert (await scene.ask(key, BODY)).status == 200


def test_what_small_requests_leave_of_a_lease_is_given_back() -> None:
    """Leased ahead at the size of a large request, used up by a small one."""
    lease = KeyLease(KeyRecord(1, "key_1", "ws_1", "test", [], []), "boot_1")
    lease.version, lease.right_until = 1, 1.0
    lease.free_requests, lease.free_credits, lease.free_tokens = 1, 100, 50
    lease.slots, lease.credits, lease.tokens = 1, 100, 50
    assert lease.take_unused(Ask(60, 30, 1, 1, lambda outcome: None), 0.5) is not None
    assert lease.give_up_unused()
    assert (lease.slots, lease.credits, lease.tokens) == (1, 60, 30)
    assert not lease.give_up_unused()


async def test_one_of_many_reasons_to_wait_passes(scene: Scene) -> None:
    """Sixty a minute is one a second: Retry-After tells how long, and keeps its word."""
    key = scene.seeds.key(requests_per_minute=60)
    assert served(await storm(scene, key, 60)) == 60
    answer = await scene.ask(key, BODY)
    assert (answer.status, answer.headers["retry-after"]) == (429, "1")
    full = scene.seeds.counters(key)
    full.requests_tat -= 1_000_000  # a second later
    scene.seeds.store.write_counters(key.workspace_id, full, key.key_id)
    assert (await scene.ask(key, BODY)).status == 200


@pytest.mark.parametrize("worker", [0, 1])
async def test_a_revoked_key_is_refused_by_each_worker(scene: Scene, worker: int) -> None:
    key = scene.seeds.key()
    assert served([await scene.ask(key, BODY, proxy=proxy) for proxy in scene.proxies]) == 2
    scene.seeds.rules(key, version=2, state=2)
    scene.seeds.store.client.delete(f"key:{key.digest}")
    answer = await scene.ask(key, BODY, proxy=scene.proxies[worker])
    assert answer.refused == (401, "invalid_api_key")


async def test_a_mixed_storm_is_exact(scene: Scene) -> None:
    """Streams, plain answers, failures and leavers compete for the last credits."""
    key = scene.seeds.key(balance_ucr=30 * COST)
    kinds: list[Callable[[int], dict[str, object]]] = [
        lambda n: chat(max_tokens=OUTPUT, stream=n % 2 == 0),
        lambda n: chat(standin(status=500), max_tokens=OUTPUT, stream=n % 2 == 0),
        lambda n: chat(standin(fault="reset_mid_stream"), max_tokens=OUTPUT, stream=True),
    ]

    async def visit(number: int) -> None:
        client = await scene.client(scene.proxies[number % 2])
        client >> request(key.secret, kinds[number % 3](number))
        if number % 7:
            await client.answer()
        client.leave()

    await asyncio.gather(*[visit(number) for number in range(200)])
    events = await scene.events(key)
    assert sum(event.charge_ucr for event in events) <= 30 * COST
    outcomes = {event.outcome for event in events}
    assert {"completed", "provider_failed"} <= outcomes
