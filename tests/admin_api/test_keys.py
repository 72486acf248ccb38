"""Keys over HTTP: made by the operator, seen and revoked by their own workspace."""

import re
from decimal import Decimal

from redis.asyncio import Redis

from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from tests.admin_api.conftest import Api

_NO_LIMITS = {
    "rpm": None,
    "tpm": None,
    "daily_tokens": None,
    "concurrency": None,
    "cost_cap_usd": None,
    "allowed_models": None,
    "expires_at": None,
}


async def test_a_key_is_made_and_its_secret_shown(api: Api, redis_client: Redis) -> None:
    workspace_id = await api.new_workspace()
    made = await api.operator("POST", f"/workspaces/{workspace_id}/keys", {"name": "ci"})
    assert made.status == 201
    key = made.json
    assert re.fullmatch(r"inf_[A-Za-z0-9_-]{43}", key["key_secret"])
    assert key["key_id"].startswith("key_") and key["workspace_id"] == workspace_id
    assert key["name"] == key["label"] == "ci" and key["status"] == "active"
    assert key["scopes"] == [] and key["limits"] == _NO_LIMITS
    digest = keyspace.digest_of(key["key_secret"])
    assert await redis_client.exists(keyspace.digest_key(digest))


async def test_limits_and_scopes_are_taken_over(api: Api) -> None:
    workspace_id = await api.new_workspace()
    limits = {
        "rpm": 60,
        "tpm": 10_000,
        "daily_tokens": 1_000_000,
        "concurrency": 4,
        "cost_cap_usd": 2.5,
        "allowed_models": ["gpt-4o-mini", "gpt-4o-mini", "o3"],
        "expires_at": "2100-01-01T00:00:00Z",
    }
    body = {"name": "ci", "scopes": ["inference", "account", "account"], "limits": limits}
    made = await api.operator("POST", f"/workspaces/{workspace_id}/keys", body)
    assert made.status == 201
    expected = limits | {"cost_cap_usd": Decimal("2.5"), "allowed_models": ["gpt-4o-mini", "o3"]}
    assert made.json["limits"] == expected
    assert made.json["scopes"] == ["inference", "account"]
    listed = await api.call("GET", "/v1/account/keys/list", made.json["key_secret"])
    known = dict(made.json)
    del known["key_secret"], known["workspace_id"]
    assert listed.status == 200 and listed.json == {"items": [known]}


_BAD_KEYS: list[tuple[dict[str, object], str, str]] = [
    ({"name": None}, "invalid_request", "name"),
    ({"name": "x" * 129}, "invalid_request", "name"),
    ({"scopes": []}, "invalid_request", "scopes"),
    ({"scopes": ["everything"]}, "invalid_request", "scopes[0]"),
    ({"scopes": "account"}, "invalid_request", "scopes"),
    ({"rpm": 5}, "unknown_parameter", "rpm"),
    ({"limits": {"requests": 5}}, "unknown_parameter", "limits.requests"),
    ({"limits": {"rpm": 0}}, "invalid_request", "limits.rpm"),
    ({"limits": {"rpm": -1}}, "invalid_request", "limits.rpm"),
    ({"limits": {"rpm": True}}, "invalid_request", "limits.rpm"),
    ({"limits": {"rpm": 1.5}}, "invalid_request", "limits.rpm"),
    ({"limits": {"rpm": "5"}}, "invalid_request", "limits.rpm"),
    ({"limits": {"rpm": 10**9}}, "invalid_request", "limits.rpm"),
    ({"limits": {"tpm": 10**30}}, "invalid_request", "limits.tpm"),
    ({"limits": {"daily_tokens": 0}}, "invalid_request", "limits.daily_tokens"),
    ({"limits": {"concurrency": 0}}, "invalid_request", "limits.concurrency"),
    ({"limits": {"cost_cap_usd": -1}}, "invalid_request", "limits.cost_cap_usd"),
    ({"limits": {"cost_cap_usd": True}}, "invalid_request", "limits.cost_cap_usd"),
    ({"limits": {"cost_cap_usd": "NaN"}}, "invalid_request", "limits.cost_cap_usd"),
    ({"limits": {"cost_cap_usd": 1e-9}}, "invalid_request", "limits.cost_cap_usd"),
    ({"limits": {"cost_cap_usd": 10**9}}, "invalid_request", "limits.cost_cap_usd"),
    ({"limits": {"allowed_models": []}}, "invalid_request", "limits.allowed_models"),
    ({"limits": {"allowed_models": [""]}}, "invalid_request", "limits.allowed_models[0]"),
    ({"limits": {"allowed_models": ["a b"]}}, "invalid_request", "limits.allowed_models[0]"),
    ({"limits": {"allowed_models": ["a"] * 257}}, "invalid_request", "limits.allowed_models"),
    ({"limits": {"expires_at": "2001-01-01T00:00:00Z"}}, "invalid_request", "limits.expires_at"),
    ({"limits": []}, "invalid_request", "limits"),
]


async def test_a_key_that_does_not_fit_is_refused(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for fields, code, param in _BAD_KEYS:
        body = {"name": "ci"} | fields
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/keys", body)
        assert answer.error == (400, code, param), fields
    _, secret = await api.new_key(workspace_id)
    listed = await api.call("GET", "/v1/account/keys/list", secret)
    assert len(listed.json["items"]) == 1


async def test_a_cap_of_zero_is_a_cap_and_null_is_none(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for sent, answered in [("0", 0), ("null", None)]:
        body = f'{{"name":"ci","limits":{{"cost_cap_usd":{sent}}}}}'.encode()
        made = await api.operator("POST", f"/workspaces/{workspace_id}/keys", body)
        assert made.json["limits"]["cost_cap_usd"] == answered


async def test_a_revoked_key_is_refused_at_once_and_stays_listed(api: Api) -> None:
    workspace_id = await api.new_workspace()
    key_id, secret = await api.new_key(workspace_id)
    other_id, other = await api.new_key(workspace_id)
    for _ in range(2):
        answer = await api.call("DELETE", f"/v1/account/keys/revoke/{key_id}", other)
        assert answer.status == 200 and answer.json == {"revoked": True}
        refused = await api.call("GET", "/v1/account/whoami", secret)
        assert refused.error == (401, "invalid_api_key", None)
    listed = await api.call("GET", "/v1/account/keys/list", other)
    states = {item["key_id"]: item["status"] for item in listed.json["items"]}
    assert states == {key_id: "revoked", other_id: "active"}


async def test_a_key_may_revoke_itself(api: Api) -> None:
    key_id, secret = await api.new_key(await api.new_workspace())
    answer = await api.call("DELETE", f"/v1/account/keys/revoke/{key_id}", secret)
    assert answer.json == {"revoked": True}
    assert (await api.call("GET", "/v1/account/balance", secret)).status == 401


async def test_a_revocation_takes_no_other_parameter(api: Api) -> None:
    key_id, secret = await api.new_key(await api.new_workspace())
    where = f"/v1/account/keys/revoke/{key_id}"
    answer = await api.call("DELETE", where, secret, {"force": True})
    assert answer.error == (400, "unknown_parameter", "force")
    answer = await api.call("DELETE", where, secret, {"idempotency_key": "once"})
    assert answer.status == 200


async def test_a_workspace_never_sees_another(api: Api) -> None:
    ours, theirs = await api.new_workspace(), await api.new_workspace()
    our_key, our_secret = await api.new_key(ours)
    their_key, their_secret = await api.new_key(theirs)
    await api.operator("POST", f"/workspaces/{theirs}/grants", {"kind": "topup", "amount_usd": 7})
    for key_id in (their_key, new_id("key"), new_id("ws"), "nothing", "key_%00"):
        answer = await api.call("DELETE", f"/v1/account/keys/revoke/{key_id}", our_secret)
        assert answer.error == (404, "not_found", None)
    listed = await api.call("GET", "/v1/account/keys/list", our_secret)
    assert [item["key_id"] for item in listed.json["items"]] == [our_key]
    balance = await api.call("GET", "/v1/account/balance", our_secret)
    assert balance.json["balance_usd"] == 0
    whoami = await api.call("GET", "/v1/account/whoami", our_secret)
    assert whoami.json["account_id"] == ours
    assert (await api.call("GET", "/v1/account/whoami", their_secret)).status == 200
