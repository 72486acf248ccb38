"""The broad lane: every path the fast lane does not serve, through aiohttp's own server.

Serves the model list, and passes `/v1/account/*` and `/v1/usage*` on to the admin API with
the client's own credential. Every answer closes its connection, so that the next request
starts at the front door again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from accounting.contract.catalogue import Model
from accounting.contract.errors import (
    BodyTooLarge,
    Failure,
    InvalidKey,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RequestTimeout,
    Unavailable,
)
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import KeyRecord
from accounting.contract.settings import Settings
from proxy.keys import Keys
from proxy.routing import Routing

_PASSED_ON = ("/v1/account/", "/v1/usage")
_DOTS = frozenset({".", ".."})  # a path that climbs would reach more than is passed on
_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_FORWARDED = ("authorization", "content-type", "idempotency-key", "accept")
_RETURNED = frozenset(
    {"content-type", "idempotent-replayed", "retry-after", "x-should-retry", "x-request-id",
     "content-disposition", "allow", "location", "cache-control", "www-authenticate"}
)  # fmt: skip
_BODY_LIMIT = 1_048_576
_ANSWER_SECONDS = 30.0
_LINGER_SECONDS = 1.0  # for a client still sending what was refused to read the refusal
_encode = msgspec.json.Encoder().encode
Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class AiohttpLane:
    """Builds a protocol per handed-over connection; owns the client to the admin API."""

    def __init__(self, settings: Settings, keys: Keys, routing: Routing) -> None:
        self._keys = keys
        self._routing = routing
        self._admin = f"http://{settings.admin_listen}"
        self._body_seconds = settings.body_timeout_seconds
        self._server = web.Server(self._answer, access_log=None, lingering_time=_LINGER_SECONDS)
        self._client: aiohttp.ClientSession | None = None
        self._created = 0

    def protocol(self) -> asyncio.Protocol:
        return self._server()

    @property
    def busy(self) -> bool:
        """Whether a connection is still with it: each leaves with its one answer."""
        return bool(self._server.connections)

    async def stop(self) -> None:
        await self._server.shutdown(5.0)
        if self._client is not None:
            await self._client.close()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        request_id = new_id("req")
        try:
            response = await self._route(request)
        except Failure as failure:
            response = _failed(failure, request_id)
        response.headers.setdefault("x-request-id", request_id)  # the admin API gives its own
        response.headers["server"] = "tollgate"
        response.force_close()
        return response

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        target = _target(request)
        path = unquote(target.partition("?")[0])
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(request, path)
        if path.startswith(_PASSED_ON) and not _DOTS & set(path.split("/")):
            return await self._pass_on(request, target)
        raise NotFound(f"There is nothing at {request.method} {path[:200]}.")

    # The model list

    async def _models(self, request: web.BaseRequest, path: str) -> web.Response:
        if request.method != "GET":
            raise MethodNotAllowed("Use GET here.")
        record = await self._key(request)
        allowed = record.allowed_models
        models = self._routing.catalogue.models
        shown = {name: one for name, one in models.items() if not allowed or name in allowed}
        name = path.removeprefix("/v1/models").removeprefix("/")
        if not name:
            return _json({"object": "list", "data": [_described(one) for one in shown.values()]})
        if name not in shown:
            raise ModelNotFound(f"The model `{name[:100]}` does not exist here.", param="model")
        return _json(_described(shown[name]))

    async def _key(self, request: web.BaseRequest) -> KeyRecord:
        """The caller's key record. Raises InvalidKey or Unavailable."""
        found: asyncio.Future[KeyRecord | Failure] = asyncio.get_running_loop().create_future()
        header = request.headers.get("authorization")
        self._keys.find(
            header.encode("latin-1", "replace") if header else None,
            lambda outcome: None if found.done() else found.set_result(outcome),
            fresh=True,
        )
        outcome = await found
        if isinstance(outcome, Failure):
            raise outcome
        return outcome

    # The admin API behind

    async def _pass_on(self, request: web.BaseRequest, target: str) -> web.Response:
        if request.method not in _METHODS:
            raise MethodNotAllowed()
        if "authorization" not in request.headers:
            raise InvalidKey()
        body = await self._body(request)
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        try:
            async with self._session().request(
                request.method,
                URL(self._admin + target, encoded=True),
                data=body,
                headers=headers,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
                kept = {k: v for k, v in answer.headers.items() if k.lower() in _RETURNED}
                return web.Response(status=answer.status, body=content, headers=kept)
        except (aiohttp.ClientError, TimeoutError):
            raise Unavailable("The account API is briefly unavailable.") from None

    async def _body(self, request: web.BaseRequest) -> bytes:
        length = request.content_length
        if length is not None and length > _BODY_LIMIT:
            raise BodyTooLarge
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_seconds):
                async for piece in request.content.iter_any():
                    body += piece
                    if len(body) > _BODY_LIMIT:
                        raise BodyTooLarge
        except (TimeoutError, ConnectionError):  # late, or its sender has left
            raise RequestTimeout("The request body did not arrive in time.") from None
        return bytes(body)

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            self._client = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS, connect=2.0),
                auto_decompress=False,
                trust_env=False,
            )
        return self._client


def _target(request: web.BaseRequest) -> str:
    """Path and query as the client wrote them, also out of the absolute form."""
    target = request.raw_path
    if not target.startswith("/") and "://" in target:
        _, slash, rest = target.partition("://")[2].partition("/")
        target = slash + rest
    return target


def _described(model: Model) -> dict[str, Any]:
    """A model as `GET /v1/models` shows it; prices in credits per million tokens."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": model.targets[0].provider.name,
        "context_tokens": model.context_tokens,
        "max_output_tokens": model.max_output_tokens,
        "pricing": {"unit": "credits per million tokens", **model.quoted},
        "price_version": model.price.version,
    }


def _json(body: object) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")


def _failed(failure: Failure, request_id: str) -> web.Response:
    return web.Response(
        status=failure.status,
        body=failure.body(request_id),
        content_type="application/json",
        headers=dict(failure.headers()),
    )
