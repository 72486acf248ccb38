"""What went wrong, in the one envelope, whoever raised it.

Owns the outermost middleware: every answer leaves here with a request id and is never cached;
every failure is worded by its class in `accounting.contract.errors`. What nobody foresaw is
logged with its traceback, once, and answered with a bare 500.
"""

import logging
from collections.abc import Awaitable, Callable

from aiohttp import web

from accounting.contract.errors import (
    BodyTooLarge,
    ExpectationFailed,
    Failure,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
)
from accounting.contract.identifiers import new_id

_log = logging.getLogger("tollgate.admin_api")
_OF_AIOHTTP: dict[int, type[Failure]] = {
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
    417: ExpectationFailed,
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = new_id("req")
    try:
        response = await handler(request)
    except Failure as failure:
        response = _answer(failure, request_id)
    except web.HTTPException as error:
        response = _answer(_OF_AIOHTTP.get(error.status, InvalidRequest)(), request_id)
        if "Allow" in error.headers:
            response.headers["allow"] = error.headers["Allow"]
    except ConnectionError:
        raise  # the client has gone: nobody is there to be answered
    except Exception:
        _log.exception("%s %s failed (%s)", request.method, request.path, request_id)
        response = _answer(Failure(), request_id)
    response.headers["x-request-id"] = request_id
    response.headers["cache-control"] = "no-store"
    response.headers["server"] = "tollgate"
    return response


def _answer(failure: Failure, request_id: str) -> web.Response:
    response = web.Response(
        status=failure.status, body=failure.body(request_id), content_type="application/json"
    )
    response.headers.extend(failure.headers())
    if failure.status == 401:
        response.headers["www-authenticate"] = "Bearer"  # RFC 9110, 15.5.2
    return response
