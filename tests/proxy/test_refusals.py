"""Requests that are read but not served: by whom, for what, with which words, paid by whom.

Each refusal leaves every byte of Redis as it was, and no provider hears of it.
"""

import json

import pytest

from accounting.contract import keyspace
from tests.proxy.ends import chat, request, standin
from tests.proxy.harness import Scene

BODY = json.dumps(chat()).encode()
UNKNOWN = "inf_" + "x" * 43


# Who asks, and for what


async def test_a_key_that_stands_for_nobody_is_401(proxy: Scene) -> None:
    async with proxy.no_trace():
        for secret in ("", "x", "inf_short", "sk-" + "x" * 44, UNKNOWN, "inf_" + "\xff" * 43):
            answer = await proxy.ask(secret, chat())
            assert answer.refused == (401, "invalid_api_key")
            assert answer.error["type"] == "invalid_request_error"
            assert "x-should-retry" not in answer.headers


async def test_other_authorization_than_bearer_is_401(proxy: Scene) -> None:
    key = proxy.seeds.key()
    async with proxy.no_trace():
        for value in (f"Basic {key.secret}", key.secret, f"Bearer{key.secret}", "Bearer"):
            answer = await proxy.ask("", chat(), Authorization=value)
            assert answer.refused == (401, "invalid_api_key")


async def test_a_revoked_key_is_401_on_the_next_request(proxy: Scene) -> None:
    key = proxy.seeds.key()
    assert (await proxy.ask(key, chat())).status == 200
    await proxy.quiet()
    proxy.seeds.rules(key, version=2, state=keyspace.REVOKED)
    async with proxy.no_trace():
        assert (await proxy.ask(key, chat())).status in (401, 503)  # its record is still there
    proxy.seeds.store.client.delete(keyspace.digest_key(key.digest))
    async with proxy.no_trace():
        assert (await proxy.ask(key, chat())).refused == (401, "invalid_api_key")


async def test_a_revoked_key_with_its_record_is_401(proxy: Scene) -> None:
    key = proxy.seeds.key()
    proxy.seeds.rules(key, version=1, state=keyspace.REVOKED)
    async with proxy.no_trace():
        assert (await proxy.ask(key, chat())).refused == (401, "invalid_api_key")


async def test_an_expired_key_is_401(proxy: Scene) -> None:
    key = proxy.seeds.key(expires_at_us=1)
    async with proxy.no_trace():
        assert (await proxy.ask(key, chat())).refused == (401, "invalid_api_key")


async def test_a_suspended_workspace_is_403(proxy: Scene) -> None:
    key = proxy.seeds.key(state=keyspace.SUSPENDED)
    async with proxy.no_trace():
        answer = await proxy.ask(key, chat())
        assert answer.refused == (403, "account_suspended")
        assert answer.error["type"] == "permission_error"


async def test_a_model_outside_the_keys_list_is_403(proxy: Scene) -> None:
    key = proxy.seeds.key(allowed_models=("other",))
    async with proxy.no_trace():
        answer = await proxy.ask(key, chat())
        assert answer.refused == (403, "model_not_allowed")
        assert answer.error["param"] == "model"
    assert (await proxy.ask(key, chat(model="other"))).status == 200


async def test_changed_rules_are_read_again(proxy: Scene) -> None:
    key = proxy.seeds.key()
    assert (await proxy.ask(key, chat())).status == 200
    proxy.seeds.record(key, version=2, allowed_models=("other",))
    proxy.seeds.rules(key, version=2)
    assert (await proxy.ask(key, chat())).refused == (403, "model_not_allowed")


async def test_without_the_epoch_the_gate_is_closed(proxy: Scene) -> None:
    known, lost = proxy.seeds.key(), proxy.seeds.key()
    assert (await proxy.ask(known, chat())).status == 200
    await proxy.quiet()
    proxy.seeds.keys.clear()
    proxy.seeds.store.client.flushall()
    for key in (known, lost):
        answer = await proxy.ask(key, chat())
        assert answer.refused == (503, "service_unavailable")
        assert int(answer.headers["retry-after"]) >= 1


BAD_BODIES = [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (b"not json", 400, "invalid_json"),
    (b"\xff\xfe{}", 400, "invalid_json"),
    (b'{"model":"small","messages":' + b"[" * 100_000, 400, "invalid_json"),
    (BODY + b"}", 400, "invalid_json"),
    (BODY.replace(b"100", b"NaN"), 400, "invalid_json"),
    (BODY.replace(b"100", b"Infinity"), 400, "invalid_json"),
    (b"[]", 400, "invalid_request"),
    (b'"text"', 400, "invalid_request"),
    (b"null", 400, "invalid_request"),
    (b"{}", 400, "missing_parameter"),
    (b'{"messages":[]}', 400, "missing_parameter"),
    (b'{"model":"small"}', 400, "missing_parameter"),
    (b'{"model":"small","messages":[],"temperature":NaN}', 400, "invalid_json"),
    (b'{"model":"nowhere","messages":[]}', 404, "model_not_found"),
]
BAD_FIELDS = [
    {"model": 7},
    {"model": ""},
    {"model": None},
    {"model": "x" * 300},
    {"messages": "hi"},
    {"messages": {}},
    {"stream": "true"},
    {"stream": 1},
    {"stream_options": []},
    {"stream_options": {"include_usage": "yes"}},
    {"max_tokens": "5"},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": 10**30},
    {"max_completion_tokens": -1},
    {"n": 0},
    {"n": 1000},
    {"modalities": "audio"},
]


@pytest.mark.parametrize(("body", "status", "code"), BAD_BODIES)
async def test_a_bad_body_is_refused(proxy: Scene, body: bytes, status: int, code: str) -> None:
    key = proxy.seeds.key()
    async with proxy.no_trace():
        answer = await proxy.ask(key, body)
        assert answer.refused == (status, code)
        assert answer.headers["x-request-id"].startswith("req_")
    assert not proxy.main.requests


async def test_a_field_of_the_wrong_type_is_named(proxy: Scene) -> None:
    key = proxy.seeds.key()
    async with proxy.no_trace():
        for fields in BAD_FIELDS:
            answer = await proxy.ask(
                key, chat(**fields) if "model" not in fields else fields | BARE
            )
            assert answer.status == 400, (fields, answer)
            assert answer.error["param"].split(".")[0] == next(iter(fields)), (fields, answer)
    assert not proxy.main.requests


BARE = {"messages": []}


async def test_a_cost_that_cannot_be_bounded_is_refused(proxy: Scene) -> None:
    key = proxy.seeds.key()
    async with proxy.no_trace():
        for fields in ({"web_search_options": {}}, {"service_tier": "priority"}):
            answer = await proxy.ask(key, chat(**fields))
            assert answer.refused == (400, "unbounded_cost")


async def test_an_empty_wallet_is_402_and_says_what_is_missing(proxy: Scene) -> None:
    key = proxy.seeds.key(balance_ucr=0)
    async with proxy.no_trace():
        answer = await proxy.ask(key, chat())
        assert answer.refused == (402, "INSUFFICIENT_CREDIT")
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        required = (len(BODY) + 32) * 15 + 100 * 60
        assert answer.error["metadata"] == {
            "limit_source": "balance",
            "balance_credits": "0",
            "held_credits": "0",
            "required_credits": f"{required / 1e6:.6f}".rstrip("0"),
            "affordable_credits": "0",
        }


async def test_a_wallet_held_by_others_is_402_that_passes_by_waiting(proxy: Scene) -> None:
    held = standin(fault="hang_before_head")
    cost = (len(json.dumps(chat(held))) + 32) * 15 + 6000
    key = proxy.seeds.key(balance_ucr=cost + 10)
    waiting = await proxy.client()
    waiting >> request(key.secret, chat(held))
    await proxy.main.wait_until(lambda: bool(proxy.main.requests))
    async with proxy.no_trace_while_busy():
        answer = await proxy.ask(key, chat())
        assert answer.refused == (402, "INSUFFICIENT_CREDIT")
        assert answer.headers["retry-after"] == "1"
        assert "x-should-retry" not in answer.headers
        said = answer.error["metadata"]
        assert said["limit_source"] == "in_flight_holds"
        assert said["affordable_credits"] == "0.00001"
        assert said["held_credits"] == f"{cost / 1e6:.6f}".rstrip("0")
    waiting.leave()
