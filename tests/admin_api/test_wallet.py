"""The account's wallet over HTTP: exact figures, also while suspended."""

from decimal import Decimal

import asyncpg
import msgspec
from redis.asyncio import Redis

from accounting.contract import keyspace
from accounting.contract.settings import Settings
from tests.admin_api.conftest import Api


async def test_an_empty_wallet(api: Api) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    balance = await api.call("GET", "/v1/account/balance", secret)
    assert balance.status == 200
    assert balance.json == {
        "balance_usd": 0,
        "available_usd": 0,
        "held_usd": 0,
        "currency": "USD",
        "trial": {"remaining_usd": 0, "expires_at": None},
    }
    whoami = await api.call("GET", "/v1/account/whoami", secret)
    assert whoami.status == 200
    assert whoami.json == {
        "account_id": workspace_id,
        "kind": "organization",
        "status": "active",
        "tier": "standard",
        "balance_usd": 0,
    }


async def test_settled_held_and_available_are_told_apart(api: Api, redis_client: Redis) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    grants = f"/workspaces/{workspace_id}/grants"
    await api.operator("POST", grants, {"kind": "topup", "amount_usd": 20})
    wallet = keyspace.Wallet(1_999_999_877, 123, keyspace.ACTIVE, 1)
    name = keyspace.workspace_key(workspace_id)
    await redis_client.hset(name, "w", msgspec.msgpack.encode(wallet))
    balance = await api.call("GET", "/v1/account/balance", secret)
    assert '"balance_usd":19.99999877,' in balance.text
    assert '"available_usd":19.99999754,' in balance.text
    assert '"held_usd":0.00000123,' in balance.text
    whoami = await api.call("GET", "/v1/account/whoami", secret)
    assert '"balance_usd":19.99999877' in whoami.text


async def test_trial_credits_are_what_is_left_of_them(api: Api, settings: Settings) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    for body in (
        {"kind": "trial", "amount_usd": 2, "expires_at": "2100-01-01T00:00:00Z"},
        {"kind": "trial", "amount_usd": 3, "expires_at": "2090-01-01T00:00:00Z"},
        {"kind": "trial", "amount_usd": 5},
        {"kind": "promo", "amount_usd": 7},
    ):
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.status == 201
    connection = await asyncpg.connect(settings.database_url.reveal())
    await connection.execute("update grants set consumed_ucr = 1 where kind = 'trial'")
    balance = (await api.call("GET", "/v1/account/balance", secret)).json
    assert balance["balance_usd"] == 17
    assert balance["trial"] == {
        "remaining_usd": Decimal("9.99999997"),
        "expires_at": "2090-01-01T00:00:00Z",
    }
    await connection.execute("update grants set expires_at = now() where expires_at < '2099-1-1'")
    await connection.execute("update grants set consumed_ucr = amount_ucr where expires_at is null")
    balance = (await api.call("GET", "/v1/account/balance", secret)).json
    assert balance["trial"] == {
        "remaining_usd": Decimal("1.99999999"),
        "expires_at": "2100-01-01T00:00:00Z",
    }
    await connection.close()


async def test_a_suspended_workspace_may_look(api: Api) -> None:
    workspace_id = await api.new_workspace()
    key_id, secret = await api.new_key(workspace_id)
    await api.operator("POST", f"/workspaces/{workspace_id}/suspend")
    assert (await api.call("GET", "/v1/account/balance", secret)).status == 200
    assert (await api.call("GET", "/v1/account/keys/list", secret)).status == 200
    whoami = await api.call("GET", "/v1/account/whoami", secret)
    assert whoami.json["status"] == "suspended"
    revoked = await api.call("DELETE", f"/v1/account/keys/revoke/{key_id}", secret)
    assert revoked.json == {"revoked": True}
