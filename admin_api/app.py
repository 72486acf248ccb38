"""Composition root of the admin API: opens the stores, serves the routes, stops in order.

Owns the path of every request through authentication, body, idempotency and handler; each of
these steps is a file of its own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from aiohttp import web

from accounting import idempotency as claims
from accounting.contract.errors import Failure, RequestTimeout
from accounting.contract.settings import Settings
from accounting.operator_token import operator_token
from accounting.stores import open_postgres, open_redis
from admin_api import idempotency, openapi, payloads
from admin_api.authentication import bearer_of, require_key, require_operator
from admin_api.call import Call, Services
from admin_api.problems import Handler, answer_problems
from admin_api.routes import HEALTHZ, OPENAPI, ROUTES, Caller, Route

_BODY_LIMIT_BYTES = 1_048_576  # no body here is large
_CLEAR_SECONDS = 3600.0
_OPERATOR = "operator"  # whose idempotency keys: no workspace is called that
_log = logging.getLogger("tollgate.admin_api")


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[int]:
    """Serve until the block ends; yields the port. Answers under way are finished first.

    Raises StoreError, SettingsError, and OSError when the address cannot be had.
    """
    token = operator_token(settings)
    pool = await open_postgres(settings)
    try:
        redis = await open_redis(settings)
        try:
            services = Services(settings, token, pool, redis)
            async with _listening(services) as port, _clearing(pool):
                yield port
        finally:
            await redis.aclose()
    finally:
        await pool.close()


@asynccontextmanager
async def _listening(services: Services) -> AsyncIterator[int]:
    settings = services.settings
    runner = web.AppRunner(
        application(services),
        access_log=None,
        keepalive_timeout=settings.idle_timeout_seconds,
        shutdown_timeout=settings.drain_timeout_seconds,
    )
    await runner.setup()
    try:
        address = settings.admin_listen
        await web.TCPSite(runner, address.host, address.port).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _clearing(pool: asyncpg.Pool) -> AsyncIterator[None]:
    """Forget idempotency keys of more than a day ago, now and every hour."""
    task = asyncio.create_task(_clear_for_ever(pool))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _clear_for_ever(pool: asyncpg.Pool) -> None:
    while True:
        try:
            await claims.clear(pool)
        except Failure:
            _log.warning("idempotency keys could not be cleared: Postgres is away")
        await asyncio.sleep(_CLEAR_SECONDS)


def application(services: Services) -> web.Application:
    """All routes, and nothing else, on these services."""
    limit = min(_BODY_LIMIT_BYTES, services.settings.body_limit_bytes)
    app = web.Application(middlewares=[answer_problems], client_max_size=limit)
    description = openapi.document()

    async def healthz(_request: web.Request) -> web.Response:
        return _json(b'{"status":"ok"}')

    async def describe(_request: web.Request) -> web.Response:
        return _json(description)

    app.router.add_route("GET", HEALTHZ, healthz)
    app.router.add_route("GET", OPENAPI, describe)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _endpoint(route, services))
    return app


def _endpoint(route: Route, services: Services) -> Handler:
    async def endpoint(request: web.Request) -> web.Response:
        bearer = bearer_of(request)
        holder = None
        if route.caller is Caller.OPERATOR:
            require_operator(bearer, services.operator_token)
        else:
            holder = await require_key(services.pool, bearer, route.scope)
        body = payloads.decode(await _read(request, services) if route.mutates else b"", route.body)
        async with idempotency.attempt(
            services.pool,
            scope=holder.workspace.id if holder else _OPERATOR,
            route=route.template,
            key=idempotency.key_of(request, body) if route.mutates else None,
            request_hash=idempotency.hash_of(request.path, body),
            prefix=route.makes,
            kept=route.kept,
            bearer=bearer,
        ) as attempt:
            call = Call(services, holder, request.match_info, body, attempt)
            answer = await route.handle(call)
        response = _json(payloads.encode(answer), route.status)
        if attempt.done:
            response.headers[idempotency.REPLAYED] = "true"
        return response

    return endpoint


async def _read(request: web.Request, services: Services) -> bytes:
    try:
        async with asyncio.timeout(services.settings.body_timeout_seconds):
            return await request.read()
    except TimeoutError:
        raise RequestTimeout from None


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
