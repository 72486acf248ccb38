"""Several worker processes and one key: what all of them together serve, also when one stops.

A worker is stopped while it has requests leased ahead. Meanwhile the key or its workspace
changes; when it goes on, it must serve nothing on its old right.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import psutil
import pytest
from redis.asyncio import Redis

from accounting.contract import keyspace
from accounting.recall import recall
from benchmarks.provider import script_from
from tests.proxy.ends import Client, chat, request
from tests.proxy.harness import Key, Seeds
from tests.proxy.host import Host
from tests.waiting import eventually

TRIES = 100


@pytest.mark.parametrize(("workers", "k"), [(4, 1), (4, 60), (8, 25)])
async def test_a_wallet_for_k_requests_serves_k(
    host: Host, seeds: Seeds, workers: int, k: int
) -> None:
    host.env["TOLLGATE_WORKERS"] = str(workers)
    body = chat(max_tokens=20)
    prompt = len(json.dumps(body)) + 32
    host.main.default_script = script_from({"prompt_tokens": prompt, "completion_tokens": 20})
    cost = prompt * 15 + 20 * 60
    key = seeds.key(balance_ucr=k * cost)
    await (await host.start()).until_ready()
    assert len(host.workers()) == workers

    async def ask_until_refused() -> list[int]:
        client, statuses = await host.client(), [200]
        while statuses[-1] == 200:
            client >> request(key.secret, body)
            statuses.append((await client.answer()).status)
        return statuses[1:]

    found = await asyncio.gather(*[ask_until_refused() for _ in range(8 * workers)])
    assert [statuses[-1] for statuses in found] == [402] * len(found)
    assert sum(statuses.count(200) for statuses in found) == k
    assert host.main.served == k
    await eventually(lambda: seeds.store.wallet(key.workspace_id).balance == 0)


def revoke(seeds: Seeds, key: Key) -> None:
    seeds.rules(key, 2, keyspace.REVOKED)
    seeds.store.client.delete(keyspace.digest_key(key.digest))


def cap(seeds: Seeds, key: Key) -> None:
    seeds.rules(key, 2, cost_cap_ucr=0)
    seeds.record(key, 2)


def suspend(seeds: Seeds, key: Key) -> None:
    seeds.store.put_workspace(key.workspace_id, keyspace.SUSPENDED)


class Crowd:
    """Clients of one key, and which of them is connected to which worker."""

    def __init__(self, host: Host, key: Key) -> None:
        self.host = host
        self.key = key
        self.clients: list[Client] = []

    async def gather(self) -> None:
        self.clients = [await self.host.client() for _ in range(32)]
        await self.ask(self.clients)

    async def ask(self, clients: list[Client]) -> list[int]:
        """One request each; their statuses."""
        for client in clients:
            client >> request(self.key.secret, chat())
        return [(await client.answer()).status for client in clients]

    def at(self, worker: psutil.Process) -> list[Client]:
        ports = {one.raddr.port for one in worker.net_connections() if one.raddr}
        return [one for one in self.clients if one.writer.get_extra_info("sockname")[1] in ports]

    @asynccontextmanager
    async def load(self, clients: list[Client]) -> AsyncIterator[None]:
        """Requests without end on each of these, until it is refused: that must come."""

        async def run(client: Client) -> None:
            while await self.ask([client]) == [200]:
                pass

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(run(client))
            yield


def boot_of(worker: psutil.Process) -> str:
    """Its journal, which it holds open, has its name."""
    links = [
        os.readlink(f"/proc/{worker.pid}/fd/{n}") for n in os.listdir(f"/proc/{worker.pid}/fd")
    ]
    (path,) = {link for link in links if link.endswith(".journal")}
    return path.rpartition("/")[2].removesuffix(".journal")


async def stopped_with_some_ahead(crowd: Crowd, seeds: Seeds, worker: psutil.Process) -> int:
    """Stop the worker between two requests, while it has some leased ahead; how many."""
    field, mine = f"{boot_of(worker)}:{crowd.key.key_id}", crowd.at(worker)
    for _ in range(TRIES):
        for _ in range(5):
            assert set(await crowd.ask(mine)) == {200}
        worker.suspend()
        lease = seeds.store.snapshot(crowd.key.workspace_id).leases.get(field)
        if lease is not None and lease.unused_requests > len(mine):
            return lease.unused_requests
        worker.resume()
    raise AssertionError("it never leased ahead")


@pytest.mark.parametrize(
    ("change", "status"), [(revoke, 401), (cap, 403), (suspend, 403)], ids=lambda one: str(one)
)
async def test_a_worker_that_was_stopped_admits_nothing_on_an_old_right(
    host: Host,
    seeds: Seeds,
    redis_url: str,
    change: Callable[[Seeds, Key], None],
    status: int,
) -> None:
    host.env["TOLLGATE_WORKERS"] = "4"
    crowd = Crowd(host, seeds.key(balance_ucr=10**12))
    await (await host.start()).until_ready()
    await crowd.gather()
    victim = max(host.workers(), key=lambda worker: len(crowd.at(worker)))
    waiting = crowd.at(victim)
    others = [client for client in crowd.clients if client not in waiting]
    spare, loaded = others[:4], others[4:]
    try:
        async with crowd.load(loaded), Redis.from_url(redis_url) as client:
            assert await stopped_with_some_ahead(crowd, seeds, victim)
            for one in waiting:  # it will find them when it goes on
                one >> request(crowd.key.secret, chat())
            change(seeds, crowd.key)
            await recall(client, crowd.key.workspace_id)
            assert await crowd.ask(spare) == [status] * len(spare)
        served = host.main.served
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    statuses = [(await one.answer()).status for one in waiting]
    assert statuses == [status] * len(waiting)
    assert await crowd.ask(crowd.clients) == [status] * len(crowd.clients)
    assert host.main.served == served
    await eventually(lambda: seeds.store.wallet(crowd.key.workspace_id).held == 0)
