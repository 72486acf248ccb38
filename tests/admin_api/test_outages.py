"""A store goes away and comes back: 503 and never 401, and a repetition completes the work."""

from decimal import Decimal

import msgspec
from redis.asyncio import Redis

from accounting.contract import keyspace
from accounting.contract.identifiers import new_id
from admin_api.routes import ROUTES, Caller
from tests.admin_api.conftest import OPERATOR, Answer, Api
from tests.admin_api.cuttable import Cuttable

ONCE = {"Idempotency-Key": "once"}


def is_outage(answer: Answer) -> bool:
    return answer.error == (503, "service_unavailable", None) and (
        int(answer.headers["retry-after"]) >= 1
    )


async def test_without_postgres_every_route_answers_503(
    api_on_lines: Api, postgres_line: Cuttable
) -> None:
    api = api_on_lines
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    bodies = {
        "admin.workspaces.create": {"name": "a"},
        "admin.grants.create": {"kind": "topup", "amount_usd": 1},
        "admin.grants.refund": {"amount_usd": 1},
        "admin.keys.create": {"name": "a"},
    }
    ids = {"workspaces": workspace_id, "grants": new_id("grant"), "usage": new_id("req")}
    await postgres_line.cut()
    for route in ROUTES:
        path = route.path.replace("{id}", ids.get(route.path.split("/")[3], new_id("key")))
        token = secret if route.caller is Caller.KEY else OPERATOR
        answer = await api.call(route.method, path, token, bodies.get(route.operation))
        assert is_outage(answer), (route.template, answer)
    assert (await api.call("GET", "/v1/account/balance", "inf_" + "x" * 43)).status == 503
    assert (await api.call("GET", "/v1/account/balance", "nonsense")).status == 401
    assert (await api.call("GET", "/healthz", None)).status == 200
    await postgres_line.mend()
    assert (await api.call("GET", "/v1/account/balance", secret)).status == 200


async def test_without_redis_no_balance_is_told(api_on_lines: Api, redis_line: Cuttable) -> None:
    api = api_on_lines
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    await redis_line.cut()
    assert is_outage(await api.operator("GET", f"/workspaces/{workspace_id}"))
    assert is_outage(await api.call("GET", "/v1/account/balance", secret))
    assert is_outage(await api.call("GET", "/v1/account/whoami", secret))
    assert (await api.call("GET", "/v1/account/keys/list", secret)).status == 200
    await redis_line.mend()
    assert (await api.call("GET", "/v1/account/whoami", secret)).status == 200


async def test_a_redis_that_lost_its_data_is_an_outage(api: Api, redis_client: Redis) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    await api.operator("POST", f"/workspaces/{workspace_id}/grants", _grant())
    await redis_client.flushall()
    assert is_outage(await api.call("GET", "/v1/account/balance", secret))
    assert is_outage(await api.operator("GET", f"/workspaces/{workspace_id}"))
    assert is_outage(await api.operator("POST", f"/workspaces/{workspace_id}/grants", _grant()))


async def test_a_suspension_that_missed_redis_is_completed_by_a_repetition(
    api_on_lines: Api, redis_line: Cuttable, redis_client: Redis
) -> None:
    api = api_on_lines
    workspace_id = await api.new_workspace()
    await redis_line.cut()
    suspend = f"/workspaces/{workspace_id}/suspend"
    for headers in (None, ONCE):
        assert is_outage(await api.operator("POST", suspend, headers=headers))
    await redis_line.mend()
    answer = await api.operator("POST", suspend, headers=ONCE)
    assert answer.json["status"] == "suspended" and "Idempotent-Replayed" not in answer.headers
    packed = await redis_client.hget(keyspace.workspace_key(workspace_id), "w")
    wallet = msgspec.msgpack.decode(packed, type=keyspace.Wallet)
    assert wallet == keyspace.Wallet(0, 0, keyspace.SUSPENDED, 0)


async def test_a_revocation_that_missed_redis_is_completed_by_a_repetition(
    api_on_lines: Api, redis_line: Cuttable, redis_client: Redis
) -> None:
    api = api_on_lines
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    doomed, doomed_secret = await api.new_key(workspace_id)
    record = keyspace.digest_key(keyspace.digest_of(doomed_secret))
    await redis_line.cut()
    where = f"/v1/account/keys/revoke/{doomed}"
    assert is_outage(await api.call("DELETE", where, secret))
    assert await redis_client.exists(record)
    await redis_line.mend()
    assert (await api.call("DELETE", where, secret)).json == {"revoked": True}
    assert not await redis_client.exists(record)


async def test_what_was_made_halfway_is_made_once(api_on_lines: Api, redis_line: Cuttable) -> None:
    """Workspace and key are in Postgres when Redis fails; the repetition finds the same."""
    api = api_on_lines
    workspace_id = await api.new_workspace()
    await redis_line.cut()
    for path in ("/workspaces", f"/workspaces/{workspace_id}/keys"):
        assert is_outage(await api.operator("POST", path, {"name": "a"}, ONCE))
    grants = f"/workspaces/{workspace_id}/grants"
    assert is_outage(await api.operator("POST", grants, _grant(), ONCE))
    await redis_line.mend()
    made = await api.operator("POST", "/workspaces", {"name": "a"}, ONCE)
    assert made.status == 201
    assert (await api.operator("GET", f"/workspaces/{made.json['workspace_id']}")).status == 200
    key = await api.operator("POST", f"/workspaces/{workspace_id}/keys", {"name": "a"}, ONCE)
    listed = await api.call("GET", "/v1/account/keys/list", key.json["key_secret"])
    assert [item["key_id"] for item in listed.json["items"]] == [key.json["key_id"]]
    for _ in range(2):
        assert (await api.operator("POST", grants, _grant(), ONCE)).status == 201
    balance = await api.call("GET", "/v1/account/balance", key.json["key_secret"])
    assert balance.json["balance_usd"] == Decimal("1.5")


def _grant() -> dict[str, object]:
    return {"kind": "topup", "amount_usd": 1.5}
