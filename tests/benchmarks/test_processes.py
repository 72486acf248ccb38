"""CPU is counted for whole trees, and what is started is pinned, waited for and ended."""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import endurance, kernel, nginx, processes
from benchmarks.processes import ProcessFailure
from tests.waiting import eventually

SPIN = (
    "import time, sys\n"
    "while time.process_time() < 0.1: pass\n"
    "print('spun', flush=True)\n"
    "sys.stdin.read() if len(sys.argv) > 1 else time.sleep(60)\n"
)
PARENT = (
    "import subprocess, sys\n"
    "spinner = [sys.executable, '-c', sys.argv[1], 'reaped']\n"
    "subprocess.run(spinner, stdin=subprocess.DEVNULL, check=True)\n"
    "subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()\n"
)


async def test_cpu_of_a_tree_counts_live_and_reaped_children_but_not_those_left_out():
    async with processes.running([sys.executable, "-c", PARENT, SPIN], None) as parent:
        await eventually(lambda: parent.output.read_text().count("spun") == 2)
        (child,) = kernel.tree_of([parent.pid]) - {parent.pid}
        assert kernel.named_in_tree([parent.pid], "process_time") == [child]
        whole = kernel.cpu_seconds([parent.pid])
        without = kernel.cpu_seconds([parent.pid], leave_out=[child])
        assert kernel.cpu_seconds([child]) >= 0.05
        assert without >= 0.05
        assert whole >= without + 0.05
    await eventually(lambda: not kernel.stat_fields(child) or is_zombie(child))
    assert kernel.cpu_seconds([parent.pid]) == 0


def is_zombie(pid: int) -> bool:
    return kernel.stat_fields(pid)[0] == "Z"


async def test_memory_is_told_and_its_peak_can_be_forgotten():
    grown = "import sys; big = bytearray(50_000_000); del big; print('spun', flush=True); "
    async with processes.running(
        [sys.executable, "-c", grown + "sys.stdin.read(); " + SPIN], None
    ) as it:
        await eventually(lambda: "spun" in it.output.read_text())
        assert kernel.resident_peak_kb(it.pid) > kernel.resident_kb(it.pid) + 40_000
        kernel.forget_peak(it.pid)
        assert kernel.resident_peak_kb(it.pid) < kernel.resident_kb(it.pid) + 10_000
        assert 0 < kernel.proportional_kb(it.pid) <= kernel.resident_kb(it.pid)
    assert kernel.resident_kb(2**22 + 1) == kernel.proportional_kb(2**22 + 1) == 0


async def test_trees_are_pinned():
    core = min(os.sched_getaffinity(0))
    async with processes.running([sys.executable, "-c", SPIN], core) as started:
        assert os.sched_getaffinity(started.pid) == {core}
        assert await processes.first_line(started) == "spun"


async def test_settings_of_another_tollgate_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("TOLLGATE_REDIS_URL", "redis://somebody")
    async with processes.running(
        [sys.executable, "-c", SPIN], None, {"TOLLGATE_WORKERS": "1"}
    ) as it:
        assert await processes.first_line(it) == "spun"
        ours = [pair for pair in environment_of(it.pid) if pair.startswith("TOLLGATE_")]
        assert ours == ["TOLLGATE_WORKERS=1"]


async def test_cores_differ_or_are_not_pinned():
    cores = processes.choose_cores()
    assert cores.subject is None or cores.subject != cores.load
    assert processes.choose_cores(pin=False) == (None, None)


async def test_a_process_that_ends_early_says_why():
    async with processes.running([sys.executable, "-c", "raise SystemExit('no luck')"], None) as it:
        with pytest.raises(ProcessFailure, match="no luck"):
            await processes.until_answering(it, "http://127.0.0.1:9/", 10)


async def test_the_provider_runs_as_a_process_and_a_gateway_is_waited_for():
    async with processes.start_provider("127.0.0.1:0", None) as (provider, url):
        assert processes.is_answering(f"{url}/models")
        port = processes.free_port()
        command = [sys.executable, "-m", "benchmarks.provider", "--listen", f"127.0.0.1:{port}"]
        ready = f"http://127.0.0.1:{port}/v1/models"
        async with processes.start_gateway(command, {"A": "b"}, ready, None, 10) as gateway:
            assert processes.is_answering(ready)
            assert "A=b" in environment_of(gateway.pid)
        assert not processes.is_answering(ready)
    assert provider.process.returncode == 0


def environment_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


@pytest.mark.skipif(nginx.nginx_path() is None, reason="nginx is not installed")
async def test_nginx_passes_requests_on():
    async with processes.start_provider("127.0.0.1:0", None) as (_, url):
        upstream = url.removeprefix("http://").removesuffix("/v1")
        async with nginx.start_nginx(upstream, None) as (started, through):
            assert processes.is_answering(f"{through}/models")
            assert len(kernel.tree_of([started.pid])) == 2


@pytest.mark.skipif(nginx.nginx_path() is None, reason="nginx is not installed")
async def test_nginx_has_as_many_workers_as_are_asked_for():
    async with (
        processes.start_provider("127.0.0.1:0", None) as (_, url),
        nginx.start_nginx(url.removeprefix("http://").removesuffix("/v1"), None, 2) as (started, _),
    ):
        assert len(kernel.tree_of([started.pid])) == 3


def test_two_processes_hold_twice_as_many_streams():
    assert endurance.most_streams(2) == 2 * endurance.most_streams(1) > 0
