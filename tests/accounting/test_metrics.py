"""Accounting's metrics and its audits while it runs: drift is seen, said once, and gone again."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from accounting import metrics
from accounting.auditor import Auditor, Audits
from accounting.contract.keyspace import EPOCH, workspace_key
from accounting.contract.settings import Address
from accounting.counters import Counters
from accounting.metrics import MetricsServer
from tests.accounting.scene import Tenant, pool_on
from tests.waiting import eventually

ANY = Address("127.0.0.1", 0)


@contextlib.asynccontextmanager
async def at_work(thing: Any) -> AsyncIterator[Any]:
    task = asyncio.create_task(thing.run())
    try:
        yield thing
    finally:
        task.cancel()
        await asyncio.wait([task])


async def scraped(server: MetricsServer) -> dict[str, float]:
    """Every sample by its name with labels."""
    await eventually(lambda: server.port)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/metrics") as answer,
    ):
        lines = [one for one in (await answer.text()).splitlines() if not one.startswith("#")]
    return {name: float(value) for name, _space, value in (one.rpartition(" ") for one in lines)}


async def test_every_counter_is_a_metric() -> None:
    counters = Counters(events=7, quarantined=2, lag_ms=40)
    async with at_work(MetricsServer(counters, Audits(), ANY)) as server:
        found = await scraped(server)
        assert found["tollgate_accounting_events_total"] == 7
        assert found["tollgate_accounting_quarantined_total"] == 2
        assert found["tollgate_accounting_lag_ms"] == 40
        for name in Counters.__struct_fields__:
            assert any(one.startswith(f"tollgate_accounting_{name}") for one in found), name
        assert found["tollgate_audit_at_seconds"] == 0
        url = f"http://127.0.0.1:{server.port}/healthz"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert answer.status == 200


async def test_an_address_that_is_taken_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "_AGAIN_SECONDS", 0.01)
    async with at_work(MetricsServer(Counters(), Audits(), ANY)) as first:
        await eventually(lambda: first.port)
        address = Address("127.0.0.1", first.port)
        async with at_work(MetricsServer(Counters(events=3), Audits(), address)) as second:
            await eventually(lambda: "no metrics yet" in caplog.text)
            assert second.port == 0
    async with at_work(MetricsServer(Counters(events=3), Audits(), address)) as second:
        assert (await scraped(second))["tollgate_accounting_events_total"] == 3
    assert caplog.text.count("no metrics yet") == 1


async def spoil(tenant: Tenant, by: int) -> None:
    wallet = await tenant.wallet()
    changed = msgspec.structs.replace(wallet, balance=wallet.balance + by)
    await tenant.redis.hset(workspace_key(tenant.id), "w", msgspec.msgpack.encode(changed))


async def test_drift_is_a_metric_and_one_line(
    database_url: str, redis_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tollgate.accounting")
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        tenant = await Tenant.make(pool, redis_client, 100)
        auditor = Auditor(pool, redis_client, 0.01, 900)
        server = MetricsServer(Counters(), auditor.audits, ANY)
        async with at_work(server), at_work(auditor):
            await eventually(lambda: auditor.audits.finished_at)
            found = await scraped(server)
            assert found['tollgate_audit_drift{invariant="R1"}'] == 0
            assert found['tollgate_audit_checked{invariant="R1"}'] == 1
            await spoil(tenant, 5)
            await eventually(lambda: auditor.audits.drifted)
            assert (await scraped(server))['tollgate_audit_drift{invariant="R1"}'] == 1
            before = auditor.audits.finished_at
            await eventually(lambda: auditor.audits.finished_at > before)
            await spoil(tenant, -5)
            await eventually(lambda: not auditor.audits.drifted)
    said = [record.getMessage().partition(": ws_")[0] for record in caplog.records]
    assert said == ["the audit found drift: R1", "the audit finds no drift any more: R1"]


async def test_one_process_audits_at_a_time(database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        one, two = (Auditor(pool, redis_client, 0, 900) for _ in range(2))
        other = await asyncpg.connect(database_url)
        try:
            await other.execute("select pg_advisory_lock($1)", 0x70_6C_67_06)
            assert not await one.audit()
        finally:
            await other.close()
        assert await eventually(two.audit)
        assert await one.audit()
