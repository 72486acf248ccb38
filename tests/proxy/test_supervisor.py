"""`python -m proxy` as real processes: start, refusals to start, a killed worker, drain, Rust."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from accounting.contract.keyspace import HEARD
from benchmarks.provider import script_from
from tests.proxy.ends import DONE, STREAM_END, chat, delta, request, sse, usage_chunk
from tests.proxy.harness import PROVIDER_KEY, Seeds
from tests.proxy.host import END_SECONDS, ROOT, Host, stream_begun
from tests.waiting import eventually, eventually_blocking, free_port

# It does not start


async def refused(host: Host) -> tuple[int, str]:
    """Exit status and the one line it says when it will not start."""
    status = await (await host.start()).ended()
    (line,) = host.said.splitlines()
    assert len(line) < 300
    return status, line


async def test_a_port_in_use_is_one_line(host: Host) -> None:
    with socket.create_server(("127.0.0.1", host.port)):
        status, line = await refused(host)
    address = f"127.0.0.1:{host.port}"
    assert (status, line) == (
        1,
        f"tollgate proxy: cannot listen on {address}: Address already in use",
    )


async def test_a_private_port_in_use_is_one_line(host: Host) -> None:
    with socket.create_server(("127.0.0.1", host.private_port)):
        status, line = await refused(host)
    assert status == 1 and line.startswith("tollgate proxy: ")
    assert str(host.private_port) in line and "in use" in line


async def test_a_port_shared_with_another_proxy_is_noticed(host: Host) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", host.port))
        other.listen()
        status, line = await refused(host)
    assert status == 1 and "Address already in use" in line


def test_a_worker_whose_supervisor_is_gone_by_its_start_does_not_serve(tmp_path: Path) -> None:
    """No signal would ever tell it to leave, and it would keep the port from everybody else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "proxy.worker", "0", str(listener.fileno())]
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        done = subprocess.run(
            [*command, str(tmp_path / "metrics"), str(gone.pid)],
            capture_output=True,
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            timeout=END_SECONDS,
        )
    assert done.returncode == 1
    assert json.loads(done.stderr)["why"] == "its supervisor is gone"


BROKEN = {
    "[providers": "catalogue: ",
    '[providers.a]\nbase_url = "http://x"\n[models.m]\ntargets = ["b/m"]': "model 'm'",
    '[providers.a]\nbase_url = "http://x"\napi_key_env = "NO_SUCH_KEY"\n[models]': "NO_SUCH_KEY",
}


@pytest.mark.parametrize("text", BROKEN)
async def test_a_broken_catalogue_is_one_line(host: Host, text: str) -> None:
    host.catalogue.write_text(text)
    status, line = await refused(host)
    assert status == 1 and line.startswith("tollgate proxy: catalogue: ") and BROKEN[text] in line


async def test_a_missing_catalogue_is_one_line(host: Host) -> None:
    host.catalogue.unlink()
    status, line = await refused(host)
    assert status == 1 and line.startswith("tollgate proxy: catalogue ")


async def test_an_unreachable_redis_is_one_line(host: Host) -> None:
    host.env["TOLLGATE_REDIS_URL"] = f"redis://:secret@127.0.0.1:{free_port()}/0"
    host.env["TOLLGATE_WORKERS"] = "2"
    status, line = await refused(host)
    assert status == 1 and line.startswith("tollgate proxy: ") and "Redis" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOLLGATE_BOGUS", "1"),
        ("TOLLGATE_WORKERS", "many"),
        ("TOLLGATE_LISTEN", "nowhere"),
        ("TOLLGATE_REDIS_URL", ""),
    ],
)
async def test_a_bad_setting_is_named(host: Host, name: str, value: str) -> None:
    host.env[name] = value
    status, line = await refused(host)
    assert status == 2 and line.startswith(f"tollgate: {name}: ")


# It serves


async def test_two_workers_share_one_wallet_and_one_metrics_page(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_WORKERS"] = "2"
    body = chat(max_tokens=20)
    prompt = len(json.dumps(body)) + 32
    script = {"prompt_tokens": prompt, "completion_tokens": 20}
    host.main.default_script = script_from(script)
    cost = prompt * 15 + 20 * 60
    key = seeds.key(balance_ucr=5 * cost)
    await (await host.start()).until_ready()
    assert len(host.workers()) == 2
    answers = await asyncio.gather(*[host.ask(key.secret, body) for _ in range(250)])
    statuses = [answer.status for answer in answers]
    assert (statuses.count(200), statuses.count(402)) == (5, 245)
    await eventually(lambda: len(seeds.events(key)) == 5)
    assert len({fields[b"b"] for _, fields in seeds.store.stream(key.workspace_id)}) <= 2

    assert (await host.get("/healthz")).status == 200
    page = (await host.get("/metrics")).body.decode()
    assert 'tollgate_requests_total{outcome="completed"} 5.0' in page
    assert 'tollgate_refusals_total{code="INSUFFICIENT_CREDIT"} 245.0' in page
    assert f"tollgate_charged_microcredits_total {5.0 * cost}" in page
    assert PROVIDER_KEY not in page and key.secret not in page + host.said


async def test_a_killed_worker_is_replaced_and_its_exchanges_are_settled(
    host: Host, seeds: Seeds
) -> None:
    void, estimated = seeds.key(), seeds.key()
    await (await host.start()).until_ready()
    waiting = await host.client()
    waiting >> request(void.secret, chat(model="raw"))
    await (await host.raw.call()).hears()
    client, upstream = await stream_begun(host, estimated.secret)
    assert seeds.store.wallet(estimated.workspace_id).held > 0

    (first,) = host.workers()
    first.kill()
    meanwhile = await host.client()  # the listener outlives the worker
    meanwhile >> request(seeds.key().secret, chat())
    assert (await meanwhile.answer()).status == 200
    assert await client.rest() == b"" and await upstream.left()

    await eventually(lambda: seeds.events(void) and seeds.events(estimated))
    (event,) = seeds.events(estimated)
    assert (event.outcome, event.settlement) == ("cut", "estimated")
    assert 0 < event.charge_ucr < event.hold_ucr
    (event,) = seeds.events(void)
    assert (event.outcome, event.settlement, event.charge_ucr) == ("cut", "void", 0)
    await eventually(lambda: seeds.store.wallet(estimated.workspace_id).held == 0)

    (second,) = host.workers()
    assert second.pid != first.pid
    await eventually(lambda: len(host.log("journal replayed")) == 1)
    assert host.log("journal replayed")[0]["settles"] == 2
    journals = host.folder / "data" / "journals"
    await eventually(lambda: len(list(journals.glob("*.journal"))) == 1)
    assert (await host.ask(estimated.secret, chat())).status == 200


async def test_a_worker_killed_with_settles_not_yet_sent_loses_none(
    host: Host, seeds: Seeds
) -> None:
    """Answers are out, their settles wait in the journal: the replacement sends them, once."""
    host.env["TOLLGATE_SETTLE_INTERVAL_SECONDS"] = "1"
    key = seeds.key()
    await (await host.start()).until_ready()
    answers = await asyncio.gather(*[host.ask(key.secret, chat()) for _ in range(20)])
    assert {answer.status for answer in answers} == {200}
    host.workers()[0].kill()
    await eventually(lambda: len(seeds.events(key)) == 20)
    told = {a.headers["x-request-id"]: a.headers["x-credits-used"] for a in answers}
    assert {event.request_id for event in seeds.events(key)} == set(told)
    await eventually(lambda: seeds.store.wallet(key.workspace_id).held == 0)


async def test_sigterm_lets_a_stream_finish(host: Host, seeds: Seeds) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    idle = await host.client()
    client, upstream = await stream_begun(host, key.secret)
    host.process.terminate()
    assert await idle.left()
    upstream >> sse(delta("!", finish="stop"))
    assert await client.event() == delta("!", finish="stop")
    upstream >> sse(usage_chunk(3, 4)) + DONE + STREAM_END
    assert (await client.event())["usage"]["total_tokens"] == 7
    assert await client.event() == "[DONE]"
    assert await client.event() is None and await client.left()
    assert await host.ended() == 0
    (event,) = seeds.events(key)
    assert (event.outcome, event.charge_ucr) == ("completed", 3 * 15 + 4 * 60)
    assert not list((host.folder / "data" / "journals").glob("*.journal"))
    assert not seeds.store.client.exists(HEARD)
    for leases in seeds.store.client.scan_iter("*:leases:*"):
        assert seeds.store.client.smembers(leases) == {b"fenced"}


async def test_sigterm_cuts_what_lasts_too_long_and_settles_it(host: Host, seeds: Seeds) -> None:
    host.env["TOLLGATE_DRAIN_TIMEOUT_SECONDS"] = "0.2"
    key, other = seeds.key(), seeds.key()
    await (await host.start()).until_ready()
    waiting = await host.client()
    waiting >> request(other.secret, chat(model="raw"))
    await (await host.raw.call()).hears()
    client, upstream = await stream_begun(host, key.secret)
    host.process.send_signal(signal.SIGINT)
    last = await client.event()
    assert last["error"]["code"] == "service_unavailable"
    assert last["credits_used"] > 0
    assert await client.event() is None
    answer = await waiting.answer()
    assert answer.refused == (503, "service_unavailable")
    assert await upstream.left()
    assert await host.ended() == 0
    (event,) = seeds.events(key)
    assert event.settlement == "estimated" and event.charge_ucr > 0
    (event,) = seeds.events(other)
    assert (event.settlement, event.outcome) == ("void", "cut")


async def test_sigterm_while_starting_ends_it_soon(host: Host) -> None:
    await host.start()
    await eventually(lambda: host.workers())
    host.process.terminate()
    async with asyncio.timeout(10):
        assert await host.ended() in (0, -signal.SIGTERM)
    assert "Traceback" not in host.said


# Nothing built in Rust

RUST_MARKS = (b"rustc version", b"/rustc/", b"rust_panic", b"RUST_BACKTRACE")
RUST_NAMES = re.compile(
    r"\b(orjson|pydantic_core|cryptography|_rust|jiter|rpds|tiktoken|tokenizers|_?bcrypt|nh3"
    r"|watchfiles)\b"
)


def built_in_rust(library: Path) -> bool:
    """Whether a shared object comes out of rustc, by what its panics leave in it or by name."""
    if RUST_NAMES.search(f"{library.parent.name}/{library.name}"):
        return True
    content = library.read_bytes()
    return any(mark in content for mark in RUST_MARKS)


def mapped(pid: int) -> list[Path]:
    """The shared objects that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return [Path(path) for path in sorted(paths) if re.search(r"\.so(\.[0-9.]+)?$", path)]


async def test_a_serving_worker_has_nothing_built_in_rust(host: Host, seeds: Seeds) -> None:
    key = seeds.key()
    await (await host.start()).until_ready()
    assert (await host.ask(key.secret, chat(stream=True))).events[-1] == "[DONE]"
    assert (await host.ask(key.secret, chat())).status == 200
    assert (await host.ask(key.secret, None, method="GET", path="/v1/models")).status == 200
    await host.ask(key.secret, None, method="GET", path="/v1/account/balance")
    (worker,) = host.workers()
    libraries = mapped(worker.pid)
    names = " ".join(library.name for library in libraries)
    assert "uvloop" in str(libraries) and "hiredis" in names, names  # they are seen at all
    assert not [library for library in libraries if built_in_rust(library)]


@pytest.mark.parametrize("module", ["pydantic_core._pydantic_core", "orjson.orjson"])
def test_the_detector_detects(module: str) -> None:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    content = Path(spec.origin).read_bytes()
    assert any(mark in content for mark in RUST_MARKS)
    assert built_in_rust(Path(spec.origin))


def test_the_detector_sees_what_is_loaded() -> None:
    program = "import orjson, sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        try:
            assert _until_mapped(process.pid, "orjson")
        finally:
            process.communicate(b"")
    for module in ("uvloop.loop", "hiredis.hiredis", "msgspec._core"):
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        assert not built_in_rust(Path(spec.origin))


def _until_mapped(pid: int, name: str) -> bool:
    found = eventually_blocking(lambda: [path for path in mapped(pid) if name in path.name])
    return all(built_in_rust(path) for path in found)
