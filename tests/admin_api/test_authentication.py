"""Who may call what: every route, with every wrong credential there is."""

import base64
import json

import pytest

from accounting import keys
from accounting.contract.identifiers import new_id
from accounting.contract.settings import Secret, Settings
from admin_api.app import application
from admin_api.call import Services
from admin_api.routes import HEALTHZ, OPENAPI, PUBLIC, ROUTES, Caller
from tests.admin_api.conftest import OPERATOR, Api


def a_path(template: str) -> str:
    prefix = "key" if "keys/revoke" in template else "ws"
    return template.replace("{id}", new_id(prefix))


def test_the_router_serves_the_table_and_the_short_list_only() -> None:
    """So a new route cannot escape the tests below, nor authentication."""
    app = application(Services(Settings(), Secret("x"), None, None))  # type: ignore[arg-type]
    served = {(route.method, route.resource.canonical) for route in app.router.routes()}
    public = {("GET", path) for path in PUBLIC}
    assert served - public == {(route.method, route.path) for route in ROUTES}
    assert public <= served
    assert PUBLIC == ("/healthz", "/v1/openapi.json")
    assert len({route.operation for route in ROUTES}) == len(ROUTES)


async def test_every_route_without_a_credential_answers_401(api: Api) -> None:
    for route in ROUTES:
        answer = await api.call(route.method, a_path(route.path), None)
        assert answer.error == (401, "invalid_api_key", None), route.template
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_the_short_list_needs_none(api: Api) -> None:
    health = await api.call("GET", HEALTHZ, None)
    assert health.status == 200 and health.json == {"status": "ok"}
    assert (await api.call("GET", OPENAPI, None)).status == 200


async def test_wrong_credentials_are_refused_on_every_route(api: Api) -> None:
    basic = base64.b64encode(f"operator:{OPERATOR}".encode()).decode()
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {basic}",
        OPERATOR,
        f"Bearer {OPERATOR}x",
        f"Bearer {OPERATOR[:-1]}",
        f"Bearer {keys.new_secret().reveal()}",
        "Bearer inf_" + "ä" * 43,
        "Bearer inf_' or 1=1 --",
    ]
    for route in ROUTES:
        for header in wrong:
            headers = {"Authorization": header}
            answer = await api.call(route.method, a_path(route.path), None, headers=headers)
            assert answer.error == (401, "invalid_api_key", None), (route.template, header)


async def test_the_operators_token_is_nobodys_key_and_no_key_is_an_operators(api: Api) -> None:
    _, secret = await api.new_key(await api.new_workspace())
    for route in ROUTES:
        other = OPERATOR if route.caller is Caller.KEY else secret
        answer = await api.call(route.method, a_path(route.path), other)
        assert answer.error == (401, "invalid_api_key", None), route.template


async def test_who_calls_is_asked_before_what_is_sent(api: Api) -> None:
    large = b"x" * 2_000_000
    answer = await api.call("POST", "/v1/admin/workspaces", None, large)
    assert answer.status == 401
    answer = await api.operator("POST", "/workspaces", b"x" * 1_048_577)
    assert answer.error == (413, "request_too_large", None)


async def test_the_scheme_is_no_matter_of_case(api: Api) -> None:
    headers = {"Authorization": f"bearer  {OPERATOR}"}
    path = f"/v1/admin/workspaces/{await api.new_workspace()}"
    assert (await api.call("GET", path, None, headers=headers)).status == 200


async def test_a_key_without_the_scope_is_refused_on_every_account_route(api: Api) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id, scopes=["inference"])
    _, allowed = await api.new_key(workspace_id, scopes=["account"])
    assert (await api.call("GET", "/v1/account/whoami", allowed)).status == 200
    for route in (route for route in ROUTES if route.caller is Caller.KEY):
        answer = await api.call(route.method, a_path(route.path), secret)
        assert answer.error == (403, "insufficient_scope", None), route.template


async def test_unknown_paths_and_methods_are_told_in_the_envelope(api: Api) -> None:
    for path in ("/", "/v1/account", "/v1/account/topup", "/v1/admin", "/v1/account/balance/"):
        assert (await api.call("GET", path, OPERATOR)).error == (404, "not_found", None)
    answer = await api.call("PUT", "/v1/account/balance", OPERATOR)
    assert answer.error == (405, "method_not_allowed", None)
    assert answer.headers["allow"] == "GET"
    answer = await api.call("POST", HEALTHZ, None)
    assert answer.error == (405, "method_not_allowed", None)


async def test_no_answer_is_cached_or_names_what_serves_it(api: Api) -> None:
    for path in ("/v1/account/balance", HEALTHZ, "/nowhere"):
        headers = (await api.call("GET", path, None)).headers
        assert headers["cache-control"] == "no-store" and headers["server"] == "tollgate"


async def test_secrets_are_neither_logged_nor_shown(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace_id = await api.new_workspace()
    _, secret = await api.new_key(workspace_id)

    async def breaks(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(keys, "list_all", breaks)
    with caplog.at_level("DEBUG"):
        answer = await api.call("GET", "/v1/account/keys/list", secret)
        await api.new_key(workspace_id)
    assert answer.error == (500, "internal_error", None)
    failed = [record for record in caplog.records if record.exc_info]
    assert len(failed) == 1 and answer.headers["x-request-id"] in failed[0].getMessage()
    assert "inf_" not in caplog.text and OPERATOR not in caplog.text
    assert "ZeroDivision" not in answer.text


async def test_the_description_covers_every_route(api: Api) -> None:
    document = json.loads((await api.call("GET", OPENAPI, None)).text)
    assert document["openapi"] == "3.1.0"
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert described == {(route.method, route.path) for route in ROUTES} | {
        ("GET", path) for path in PUBLIC
    }
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= set(schemas)
    create = document["paths"]["/v1/admin/workspaces/{id}/grants"]["post"]
    assert create["security"] == [{"operatorToken": []}]
    assert {"201", "400", "401", "404", "409", "413", "422", "503"} <= set(create["responses"])
    assert schemas["NewGrant"]["properties"]["amount_usd"]["type"] == ["number", "string"]
    assert schemas["WalletBalance"]["properties"]["balance_usd"]["type"] == "number"
