"""What a worker makes of Redis: gate, run, heartbeat; a real worker and a real Redis."""

import pytest

from accounting.contract import keyspace
from accounting.contract.keyspace import EPOCH, HEARD, MUSTER
from proxy.replay import retire
from proxy.standing import era_of, run_id
from tests.proxy.ends import chat
from tests.proxy.harness import Scene
from tests.waiting import eventually


async def test_an_epoch_of_another_run_closes_the_gate_and_is_taken_away(proxy: Scene) -> None:
    key, client = proxy.seeds.key(), proxy.seeds.store.client
    client.set(EPOCH, keyspace.epoch_of("x", "another run"))
    await eventually(lambda: not proxy.services.gate_open)
    assert (await proxy.ask(key, chat())).status == 503
    assert (await proxy.ask("inf_" + "x" * 43, chat())).status == 503  # not 401: who knows
    await eventually(lambda: not client.exists(EPOCH))
    run = str(client.info("server")["run_id"])
    client.set(EPOCH, keyspace.epoch_of("y", run))
    await eventually(lambda: proxy.services.gate_open)
    assert (await proxy.ask(key, chat())).status == 200


async def test_a_worker_is_heard_before_it_admits(proxy: Scene) -> None:
    assert proxy.services.gate_open
    assert proxy.seeds.store.client.zcard(HEARD) == 1


async def test_a_muster_is_answered_once_with_what_is_held(proxy: Scene) -> None:
    client = proxy.seeds.store.client
    standing = proxy.proxies[0].worker._standing
    await eventually(lambda: standing.orphans_settled)
    client.set(MUSTER, "e")
    await eventually(lambda: client.exists(keyspace.mustered_key("e")), 5.0)
    assert list(client.hgetall(keyspace.mustered_key("e")).values()) == [b"0"]
    client.delete(keyspace.mustered_key("e"))
    await standing.look()
    assert not client.exists(keyspace.mustered_key("e"))


async def test_leases_that_redis_remembers_and_the_worker_does_not_are_given_back(
    proxy: Scene,
) -> None:
    """Redis came back from a copy of long ago."""
    key, store = proxy.seeds.key(), proxy.seeds.store
    boot = proxy.proxies[0].worker._boot
    await eventually(lambda: proxy.proxies[0].worker._standing.orphans_settled)
    store.lease(key.workspace_id, (100, 10, 1), key=key.key_id, boot=boot)  # type: ignore[arg-type]
    assert store.wallet(key.workspace_id).held == 100
    store.client.set(MUSTER, "e")
    await eventually(lambda: not store.wallet(key.workspace_id).held)


async def test_a_retired_boot_leaves(proxy: Scene) -> None:
    worker = proxy.proxies[0].worker
    await retire(worker._pipe, worker._boot)
    await worker._standing.beat()
    assert worker._standing.fenced and worker._stopping.is_set()
    assert not await worker._standing.look()


def test_the_run_is_read_from_what_redis_tells() -> None:
    assert run_id(b"# Server\r\nredis_version:7\r\nrun_id:abc\r\n") == "abc"
    assert run_id(b"") == "unknown"


@pytest.mark.parametrize("epoch", [None, "", "a", "a@b"])
def test_an_era_is_never_nought(epoch: str | None) -> None:
    assert 0 < era_of("run", epoch) < 65536
    assert era_of("run", epoch) != era_of("other", epoch)
