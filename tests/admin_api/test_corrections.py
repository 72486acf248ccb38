"""Money set right over HTTP: reversed, refunded, clawed back, restored; each once."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import asyncpg
from redis.asyncio import Redis

from accounting import expiry
from accounting.contract.identifiers import new_id
from accounting.contract.settings import Settings
from tests.accounting.books import assert_clean, post_stream
from tests.accounting.scene import Boot, Tenant, pool_on
from tests.admin_api.conftest import Api

USD = 100_000_000


async def bought(pool: asyncpg.Pool, redis: Redis, dollars: int) -> tuple[Tenant, str]:
    """A workspace with a topup, and the grant's id."""
    tenant = await Tenant.make(pool, redis)
    return tenant, (await tenant.give("topup", dollars * USD)).id


async def test_a_request_is_charged_less(api: Api, database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant, _ = await bought(pool, redis_client, 10)
        event = await Boot(redis_client).serve(tenant, 3 * USD)
        path = f"/usage/{event.request_id}/reverse"
        early = await api.operator("POST", path)
        assert early.error == (404, "not_found", None)
        await post_stream(tenant)
        body = {"charge_usd": 0.5, "reason": "the provider billed us less"}
        key = {"Idempotency-Key": "one"}
        first = await api.operator("POST", path, body, key)
        assert first.status == 200
        assert first.json == {
            "request_id": event.request_id,
            "workspace_id": tenant.id,
            "charge_usd": Decimal("0.5"),
            "reversed_usd": Decimal("2.5"),
            "restored_usd": Decimal("2.5"),
            "spendable": True,
        }
        again = await api.operator("POST", path, body, key)
        assert (again.json, again.headers["idempotent-replayed"]) == (first.json, "true")
        assert (await api.operator("POST", path)).json["charge_usd"] == 0
        assert (await api.operator("POST", path)).error == (409, "conflict", None)
        assert (await tenant.wallet()).balance == 10 * USD
        await assert_clean(pool, redis_client)


async def test_a_refund_and_a_claw_back(api: Api, database_url: str, redis_client: Redis) -> None:
    async with pool_on(database_url) as pool:
        tenant, grant_id = await bought(pool, redis_client, 10)
        key = {"Idempotency-Key": "one"}
        body = {"amount_usd": 4}
        first = await api.operator("POST", f"/grants/{grant_id}/refund", body, key)
        assert first.status == 200
        assert (first.json["taken_usd"], first.json["remaining_usd"]) == (4, 6)
        again = await api.operator("POST", f"/grants/{grant_id}/refund", body, key)
        assert again.json == first.json
        more = await api.operator("POST", f"/grants/{grant_id}/refund", {"amount_usd": 7})
        assert more.error == (409, "conflict", None)
        rest = await api.operator("POST", f"/grants/{grant_id}/claw-back")
        assert (rest.json["taken_usd"], rest.json["remaining_usd"]) == (6, 0)
        listed = await api.operator("GET", f"/workspaces/{tenant.id}/grants")
        [grant] = listed.json["grants"]
        assert (grant["amount_usd"], grant["refunded_usd"], grant["remaining_usd"]) == (10, 10, 0)
        missing = await api.operator("POST", f"/grants/{new_id('grant')}/claw-back")
        assert missing.error == (404, "not_found", None)
        await assert_clean(pool, redis_client)


async def test_a_refund_needs_an_amount(api: Api) -> None:
    answer = await api.operator("POST", f"/grants/{new_id('grant')}/refund", {})
    assert answer.error == (400, "missing_parameter", "amount_usd")


async def test_an_account_restores_what_it_forfeited(
    api: Api, database_url: str, redis_client: Redis, settings: Settings
) -> None:
    async with pool_on(database_url) as pool:
        workspace_id = await api.new_workspace()
        key_id, secret = await api.new_key(workspace_id)
        tenant = Tenant(pool, redis_client, workspace_id, key_id)
        await tenant.give("plan", 5 * USD, datetime.now(UTC) - timedelta(minutes=5))
        while await expiry.sweep(pool, redis_client, settings.total_timeout_seconds):
            pass
        path, key = "/v1/account/wallet/restore", {"Idempotency-Key": "one"}
        first = await api.call("POST", path, secret, headers=key)
        assert first.json == {
            "account_id": workspace_id,
            "restored": True,
            "restored_usd": 5,
            "balance_usd": 5,
        }
        assert (await api.call("POST", path, secret, headers=key)).json == first.json
        other = await api.call("POST", path, secret)
        assert (other.json["restored"], other.json["balance_usd"]) == (False, 5)
