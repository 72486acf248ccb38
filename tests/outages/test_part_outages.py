"""Accounting, the admin API or one worker is dead or stopped: the others serve on."""

import signal

import psutil
import pytest

from tests.outages.town import SOON, Town, is_outage
from tests.proxy.ends import chat, request
from tests.waiting import eventually

pytestmark = pytest.mark.processes


async def is_behind(town: Town) -> None:
    """Requests are served and settled, and nothing of them is posted yet."""
    before = await town.posted()
    await town.serve(10)
    await eventually(town.is_settled, SOON)
    assert before <= await town.posted() < town.charged
    answer = await town.account()
    assert (answer.status, answer.json["held_usd"]) == (200, 0)


async def test_accounting_is_killed_and_started_again(town: Town) -> None:
    await town.serve(3)
    await eventually(town.is_posted, SOON)
    town.begin()
    await town.accounting.kill()
    await is_behind(town)
    await town.accounting.start()
    await town.books_balance()
    await town.told()
    assert town.accounting.said == ["accounting runs"]


async def test_accounting_is_stopped_and_goes_on(town: Town) -> None:
    """As long as nobody takes its shards over; see `tests/accounting/test_consumer.py`."""
    await town.serve(3)
    await eventually(town.is_posted, SOON)
    town.begin()
    town.accounting.signal(signal.SIGSTOP)
    await is_behind(town)
    town.accounting.signal(signal.SIGCONT)
    await town.books_balance()
    await town.told()
    assert town.accounting.said == []


async def test_the_admin_api_is_killed_and_started_again(town: Town) -> None:
    town.begin()
    await town.admin.kill()
    for _ in range(5):
        is_outage(await town.account())
        await town.serve()
    await town.admin.start()
    assert (await town.account()).status == 200
    await town.books_balance()
    await town.told()
    assert len(town.admin.lines) == 1


async def test_a_worker_is_stopped_and_goes_on(town: Town) -> None:
    """Its clients wait; those of the others do not, and spend what it does not hold."""
    clients = [await town.host.client() for _ in range(16)]
    for client in clients:
        client >> request(town.secret, chat())
        assert (await client.answer()).status == 200
    town.begin()
    worker = town.host.workers()[0]
    ports = {one.raddr.port for one in worker.net_connections() if one.raddr}
    its = [one for one in clients if one.writer.get_extra_info("sockname")[1] in ports]
    others = [one for one in clients if one not in its]
    assert its and others
    worker.suspend()
    try:
        for client in its:
            client >> request(town.secret, chat())
        for client in others * 5:
            client >> request(town.secret, chat())
            assert (await client.answer()).status == 200
    finally:
        worker.resume()
    assert {(await client.answer()).status for client in its} <= {200, 503}
    for client in clients:
        client >> request(town.secret, chat())
        assert (await client.answer()).status == 200
    assert all(
        line["event"] in ("redis down", "redis up", "gate closed", "gate open")
        for line in town.new_lines()
    )


async def test_the_supervisor_is_killed_and_started_again(town: Town) -> None:
    """Its workers drain, as when they are asked to stop."""
    await town.serve(3)
    stream = await town.stream()
    workers = town.host.workers()
    supervisor = town.host.process
    supervisor.kill()
    await eventually(lambda: all(one.ppid() != supervisor.pid for one in workers), SOON)
    await town.finish(*stream)
    await eventually(lambda: not any(map(psutil.Process.is_running, workers)), SOON)
    await (await town.host.start()).until_ready()
    await town.serve(3)
    await town.books_balance()
