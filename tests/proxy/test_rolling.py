"""SIGHUP: workers are rolled one by one, and nobody who asks meanwhile can tell."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil
import pytest

from accounting.contract import keyspace
from tests.proxy.ends import (
    DONE,
    STREAM_END,
    Answer,
    Client,
    Upstream,
    chat,
    delta,
    request,
    sse,
    standin,
    usage_chunk,
)
from tests.proxy.harness import MODELS, Key, Seeds, credits_of
from tests.proxy.host import END_SECONDS, Host, stream_begun
from tests.waiting import eventually

PACE_SECONDS = 0.005
CHUNKS = 120


def pids(host: Host) -> set[int]:
    return {one.pid for one in host.workers()}


async def rolled(host: Host, times: int = 1) -> None:
    await eventually(lambda: len(host.log("rolled")) == times, END_SECONDS)


def hang_up(host: Host) -> None:
    host.process.send_signal(signal.SIGHUP)


def boots(host: Host) -> set[str]:
    return {path.stem for path in (host.folder / "data" / "journals").glob("*.journal")}


async def finish(client: Client, upstream: Upstream) -> None:
    """The rest of a stream that `stream_begun` began, whole."""
    upstream >> sse(delta("!", finish="stop")) + sse(usage_chunk(3, 4)) + DONE + STREAM_END
    found = []
    while (event := await client.event()) is not None:
        found.append(event)
    assert found[0] == delta("!", finish="stop")
    assert found[1]["usage"]["total_tokens"] == 7 and found[2:] == ["[DONE]"]


# Under load


@dataclass
class Load:
    """Clients that go on asking; anything but a whole, billed answer fails the test."""

    host: Host
    key: Key
    stopping: bool = False
    charged_ucr: list[int] = field(default_factory=list)
    streams: int = 0
    reopened: int = 0

    def note(self, answer: Answer) -> None:
        assert answer.status == 200, answer
        self.charged_ucr.append(credits_of(answer))

    async def keep_asking(self) -> None:
        """One connection after the other, each for as long as the proxy keeps it."""
        client = await self.host.client()
        while not self.stopping:
            client >> request(self.key.secret, chat())
            answer = await client.answer()
            self.note(answer)
            if answer.headers.get("connection") == "close":
                assert await client.left()
                client.close()
                client = await self.host.client()
                self.reopened += 1
            await asyncio.sleep(PACE_SECONDS)

    async def keep_connecting(self) -> None:
        while not self.stopping:
            self.note(await self.host.ask(self.key.secret, chat()))
            await asyncio.sleep(PACE_SECONDS)

    async def keep_streaming(self) -> None:
        script = standin(chunks=CHUNKS, chunk_delay_ms=10)
        body = chat(script, stream=True, max_tokens=1000)
        while not self.stopping:
            answer = await self.host.ask(self.key.secret, body)
            self.note(answer)
            contents = [e for e in answer.events[:-1] if e["choices"] and _content(e)]
            assert len(contents) == CHUNKS and answer.events[-1] == "[DONE]"
            self.streams += 1


def _content(event: dict[str, list[dict[str, dict[str, str]]]]) -> str:
    return event["choices"][0]["delta"].get("content", "")


async def figures(host: Host) -> dict[str, float]:
    """Every figure of the metrics page of a host that is ready."""
    assert (await host.get("/readyz")).status == 200
    lines = (await host.get("/metrics")).body.decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(text) for name, text in found.items()}


async def watch(host: Host, load: Load, workers: int) -> None:
    """Never unready, never more than one successor, and no counter ever falls."""
    before: dict[str, float] = {}
    while not load.stopping:
        now = await figures(host)
        fallen = {name for name, figure in before.items() if now[name] < figure}
        assert not {name for name in fallen if "_total" in name}, (before, now)
        before = now
        assert len(host.workers()) <= workers + 1
        await asyncio.sleep(PACE_SECONDS)


@pytest.mark.parametrize("workers", [1, 2])
async def test_rolls_under_load_lose_nothing(host: Host, seeds: Seeds, workers: int) -> None:
    host.env |= {"TOLLGATE_WORKERS": str(workers), "TOLLGATE_DRAIN_TIMEOUT_SECONDS": "20"}
    key, patient = seeds.key(), seeds.key()
    await (await host.start()).until_ready()
    load = Load(host, key)
    first, old_boots = pids(host), boots(host)
    jobs: list[Callable[[], Awaitable[None]]] = [load.keep_asking] * 4
    jobs += [load.keep_connecting] * 2 + [load.keep_streaming] * 4
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job()) for job in jobs]  # type: ignore[arg-type]
        tasks.append(group.create_task(watch(host, load, workers)))
        await eventually(lambda: len(load.charged_ucr) > 50, END_SECONDS)
        open_stream = await stream_begun(host, patient.secret)
        hang_up(host)
        await eventually(lambda: pids(host) - first, END_SECONDS)
        enough = len(load.charged_ucr) + 50
        await eventually(lambda: len(load.charged_ucr) > enough, END_SECONDS)
        await finish(*open_stream)
        await rolled(host, 1)
        assert not pids(host) & first and len(pids(host)) == workers
        second = pids(host)
        hang_up(host)
        await rolled(host, 2)
        assert not pids(host) & second and len(pids(host)) == workers
        load.stopping = True
    assert load.streams >= 4 and load.reopened >= 8  # four kept connections, two rolls
    events = await eventually(lambda: _all_settled(seeds, key, load))
    assert sorted(event.charge_ucr for event in events) == sorted(load.charged_ucr)
    assert {(event.outcome, event.status) for event in events} == {("completed", 200)}
    assert [event.outcome for event in seeds.events(patient)] == ["completed"]
    await eventually(lambda: len(boots(host)) == workers)
    assert not boots(host) & old_boots
    assert _leasing(seeds) <= boots(host)
    total = await figures(host)
    for name in ("tollgate_workers_ready", "tollgate_redis_up", "tollgate_gate_open"):
        assert total[name] == workers
    assert total['tollgate_requests_total{outcome="completed"}'] == len(events) + 1
    assert total["tollgate_charged_microcredits_total"] == sum(
        event.charge_ucr for event in events + seeds.events(patient)
    )


def _all_settled(seeds: Seeds, key: Key, load: Load) -> list[object]:
    events = seeds.events(key)
    return events if len(events) == len(load.charged_ucr) else []


# What is new, and what is refused


async def test_a_new_catalogue_is_served_after_a_roll(host: Host, seeds: Seeds) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    client = await host.client()
    client >> request(key.secret, chat(model="fresh"))
    assert (await client.answer()).status == 404
    host.write_catalogue(MODELS | {"fresh": ["main/fresh-there"]})
    hang_up(host)
    await rolled(host)
    answer = await host.ask(key.secret, chat(model="fresh"))
    assert answer.headers["x-model-used"] == "fresh-there"
    assert len(list((host.folder / "data" / "run").glob("*.toml"))) == 1


BAD = {
    "broken": "Expected",
    '[providers.a]\nbase_url = "https://x"\nca_file = "/none"\n[models.m]\ntargets = ["a/m"]\n'
    'context_tokens = 10\nmax_output_tokens = 10\nprice = { input = "1", output = "1" }': "ca_file",
}


@pytest.mark.parametrize("text", BAD)
async def test_a_bad_catalogue_rolls_nothing(host: Host, seeds: Seeds, text: str) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    before = pids(host)
    host.catalogue.write_text(text)
    hang_up(host)
    await eventually(lambda: host.log("catalogue refused"))
    (line,) = host.log("catalogue refused")
    assert BAD[text] in line["why"]
    assert (await host.ask(key.secret, chat())).status == 200 and pids(host) == before

    host.workers()[0].kill()  # its replacement reads what was proved, not the broken file
    assert (await host.ask(key.secret, chat())).status == 200
    assert not host.log("worker failed") and len(host.log("worker died")) == 1


async def test_a_worker_stays_if_its_successor_dies_at_start(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_WORKERS"] = "2"
    key = seeds.key()
    await (await host.start()).until_ready()
    before = pids(host)
    journals = host.folder / "data" / "journals"
    journals.rename(journals.with_name("aside"))
    journals.write_text("in the way")
    hang_up(host)
    await eventually(lambda: host.log("roll stopped"), END_SECONDS)
    assert pids(host) == before and not host.log("rolled")
    assert (await host.ask(key.secret, chat())).status == 200
    journals.unlink()
    journals.with_name("aside").rename(journals)
    hang_up(host)
    await rolled(host)
    assert not pids(host) & before


async def test_a_worker_stays_if_its_successor_does_not_get_ready(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_START_TIMEOUT_SECONDS"] = "3"
    key = seeds.key()
    await (await host.start()).until_ready()
    before = pids(host)
    seeds.store.client.delete(keyspace.EPOCH)  # nobody may admit
    hang_up(host)
    await eventually(lambda: host.log("roll stopped"), END_SECONDS)
    assert pids(host) == before
    seeds.store.client.set(keyspace.EPOCH, "1")
    await host.until_ready()
    assert (await host.ask(key.secret, chat())).status == 200


async def test_one_more_roll_follows_however_many_are_asked_for(host: Host, seeds: Seeds) -> None:
    await (await host.start()).until_ready()
    stream = await stream_begun(host, seeds.key().secret)
    hang_up(host)
    await eventually(lambda: len(pids(host)) == 2, END_SECONDS)
    for _ in range(3):
        hang_up(host)
        assert (await host.get("/healthz")).status == 200  # it has heard this one
    await finish(*stream)
    await rolled(host, 2)
    host.process.terminate()
    assert await host.ended() == 0
    assert len(host.log("rolled")) == 2


# Who accepts


async def test_a_successor_takes_the_connections_that_wait(host: Host, seeds: Seeds) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    (old,) = host.workers()
    old.suspend()
    try:
        waiting = [await host.client() for _ in range(5)]
        for client in waiting:
            client >> request(key.secret, chat())
        hang_up(host)
        for client in waiting:
            assert (await client.answer()).status == 200
        assert old.status() == psutil.STATUS_STOPPED
    finally:
        old.resume()
    await rolled(host)


async def test_sigterm_serves_the_connections_that_wait(host: Host, seeds: Seeds) -> None:
    """Nobody else will: a listener closed over them would reset them."""
    key = seeds.key()
    await (await host.start()).until_ready()
    (worker,) = host.workers()
    worker.suspend()
    try:
        waiting = [await host.client() for _ in range(5)]
        for client in waiting:
            client >> request(key.secret, chat())
        host.process.terminate()
        await eventually(lambda: _lets_go(host, worker))
    finally:
        worker.resume()
    for client in waiting:
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        client.close()
    assert await host.ended() == 0


def _lets_go(host: Host, worker: psutil.Process) -> bool:
    """Whether the supervisor has closed its listening socket."""
    supervisor = psutil.Process(host.process.pid)
    ports = [one.laddr.port for one in supervisor.net_connections("inet")]
    return host.port not in ports


async def test_a_drain_refuses_new_connections_at_once(host: Host, seeds: Seeds) -> None:
    """A balancer learns by it; a connection nobody will serve would be worse."""
    await (await host.start()).until_ready()
    stream = await stream_begun(host, seeds.key().secret)
    host.process.terminate()
    await eventually(lambda: not _accepts(host.port))
    await finish(*stream)
    assert await host.ended() == 0


def _accepts(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


# A roll that does not run through


async def test_sigterm_ends_a_roll_and_lets_every_stream_finish(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_WORKERS"] = "2"
    keys = [seeds.key(), seeds.key()]
    await (await host.start()).until_ready()
    early = [await stream_begun(host, keys[0].secret) for _ in range(4)]
    before = pids(host)
    hang_up(host)
    await eventually(lambda: _serving_new(host, before), END_SECONDS)
    late = await stream_begun(host, keys[1].secret)
    host.process.terminate()
    await eventually(lambda: not _accepts(host.port))
    for stream in [*early, late]:
        await finish(*stream)
    assert await host.ended() == 0
    assert [event.outcome for key in keys for event in seeds.events(key)] == ["completed"] * 5
    assert not boots(host) and not _leasing(seeds)


async def _serving_new(host: Host, before: set[int]) -> bool:
    """A successor is there, and ready."""
    page = (await host.get("/metrics")).body.decode()
    return bool(pids(host) - before) and "tollgate_gate_open 3.0" in page


async def test_a_stream_beyond_the_drain_is_cut_and_settled(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_DRAIN_TIMEOUT_SECONDS"] = "0.2"
    key = seeds.key()
    await (await host.start()).until_ready()
    client, upstream = await stream_begun(host, key.secret)
    hang_up(host)
    last = await client.event()
    assert last["error"]["code"] == "service_unavailable" and last["credits_used"] > 0
    assert await client.event() is None and await upstream.left()
    client.close()
    await rolled(host)
    (event,) = seeds.events(key)
    assert (event.outcome, event.settlement) == ("cut", "estimated")


async def test_a_predecessor_that_dies_within_the_roll_ends_it_as_well(
    host: Host, seeds: Seeds
) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    before = pids(host)
    client, _ = await stream_begun(host, key.secret)
    hang_up(host)
    await eventually(lambda: len(pids(host)) == 2 and not _ready_of(host, before), END_SECONDS)
    for one in host.workers():
        if one.pid in before:
            one.kill()
    await rolled(host)
    assert await client.rest() == b""
    await eventually(lambda: seeds.events(key))
    assert seeds.events(key)[0].outcome == "cut"
    assert (await host.ask(key.secret, chat())).status == 200


def _ready_of(host: Host, before: set[int]) -> bool:
    """Whether one of these still listens."""
    ports = [
        connection.laddr.port
        for one in host.workers()
        if one.pid in before
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    return host.port in ports


def _leasing(seeds: Seeds) -> set[str]:
    """The boots that lease anything; of one that was retired there is a fence."""
    client = seeds.store.client
    names = [
        name for name in client.scan_iter("*:leases:*") if client.smembers(name) != {b"fenced"}
    ]
    return {name.decode().rpartition(":")[2] for name in names}
