"""R5: what clients were told, against the books, line by line."""

import json
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from accounting import audit_clients, reversals
from accounting.audit_clients import ClientLogError
from accounting.audit_ledger import Finding
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import stream_key
from accounting.contract.usage_event import UsageEvent
from tests.accounting.books import post_stream
from tests.accounting.scene import PLENTY, Boot, Tenant, pool_on


def line(request_id: str, credits: Any) -> str:
    return json.dumps({"request_id": request_id, "credits_used": credits}) + "\n"


def told(event: UsageEvent) -> str:
    whole, part = divmod(event.charge_ucr, 1_000_000)
    return line(event.request_id, f"{whole}.{part:06d}")


def write(log: Path, lines: tuple[str, ...]) -> None:
    log.write_text("".join(lines))


async def check(tenant: Tenant, log: Path, *lines: str) -> Finding:
    write(log, lines)
    return await audit_clients.check(tenant.pool, tenant.redis, log)


async def test_what_was_told_is_charged(
    database_url: str, redis_client: Redis, tmp_path: Path
) -> None:
    """Posted, on the stream, in quarantine, reversed since, or left before it was told."""
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot = Boot(redis_client)
        events = [await boot.serve(tenant, charge) for charge in (1, 1_234_567, 0)]
        events.append(await boot.serve(tenant, 70, status=-1))
        await post_stream(tenant)
        ref = "op_1"
        await reversals.reverse(pool, redis_client, events[1].request_id, 0, source_ref=ref)
        events += [await boot.serve(tenant, charge) for charge in (5, 6)]
        lines = [told(event) for event in events]
        unheard = [line(new_id("req"), None)]
        found = await check(tenant, tmp_path / "log", *lines, *unheard)
        assert (found.name, found.checked, found.drifted) == ("R5", 6, 0)
        assert found.title.endswith(": 1.234649 credits")


async def test_each_difference_is_found(
    database_url: str, redis_client: Redis, tmp_path: Path
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client, PLENTY)
        boot, log = Boot(redis_client), tmp_path / "log"
        event = await boot.serve(tenant, 7)
        await post_stream(tenant)
        waiting = await boot.serve(tenant, 8)
        nobody = new_id("req")
        found = await check(tenant, log, told(event), line(event.request_id, 0.000006))
        assert found.first == f"{event.request_id}: told 6, charged 7"
        found = await check(tenant, log, line(waiting.request_id, "9"))
        assert found.first == f"{waiting.request_id}: told 9000000, charged 8"
        found = await check(tenant, log, told(event), line(nobody, "0.000001"))
        assert (found.drifted, found.first) == (1, f"{nobody}: in no book")
        await redis_client.delete(stream_key(tenant.shard))
        assert (await check(tenant, log, told(waiting))).drifted == 1


@pytest.mark.parametrize("text", ["nonsense\n", "{}\n", line("req_1", 1), line(new_id("req"), -1)])
async def test_a_log_that_cannot_be_read_names_the_line(
    database_url: str, redis_client: Redis, tmp_path: Path, text: str
) -> None:
    async with pool_on(database_url) as pool:
        tenant = await Tenant.make(pool, redis_client)
        with pytest.raises(ClientLogError, match="line 2: "):
            await check(tenant, tmp_path / "log", line(new_id("req"), None), text)
        with pytest.raises(ClientLogError, match="No such file"):
            await audit_clients.check(pool, redis_client, tmp_path / "nowhere")
