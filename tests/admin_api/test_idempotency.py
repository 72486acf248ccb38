"""Idempotency keys over HTTP: carried out once, shown as often as asked."""

import asyncio
from typing import Any

import asyncpg
import pytest
from msgspec import structs

from accounting.contract.settings import Secret, Settings
from tests.admin_api.conftest import OPERATOR, Answer, Api, running
from tests.waiting import eventually

ONCE = {"Idempotency-Key": "once"}


async def count(settings: Settings, table: str, where: str = "true") -> int:
    connection = await asyncpg.connect(settings.database_url.reveal())
    try:
        return int(await connection.fetchval(f"select count(*) from {table} where {where}"))
    finally:
        await connection.close()


def replayed(answer: Answer) -> bool:
    return answer.headers.get("Idempotent-Replayed") == "true"


async def test_a_repeated_workspace_is_the_same(api: Api, settings: Settings) -> None:
    first = await api.operator("POST", "/workspaces", {"name": "Acme"}, ONCE)
    again = await api.operator("POST", "/workspaces", {"name": "Acme"}, ONCE)
    in_body = {"name": "Acme", "idempotency_key": "once"}
    third = await api.operator("POST", "/workspaces", in_body)
    both = await api.operator("POST", "/workspaces", in_body, ONCE)
    assert first.status == again.status == third.status == both.status == 201
    assert first.json == again.json == third.json == both.json
    assert [replayed(one) for one in (first, again, third, both)] == [False, True, True, True]
    assert await count(settings, "workspaces") == 1


async def test_without_a_key_each_request_counts(api: Api, settings: Settings) -> None:
    for _ in range(2):
        answer = await api.operator("POST", "/workspaces", {"name": "Acme"})
        assert not replayed(answer)
    assert await count(settings, "workspaces") == 2


async def test_a_repeated_grant_is_paid_once(api: Api) -> None:
    workspace_id = await api.new_workspace()
    body = {"kind": "topup", "amount_usd": 5, "expires_at": "2100-01-01T00:00:00Z"}
    grants = f"/workspaces/{workspace_id}/grants"
    first = await api.operator("POST", grants, body, ONCE)
    again = await api.operator("POST", grants, body, ONCE)
    assert first.status == again.status == 201 and first.json == again.json
    assert replayed(again)
    assert (await api.operator("GET", f"/workspaces/{workspace_id}")).json["balance_usd"] == 5


async def test_a_repeated_key_shows_its_secret_to_the_same_caller_only(
    api: Api, settings: Settings
) -> None:
    workspace_id = await api.new_workspace()
    where = f"/workspaces/{workspace_id}/keys"
    first = await api.operator("POST", where, {"name": "ci"}, ONCE)
    again = await api.operator("POST", where, {"name": "ci"}, ONCE)
    assert first.json == again.json and replayed(again)
    secret = first.json["key_secret"]
    assert (await api.call("GET", "/v1/account/whoami", secret)).status == 200
    another = structs.replace(settings, operator_token=Secret("another-operator"))
    async with running(another) as after:
        path = f"/v1/admin{where}"
        late = await after.call("POST", path, "another-operator", {"name": "ci"}, ONCE)
    assert late.status == 201 and late.json == first.json | {"key_secret": None}
    assert await count(settings, "api_keys") == 1
    connection = await asyncpg.connect(settings.database_url.reveal())
    rows = await connection.fetch("select i::text from idempotency i")
    await connection.close()
    assert rows and not any(secret.removeprefix("inf_") in row[0] for row in rows)


async def test_a_repeated_suspension_does_not_suspend_again(api: Api) -> None:
    workspace_id = await api.new_workspace()
    suspend = f"/workspaces/{workspace_id}/suspend"
    first = await api.operator("POST", suspend, headers=ONCE)
    assert first.json["status"] == "suspended"
    await api.operator("POST", f"/workspaces/{workspace_id}/resume", headers=ONCE)
    again = await api.operator("POST", suspend, headers=ONCE)
    assert replayed(again) and again.json["status"] == "active"


async def test_a_deletion_takes_its_key_from_anywhere(api: Api) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)
    doomed, _ = await api.new_key(workspace_id)
    where = f"/v1/account/keys/revoke/{doomed}"
    answers = [
        await api.call("DELETE", where, secret, headers=ONCE),
        await api.call("DELETE", f"{where}?idempotency_key=once", secret),
        await api.call("DELETE", where, secret, {"idempotency_key": "once"}),
    ]
    assert all(answer.json == {"revoked": True} for answer in answers)
    assert [replayed(answer) for answer in answers] == [False, True, True]
    torn = await api.call("DELETE", f"{where}?idempotency_key=other", secret, headers=ONCE)
    assert torn.error == (400, "invalid_request", "idempotency_key")


async def test_workspaces_do_not_share_idempotency_keys(api: Api) -> None:
    for _ in range(2):
        key_id, secret = await api.new_key(await api.new_workspace())
        where = f"/v1/account/keys/revoke/{key_id}"
        assert not replayed(await api.call("DELETE", where, secret, headers=ONCE))


async def test_another_request_under_the_key_is_refused(api: Api, settings: Settings) -> None:
    ours, theirs = await api.new_workspace(), await api.new_workspace()
    body: dict[str, Any] = {"kind": "topup", "amount_usd": 5}
    await api.operator("POST", f"/workspaces/{ours}/grants", body, ONCE)
    for where, changed in [
        (ours, body | {"amount_usd": 6}),
        (ours, body | {"kind": "promo"}),
        (theirs, body),
    ]:
        answer = await api.operator("POST", f"/workspaces/{where}/grants", changed, ONCE)
        assert answer.error == (422, "idempotency_mismatch", None)
        assert answer.headers["x-should-retry"] == "false"
    assert await count(settings, "grants") == 1


@pytest.mark.parametrize("verb", ["workspaces", "grants", "keys"])
async def test_of_many_at_once_one_is_carried_out(api: Api, settings: Settings, verb: str) -> None:
    path, body = "/workspaces", {"name": "Acme"}
    if verb != "workspaces":
        path = f"/workspaces/{await api.new_workspace()}/{verb}"
        body = {"kind": "topup", "amount_usd": "5"} if verb == "grants" else {"name": "ci"}
    before = await count(settings, {"keys": "api_keys"}.get(verb, verb))
    answers = await asyncio.gather(*(api.operator("POST", path, body, ONCE) for _ in range(8)))
    made = [answer for answer in answers if answer.status == 201]
    waiting = [answer for answer in answers if answer.status == 409]
    assert len(made) + len(waiting) == 8
    assert sum(not replayed(answer) for answer in made) == 1
    assert all(answer.json == made[0].json for answer in made)
    for answer in waiting:
        assert answer.error == (409, "idempotency_in_progress", None)
        assert answer.headers["retry-after"] == "1"
    assert await count(settings, {"keys": "api_keys"}.get(verb, verb)) == before + 1
    last = await api.operator("POST", path, body, ONCE)
    assert replayed(last) and last.json == made[0].json


async def test_a_second_request_is_told_that_the_first_is_in_progress(
    api: Api, settings: Settings
) -> None:
    workspace_id = await api.new_workspace()
    suspend = f"/workspaces/{workspace_id}/suspend"
    connection = await asyncpg.connect(settings.database_url.reveal())
    try:
        async with connection.transaction():
            await connection.fetch("select from workspaces for update")
            first = asyncio.create_task(api.operator("POST", suspend, headers=ONCE))
            await eventually(lambda: count(settings, "idempotency"))
            second = await api.operator("POST", suspend, headers=ONCE)
            assert second.error == (409, "idempotency_in_progress", None)
            assert not first.done()
        assert (await first).json["status"] == "suspended"
    finally:
        await connection.close()


async def test_a_refused_request_does_not_use_its_key_up(api: Api, settings: Settings) -> None:
    workspace_id = await api.new_workspace()
    grants = f"/workspaces/{workspace_id}/grants"
    for amount in (0, 2_000_000, "much"):
        body = {"kind": "topup", "amount_usd": amount}
        assert (await api.operator("POST", grants, body, ONCE)).status == 400
    nowhere = grants.replace(workspace_id, "ws_nowhere")
    body = {"kind": "topup", "amount_usd": 1}
    assert (await api.operator("POST", nowhere, body, ONCE)).status == 404
    assert await count(settings, "idempotency") == 0
    answer = await api.operator("POST", grants, body, ONCE)
    assert answer.status == 201 and not replayed(answer)


async def test_a_bad_idempotency_key_is_refused(api: Api, settings: Settings) -> None:
    for key in ("", "x" * 256, "a\nb", "a\x00b"):
        answer = await api.operator("POST", "/workspaces", {"name": "a", "idempotency_key": key})
        assert answer.error == (400, "invalid_request", "idempotency_key")
    for headers in ({"Idempotency-Key": ""}, {"Idempotency-Key": "x" * 256}):
        answer = await api.operator("POST", "/workspaces", {"name": "a"}, headers)
        assert answer.error == (400, "invalid_request", "idempotency_key")
    torn = {"name": "a", "idempotency_key": "other"}
    answer = await api.operator("POST", "/workspaces", torn, ONCE)
    assert answer.error == (400, "invalid_request", "idempotency_key")
    assert await count(settings, "workspaces") == 0
    longest = {"name": "a", "idempotency_key": "ü" * 255}
    assert (await api.operator("POST", "/workspaces", longest)).status == 201


async def test_the_operators_token_is_part_of_no_answer(api: Api) -> None:
    answer = await api.operator("POST", "/workspaces", {"name": "Acme"}, ONCE)
    assert OPERATOR not in answer.text + str(answer.headers)
