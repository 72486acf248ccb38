"""Many clients at once on one wallet: exactly k of them are served, whatever the order."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from accounting.contract.keyspace import (
    LIVE,
    KeyRules,
    Wallet,
    boots_key,
    shard_of,
    stream_key,
    workspace_key,
)
from accounting.contract.scripts import call
from tests.contract.store import (
    ADMITTED,
    BALANCE,
    CAP,
    CONCURRENCY,
    REQUESTS,
    Ask,
    Row,
    Snapshot,
    lease_call,
    pack,
    pair_of,
    read_lease,
    read_snapshot,
)

WS = "ws_1"
CLIENTS = 50


@pytest.fixture
async def clients(redis_url: str, redis_client: Redis) -> AsyncIterator[list[Redis]]:
    """Fifty connections of their own to an empty Redis."""
    opened = [Redis.from_url(redis_url) for _ in range(CLIENTS)]
    yield opened
    for client in opened:
        await client.aclose()


async def fund(redis: Redis, balance: int, **rules: Any) -> None:
    keys = [workspace_key(WS)]
    await call(redis, "put_workspace", keys, [1])
    await call(redis, "credit", keys, [1, balance])
    await call(redis, "put_key", keys, ["key_1", pack(KeyRules(1, LIVE, **rules))])


async def look(redis: Redis) -> Snapshot:
    keys = [workspace_key(WS), stream_key(shard_of(WS))]
    return read_snapshot(await call(redis, "snapshot", keys, []))


async def settle(redis: Redis, boot: str, number: int, row: Row) -> bytes:
    shard = shard_of(WS)
    keys = [stream_key(shard), boots_key(shard), workspace_key(WS)]
    words = [boot, number, b"\x90", *pair_of(1, row)]
    reply = await call(redis, "settle", keys, words)
    return bytes(reply)


async def storm(clients: list[Redis], rounds: int, ask: Ask) -> Counter[int]:
    """Each client is a boot of its own that asks `rounds` times and keeps what it gets."""

    async def one(number: int, client: Redis) -> Counter[int]:
        outcomes: Counter[int] = Counter()
        for _ in range(rounds):
            open_now = outcomes[ADMITTED]
            mine = (ask.credits * open_now, ask.tokens * open_now, open_now)
            keys, arguments = lease_call(WS, [ask], boot=f"boot_{number}", mine=mine)
            leased = read_lease(await call(client, "lease", keys, arguments))
            assert leased.held <= leased.balance
            outcomes.update(leased.outcomes)
        return outcomes

    counts = await asyncio.gather(*[one(n, client) for n, client in enumerate(clients)])
    return sum(counts, Counter())


@pytest.mark.parametrize("k", [1, 37, 100])
async def test_a_wallet_for_k_serves_exactly_k(clients: list[Redis], k: int) -> None:
    await fund(clients[0], k * 1000 + 999)
    assert await storm(clients, 4, Ask(1000)) == {ADMITTED: k, BALANCE: 200 - k}
    assert (await look(clients[0])).wallet == Wallet(k * 1000 + 999, k * 1000, 1, 1)


async def test_a_cap_for_k_serves_exactly_k(clients: list[Redis]) -> None:
    await fund(clients[0], 10**9, cost_cap_ucr=61 * 1000)
    assert await storm(clients, 4, Ask(1000)) == {ADMITTED: 61, CAP: 139}


async def test_slots_for_k_serve_exactly_k(clients: list[Redis]) -> None:
    await fund(clients[0], 10**9, concurrency=23)
    assert await storm(clients, 2, Ask(1)) == {ADMITTED: 23, CONCURRENCY: 77}


async def test_a_minute_s_requests_for_k_serve_exactly_k(clients: list[Redis]) -> None:
    """One request a minute refills none within this test, unless it takes a minute."""
    await fund(clients[0], 10**9, requests_per_minute=1)
    assert await storm(clients, 2, Ask(1)) == {ADMITTED: 1, REQUESTS: 99}


async def test_leasing_and_settling_at_once_ends_at_the_exact_balance(
    clients: list[Redis],
) -> None:
    """Every client leases 1000, pays 1 to 999 of it and settles each batch twice."""
    await fund(clients[0], 20_000)

    async def one(number: int, client: Redis) -> int:
        paid, boot = 0, f"boot_{number}"
        for turn in range(1, 7):
            keys, arguments = lease_call(WS, [Ask(1000, 10)], boot=boot)
            leased = read_lease(await call(client, "lease", keys, arguments))
            assert 0 <= leased.held <= leased.balance
            if leased.outcomes == [ADMITTED]:
                charge = (number * 131 + turn * 37) % 999 + 1
                row = Row(WS, credits=1000, charge=charge, tokens=10, used=10)
                replies = await asyncio.gather(
                    settle(client, boot, turn, row), settle(clients[0], boot, turn, row)
                )
                assert sorted(map(bool, replies)) == [False, True]
                paid += charge
        return paid

    paid = sum(await asyncio.gather(*[one(n, client) for n, client in enumerate(clients)]))
    found = await look(clients[0])
    assert found.wallet == Wallet(20_000 - paid, 0, 1, 1)
    assert 0 < paid <= 20_000
    counters = found.counters["key_1"]
    assert (counters.open, counters.held_ucr, counters.spent_ucr) == (0, 0, paid)


async def test_a_delta_sent_by_many_is_credited_once(clients: list[Redis]) -> None:
    await fund(clients[0], 5)
    replies = await asyncio.gather(
        *[call(client, "credit", [workspace_key(WS)], [2, 100]) for client in clients]
    )
    assert sorted(replies) == [[0, 105]] * (CLIENTS - 1) + [[1, 105]]
    assert (await look(clients[0])).wallet == Wallet(105, 0, 1, 2)
