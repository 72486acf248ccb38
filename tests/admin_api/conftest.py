"""A running admin API on real stores, and a caller who speaks HTTP to it."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec import structs
from redis.asyncio import Redis

from accounting.contract import keyspace
from accounting.contract.settings import Address, Secret, Settings
from admin_api.app import serving
from tests.admin_api.cuttable import Cuttable

OPERATOR = "operator-token-of-the-tests"


class Answer:
    """A response, read to its end; amounts in `json` are exact."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = body.decode()

    def __repr__(self) -> str:
        return f"{self.status} {self.text}"

    @property
    def json(self) -> Any:
        return json.loads(self.text, parse_float=Decimal)

    @property
    def error(self) -> tuple[int, str, str | None]:
        """(status, code, param) of an answer in the error envelope."""
        error = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code", "request_id"}
        assert error["request_id"] == self.headers["x-request-id"]
        return self.status, error["code"], error["param"]


class Api:
    """Calls with whatever token; `body` is sent as JSON, or as it is when it is bytes."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self._session = session
        self.port = port

    async def call(
        self,
        method: str,
        path: str,
        token: str | None,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self._session.request(method, url, data=data, headers=sent) as response:
            return Answer(response, await response.read())

    async def operator(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        return await self.call(method, f"/v1/admin{path}", OPERATOR, body, headers)

    async def new_workspace(self) -> str:
        answer = await self.operator("POST", "/workspaces", {"name": "Acme"})
        assert answer.status == 201, answer
        return str(answer.json["workspace_id"])

    async def new_key(self, workspace_id: str, **fields: Any) -> tuple[str, str]:
        """(key id, secret)."""
        body = {"name": "a key", **fields}
        answer = await self.operator("POST", f"/workspaces/{workspace_id}/keys", body)
        assert answer.status == 201, answer
        return answer.json["key_id"], answer.json["key_secret"]


@pytest.fixture
def settings(redis_url: str, database_url: str, tmp_path: Path) -> Settings:
    return Settings(
        admin_listen=Address("127.0.0.1", 0),
        redis_url=Secret(redis_url),
        database_url=Secret(database_url),
        operator_token=Secret(OPERATOR),
        data_dir=str(tmp_path),
        redis_timeout_seconds=5.0,
    )


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Api]:
    async with serving(settings) as port, aiohttp.ClientSession() as session:
        yield Api(session, port)


@pytest.fixture
async def api(settings: Settings, redis_client: Redis) -> AsyncIterator[Api]:
    """On an empty database and a Redis that counts as filled."""
    await redis_client.set(keyspace.EPOCH, "1")
    async with running(settings) as api:
        yield api


@pytest.fixture
async def redis_line(redis_url: str) -> AsyncIterator[Cuttable]:
    async with Cuttable.to(redis_url) as line:
        yield line


@pytest.fixture
async def postgres_line(database_url: str) -> AsyncIterator[Cuttable]:
    async with Cuttable.to(database_url) as line:
        yield line


@pytest.fixture
async def api_on_lines(
    settings: Settings, redis_client: Redis, redis_line: Cuttable, postgres_line: Cuttable
) -> AsyncIterator[Api]:
    """Like `api`, on connections that a test can cut and mend."""
    await redis_client.set(keyspace.EPOCH, "1")
    on_lines = structs.replace(
        settings, redis_url=Secret(redis_line.url), database_url=Secret(postgres_line.url)
    )
    async with running(on_lines) as api:
        yield api
