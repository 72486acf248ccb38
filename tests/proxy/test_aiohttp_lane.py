"""The broad lane: the model list, the account API behind, and the hand-over of a connection."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from accounting.contract import keyspace
from accounting.contract.settings import Address
from tests.proxy.ends import chat, request, standin
from tests.proxy.harness import Key, Scene, Start


@dataclass
class Seen:
    """A request as the admin API got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Admin:
    """An admin API that notes what it gets, and says what it is told to say."""

    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"balance_usd":20}'

    async def answer(self, asked: web.BaseRequest) -> web.Response:
        headers = {name.lower(): value for name, value in asked.headers.items()}
        self.seen.append(Seen(asked.method, asked.raw_path, headers, await asked.read()))
        said = {"content-type": "application/json"} | self.headers
        return web.Response(status=self.status, body=self.body, headers=said)


@pytest.fixture
async def admin() -> AsyncIterator[Admin]:
    found = Admin()
    server = web.Server(found.answer)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    found.port = listening.sockets[0].getsockname()[1]
    yield found
    listening.close()
    await server.shutdown(1.0)


@pytest.fixture
async def scene(admin: Admin, start: Start) -> Scene:
    return await start(
        admin_listen=Address("127.0.0.1", admin.port),
        body_timeout_seconds=0.3,
        head_timeout_seconds=0.3,
    )


@pytest.fixture
def key(scene: Scene) -> Key:
    return scene.seeds.key()


# Models


async def test_models_are_listed_with_prices_and_limits(scene: Scene, key: Key) -> None:
    answer = await scene.ask(key, method="GET", path="/v1/models")
    assert answer.status == 200 and answer.headers["connection"] == "close"
    listed = answer.json
    assert listed["object"] == "list"
    found = {model["id"]: model for model in listed["data"]}
    assert {"small", "other", "pair"} <= set(found)
    small = found["small"]
    assert (small["object"], small["owned_by"], small["created"]) == ("model", "main", 0)
    assert (small["context_tokens"], small["max_output_tokens"]) == (8000, 1000)
    assert small["pricing"]["input"] == "15" and small["pricing"]["output"] == "60"


async def test_one_model_is_shown(scene: Scene, key: Key) -> None:
    answer = await scene.ask(key, method="GET", path="/v1/models/small")
    assert answer.json["id"] == "small"
    answer = await scene.ask(key, method="GET", path="/v1/models/nowhere")
    assert answer.refused == (404, "model_not_found")


async def test_answers_carry_a_request_id_and_no_name_of_the_software(
    scene: Scene, key: Key
) -> None:
    found = set()
    for path in ("/v1/models", "/v1/models/nowhere", "/v1/nothing"):
        answer = await scene.ask(key, method="GET", path=path)
        found.add(answer.headers["x-request-id"])
        assert answer.headers["server"] == "tollgate"
        if answer.status == 404:
            assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
    assert len(found) == 3
    assert all(re.fullmatch(r"req_[0-9A-Z]{26}", one) for one in found)


async def test_a_key_sees_the_models_it_may_use(scene: Scene) -> None:
    key = scene.seeds.key(allowed_models=("other",))
    answer = await scene.ask(key, method="GET", path="/v1/models")
    assert [model["id"] for model in answer.json["data"]] == ["other"]
    answer = await scene.ask(key, method="GET", path="/v1/models/other")
    assert answer.status == 200
    answer = await scene.ask(key, method="GET", path="/v1/models/small")
    assert answer.refused == (404, "model_not_found")


async def test_a_revoked_key_sees_no_models_though_it_was_seen_before(
    scene: Scene, key: Key
) -> None:
    assert (await scene.ask(key, method="GET", path="/v1/models")).status == 200
    scene.seeds.store.client.delete(keyspace.digest_key(key.digest))
    answer = await scene.ask(key, method="GET", path="/v1/models")
    assert answer.refused == (401, "invalid_api_key")


async def test_models_need_a_key_and_a_get(scene: Scene, key: Key) -> None:
    for secret in ("", "inf_" + "x" * 43):
        answer = await scene.ask(secret, method="GET", path="/v1/models")
        assert answer.refused == (401, "invalid_api_key")
    answer = await scene.ask(key, {}, path="/v1/models")
    assert answer.refused == (405, "method_not_allowed")


# The account API behind


async def test_the_account_api_gets_the_clients_request(
    scene: Scene, key: Key, admin: Admin
) -> None:
    admin.headers = {"x-request-id": "req_1", "x-internal": "no", "retry-after": "3"}
    answer = await scene.ask(
        key,
        b'{"a": 1}',
        path="/v1/account/thing?cursor=a%2Fb&limit=5",
        Idempotency_Key="idem-1",
        Cookie="no",
        X_Forwarded_For="1.2.3.4",
    )
    assert (answer.status, answer.body) == (200, admin.body)
    assert answer.headers["x-request-id"] == "req_1" and answer.headers["retry-after"] == "3"
    assert "x-internal" not in answer.headers
    (seen,) = admin.seen
    assert (seen.method, seen.path) == ("POST", "/v1/account/thing?cursor=a%2Fb&limit=5")
    assert seen.body == b'{"a": 1}'
    assert seen.headers["authorization"] == f"Bearer {key.secret}"
    assert seen.headers["idempotency-key"] == "idem-1"
    assert not {"cookie", "x-forwarded-for"} & set(seen.headers)


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "PATCH"])
async def test_methods_and_statuses_pass(scene: Scene, key: Key, admin: Admin, method: str) -> None:
    admin.status, admin.body = 409, b'{"error":{}}'
    answer = await scene.ask(key, method=method, path="/v1/account/keys/revoke/key_1")
    assert (answer.status, answer.body) == (409, admin.body)
    assert admin.seen[0].method == method


async def test_without_a_credential_nothing_is_passed_on(scene: Scene, admin: Admin) -> None:
    answer = await scene.ask("", method="GET", path="/v1/account/balance")
    assert answer.refused == (401, "invalid_api_key")
    assert not admin.seen


ELSEWHERE = [
    "/v1/admin/workspaces",
    "/v1/account",
    "/v1/accounts/balance",
    "/healthz",
    "/metrics",
    "//v1/account/balance",
    "/v1//account/balance",
]
CLIMBING = [
    "/v1/account/../admin/workspaces",
    "/v1/account/%2e%2e/admin/workspaces",
    "/v1/account/..%2fadmin/workspaces",
    "/v1/account/.%2e/admin/workspaces",
    "/v1/usage/../admin/workspaces",
    "/v1/usage/../../v1/admin/workspaces",
    "/v1/account/x/../../admin/workspaces",
    "http://tollgate.test/v1/account/../admin/workspaces",
]


@pytest.mark.parametrize("path", ELSEWHERE)
async def test_nothing_else_is_passed_on(scene: Scene, key: Key, admin: Admin, path: str) -> None:
    answer = await scene.ask(key, method="GET", path=path)
    assert answer.refused == (404, "not_found")
    assert not admin.seen


@pytest.mark.parametrize("path", CLIMBING)
async def test_no_path_climbs_out_of_the_account_api(
    scene: Scene, key: Key, admin: Admin, path: str
) -> None:
    answer = await scene.ask(key, method="GET", path=path)
    assert answer.refused == (404, "not_found")
    assert not admin.seen


async def test_the_absolute_form_reaches_the_account_api(
    scene: Scene, key: Key, admin: Admin
) -> None:
    path = "http://tollgate.test/v1/account/balance?a=b"
    assert (await scene.ask(key, method="GET", path=path)).status == 200
    assert admin.seen[0].path == "/v1/account/balance?a=b"


async def test_without_an_admin_api_it_is_503(start: Start) -> None:
    scene = await start(admin_listen=Address("127.0.0.1", 1))
    answer = await scene.ask(scene.seeds.key(), method="GET", path="/v1/account/balance")
    assert answer.refused == (503, "service_unavailable")
    assert answer.headers["retry-after"] == "1"


async def test_bodies_beyond_the_limit_are_413(scene: Scene, key: Key, admin: Admin) -> None:
    answer = await scene.ask(key, b"x" * 1_048_577, path="/v1/account/thing")
    assert answer.refused == (413, "request_too_large")
    client = await scene.client()
    head = request(key.secret, path="/v1/account/thing", Transfer_Encoding="chunked")
    client >> head + b"100001\r\n" + b"x" * 0x100001 + b"\r\n0\r\n\r\n"
    assert (await client.answer()).refused == (413, "request_too_large")
    assert not admin.seen


async def test_a_body_that_never_ends_is_408(scene: Scene, key: Key, admin: Admin) -> None:
    client = await scene.client()
    client >> request(key.secret, b"{}" * 10, path="/v1/account/thing")[:-1]
    assert (await client.answer()).refused == (408, "request_timeout")
    assert not admin.seen


# The hand-over


@pytest.mark.parametrize("cut", [0, 1, 5, 10])
async def test_a_body_begun_at_the_door_arrives_whole(
    scene: Scene, key: Key, admin: Admin, cut: int
) -> None:
    """`cut` bytes of the body come with the head, the rest later."""
    whole = request(key.secret, b"0123456789", path="/v1/account/thing")
    end = len(whole) - 10 + cut
    client = await scene.client()
    client >> whole[:end]
    await client.flushed()
    client >> whole[end:]
    assert (await client.answer()).status == 200
    assert admin.seen[0].body == b"0123456789"


async def test_a_chunked_body_arrives_byte_by_byte(scene: Scene, key: Key, admin: Admin) -> None:
    head = request(key.secret, path="/v1/account/thing", Transfer_Encoding="chunked")
    client = await scene.client()
    for byte in head + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n":
        client >> bytes([byte])
        await client.flushed()
    assert (await client.answer()).status == 200
    assert admin.seen[0].body == b"hello world"


@pytest.mark.parametrize("stream", [False, True])
async def test_after_pipelined_fast_requests(
    scene: Scene, key: Key, admin: Admin, stream: bool
) -> None:
    client = await scene.client()
    slow = request(key.secret, chat(standin(delay_ms=30), stream=stream))
    client >> slow + slow + request(key.secret, b"body", path="/v1/account/thing")
    for _ in range(2):
        answer = await client.answer()
        assert answer.status == 200 and "x-model-used" in answer.headers
        assert not admin.seen
    answer = await client.answer()
    assert (answer.body, answer.headers["connection"]) == (admin.body, "close")
    assert admin.seen[0].body == b"body"
    assert len(await scene.events(key)) == 2


async def test_what_is_pipelined_after_this_lane_is_not_served(scene: Scene, key: Key) -> None:
    """The answer says so by closing; the client sends it again, and pays once."""
    client = await scene.client()
    models = request(key.secret, method="GET", path="/v1/models")
    client >> models + request(key.secret, chat())
    assert (await client.answer()).headers["connection"] == "close"
    assert await client.left()
    assert await scene.events(key) == []


async def test_one_who_leaves_while_waiting_for_this_lane(scene: Scene, key: Key) -> None:
    client = await scene.client()
    hang = request(key.secret, chat(standin(fault="hang_before_head")))
    client >> hang + request(key.secret, method="GET", path="/v1/models")
    await scene.main.wait_until(lambda: len(scene.main.requests) == 1)
    client.leave()
    await scene.main.wait_until(lambda: scene.main.aborted == 1, timeout_seconds=2.0)
    assert len(await scene.events(key)) == 1


async def test_malformed_requests_never_reach_this_lane(scene: Scene, key: Key) -> None:
    client = await scene.client()
    both = request(key.secret, b"{}", path="/v1/account/x", Transfer_Encoding="chunked")
    client >> both
    assert (await client.answer()).refused == (400, "malformed_http")
