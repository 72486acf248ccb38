"""The operator's workspaces and grants, over HTTP."""

from decimal import Decimal

from accounting.contract.identifiers import new_id
from tests.admin_api.conftest import Api


async def test_a_workspace_is_opened_and_read(api: Api) -> None:
    made = await api.operator("POST", "/workspaces", {"name": "Acme", "email": "a@acme.example"})
    assert made.status == 201
    assert made.json["workspace_id"].startswith("ws_")
    assert made.json["name"] == "Acme" and made.json["email"] == "a@acme.example"
    assert made.json["status"] == "active"
    read = await api.operator("GET", f"/workspaces/{made.json['workspace_id']}")
    assert read.status == 200
    wallet = {
        "balance_usd": 0,
        "held_usd": 0,
        "available_usd": 0,
        "currency": "USD",
    }
    assert read.json == made.json | wallet


async def test_a_workspace_needs_no_email(api: Api) -> None:
    made = await api.operator("POST", "/workspaces", {"name": "Acme"})
    assert made.status == 201 and made.json["email"] is None


_BAD_WORKSPACES: list[tuple[object, str, str | None]] = [
    ({}, "missing_parameter", "name"),
    ({"name": ""}, "invalid_request", "name"),
    ({"name": "  "}, "invalid_request", "name"),
    ({"name": "x" * 129}, "invalid_request", "name"),
    ({"name": "line\n"}, "invalid_request", "name"),
    ({"name": "a\x00b"}, "invalid_request", "name"),
    ({"name": 5}, "invalid_request", "name"),
    ({"name": None}, "invalid_request", "name"),
    ({"name": "Acme", "email": "nobody"}, "invalid_request", "email"),
    ({"name": "Acme", "email": "a@b\n"}, "invalid_request", "email"),
    ({"name": "Acme", "tier": "pro"}, "unknown_parameter", "tier"),
    ([], "invalid_request", None),
    (b"{", "invalid_json", None),
    (b'{"name": NaN}', "invalid_json", None),
    (b'{"name": "\xff"}', "invalid_json", None),
    (b'{"name": "\\ud800"}', "invalid_json", None),
    (b"[" * 100_000, "invalid_request", None),
    (b'{"name":' + b"[" * 100_000, "invalid_request", "name"),
]


async def test_a_body_that_does_not_fit_is_refused_by_name(api: Api) -> None:
    for body, code, param in _BAD_WORKSPACES:
        answer = await api.operator("POST", "/workspaces", body)
        assert answer.error == (400, code, param), body


async def test_a_workspace_that_does_not_exist_is_not_found(api: Api) -> None:
    bodies = {"/grants": {"kind": "promo", "amount_usd": 1}, "/keys": {"name": "a"}}
    strange = [new_id("ws"), new_id("key"), "ws_", "nothing", "ws_%00", "%F0%9F%A6%8A"]
    for path in ["", "/suspend", "/resume", "/grants", "/keys"]:
        for workspace_id in strange:
            where = f"/workspaces/{workspace_id}{path}"
            answer = await api.operator("POST" if path else "GET", where, bodies.get(path))
            assert answer.error == (404, "not_found", None), where


async def test_suspend_and_resume_say_the_new_state(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for verb, status in [("suspend", "suspended"), ("suspend", "suspended"), ("resume", "active")]:
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/{verb}")
        assert answer.status == 200 and answer.json["status"] == status
        read = await api.operator("GET", f"/workspaces/{workspace_id}")
        assert read.json["status"] == status


async def test_a_grant_of_each_kind_is_spendable_at_once(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for number, kind in enumerate(["trial", "promo", "plan", "rollover", "topup"], start=1):
        body = {"kind": kind, "amount_usd": 0.1}
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.status == 201
        assert answer.json["kind"] == kind and answer.json["spendable"] is True
        assert answer.json["amount_usd"] == answer.json["remaining_usd"] == Decimal("0.1")
        read = await api.operator("GET", f"/workspaces/{workspace_id}")
        assert read.json["balance_usd"] == read.json["available_usd"] == number * Decimal("0.1")


_EXACT = [
    ("20", "20"),
    ('"20"', "20"),
    ("20.00", "20"),
    ("0.00000001", "0.00000001"),
    ("1e-8", "0.00000001"),
    ("19.99999999", "19.99999999"),
    ('"0.30000001"', "0.30000001"),
    ("1000000", "1000000"),
    ("1E6", "1000000"),
]


async def test_amounts_are_exact(api: Api) -> None:
    for sent, exact in _EXACT:
        workspace_id = await api.new_workspace()
        body = f'{{"kind":"promo","amount_usd":{sent}}}'.encode()
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.status == 201
        assert f'"amount_usd":{exact},' in answer.text
        read = await api.operator("GET", f"/workspaces/{workspace_id}")
        assert f'"balance_usd":{exact},' in read.text


_NO_AMOUNTS = [
    *("0", "-1", "-0.5", "0.000000001", "1e-9", "1000000.00000001", "1e309", "1e99999"),
    *("true", "false", "null", "[]", "{}", '""', '"NaN"', '"Infinity"', '"-1"', '"1e3"'),
    *('"1_000"', '" 1"', '"1,5"', '"1.2.3"', '"\\u0661"', '"0x10"'),
    "0." + "0" * 60 + "1",
    "1." + "0" * 29 + "1",
]


async def test_an_amount_that_is_none_is_refused(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for amount in _NO_AMOUNTS:
        body = f'{{"kind":"promo","amount_usd":{amount}}}'.encode()
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.error == (400, "invalid_request", "amount_usd"), amount
    read = await api.operator("GET", f"/workspaces/{workspace_id}")
    assert read.json["balance_usd"] == 0


_BAD_GRANTS: list[tuple[dict[str, object], str, str]] = [
    ({"kind": "gift"}, "invalid_request", "kind"),
    ({"kind": "restored"}, "invalid_request", "kind"),
    ({"kind": None}, "invalid_request", "kind"),
    ({"expires_at": "2001-01-01T00:00:00Z"}, "invalid_request", "expires_at"),
    ({"expires_at": "2100-01-01T00:00:00"}, "invalid_request", "expires_at"),
    ({"expires_at": "9999-12-31T23:59:59-23:59"}, "invalid_request", "expires_at"),
    ({"expires_at": "tomorrow"}, "invalid_request", "expires_at"),
    ({"expires_at": 4102444800}, "invalid_request", "expires_at"),
    ({"amount": 5}, "unknown_parameter", "amount"),
]


async def test_a_grant_that_does_not_fit_is_refused(api: Api) -> None:
    workspace_id = await api.new_workspace()
    for fields, code, param in _BAD_GRANTS:
        body = {"kind": "promo", "amount_usd": 1} | fields
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.error == (400, code, param), fields


async def test_a_balance_beyond_all_bounds_is_refused(api: Api) -> None:
    workspace_id = await api.new_workspace()
    body = {"kind": "promo", "amount_usd": 1_000_000}
    for _ in range(90):
        answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
        assert answer.status == 201
    answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
    assert answer.error == (409, "conflict", None)
    read = await api.operator("GET", f"/workspaces/{workspace_id}")
    assert read.json["balance_usd"] == 90_000_000


async def test_an_expiry_is_answered_as_given(api: Api) -> None:
    workspace_id = await api.new_workspace()
    body = {"kind": "trial", "amount_usd": 20, "expires_at": "2100-01-01T02:00:00+02:00"}
    answer = await api.operator("POST", f"/workspaces/{workspace_id}/grants", body)
    assert answer.json["expires_at"] == "2100-01-01T00:00:00Z"
