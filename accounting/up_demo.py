"""What makes a first request possible: a workspace with trial credits, a key, and a `curl`.

Owns `<data_dir>/demo.json` (mode 0600), which remembers the workspace and the key between
starts, and the text printed when everything runs. Talks to the operator API like anyone else.
"""

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from accounting.contract.catalogue import Catalogue
from accounting.contract.settings import Address
from accounting.embedded_files import write_private
from accounting.up_parts import StartError

_TIMEOUT_SECONDS = 15.0
_READY_TIMEOUT_SECONDS = 30.0
_POLL_SECONDS = 0.1


class Demo(msgspec.Struct):
    """What is remembered; empty until it exists."""

    workspace_id: str = ""
    granted: bool = False
    key_id: str = ""
    key_secret: str = ""


class _Door:
    """The admin port, as the operator or as a client."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def call(
        self, method: str, path: str, token: str, body: Any = None, idempotency_key: str = ""
    ) -> tuple[int, Any]:
        """(status, decoded answer). Raises StartError when there is no such answer."""
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        connection = http.client.HTTPConnection(
            self._address.host, self._address.port, timeout=_TIMEOUT_SECONDS
        )
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"null")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise StartError(f"the demo workspace: {method} {path}: {error}") from error
        finally:
            connection.close()

    def create(self, path: str, token: str, body: Any, idempotency_key: str = "") -> Any:
        """The answer to a POST that has to succeed."""
        status, answer = self.call("POST", path, token, body, idempotency_key)
        if status not in (200, 201):
            raise StartError(f"the demo workspace: POST {path}: {status} {json.dumps(answer)}")
        return answer


def prepare(
    admin: Address, operator_token: str, path: Path, trial_usd: str, watch: Callable[[], None]
) -> Demo:
    """The demo of the last start as far as it still exists, completed where it does not.

    Written down after every step, so that an interrupted start is continued by the next.
    Returns when its balance can be read, so when a request would be served; `watch` is called
    while waiting for that, and may raise. Raises StartError.
    """
    door = _Door(admin)
    demo = _remembered(path)
    here = f"/v1/admin/workspaces/{demo.workspace_id}"
    if not demo.workspace_id or door.call("GET", here, operator_token)[0] == 404:
        created = door.create("/v1/admin/workspaces", operator_token, {"name": "demo"})
        demo = Demo(workspace_id=created["workspace_id"])
        _remember(path, demo)
    here = f"/v1/admin/workspaces/{demo.workspace_id}"
    if not demo.granted:
        grant = {"kind": "trial", "amount_usd": trial_usd}
        door.create(f"{here}/grants", operator_token, grant, f"demo-trial-{demo.workspace_id}")
        demo.granted = True
        _remember(path, demo)
    if not demo.key_secret or door.call("GET", "/v1/account/whoami", demo.key_secret)[0] == 401:
        key = door.create(f"{here}/keys", operator_token, {"name": "demo"})
        demo.key_id, demo.key_secret = key["key_id"], key["key_secret"]
        _remember(path, demo)
    deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
    while (balance := door.call("GET", "/v1/account/balance", demo.key_secret))[0] != 200:
        watch()
        if time.monotonic() > deadline:
            raise StartError(f"the demo workspace: its balance: {balance[0]} {balance[1]}")
        time.sleep(_POLL_SECONDS)
    return demo


def _remembered(path: Path) -> Demo:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Demo)
    except FileNotFoundError:
        return Demo()
    except (OSError, msgspec.DecodeError) as error:
        raise StartError(f"{path}: {error}; remove it to get a new demo workspace") from error


def _remember(path: Path, demo: Demo) -> None:
    write_private(path, msgspec.json.encode(demo).decode())


def first_model(catalogue: Catalogue, provider: str | None) -> str:
    """The name of the first live model, of the given provider if there is one."""
    of_provider = (
        model.name
        for model in catalogue.models.values()
        if provider is not None and model.targets[0].provider.name == provider
    )
    return next(of_provider, next(iter(catalogue.models)))


def introduction(
    demo: Demo, *, model: str, public: Address, admin: Address, private: Address, data_dir: Path
) -> str:
    """What is printed when everything runs: commands to paste, and where to look."""
    authorization = f"-H 'Authorization: Bearer {demo.key_secret}'"
    return f"""
Tollgate is ready.

  base URL   http://{public}/v1
  API key    {demo.key_secret}

A streamed answer, whose last event says what it cost:

{_curl("-N", public, authorization, model, stream=True)}

The same in one piece, with the cost in the header x-credits-used:

{_curl("-i", public, authorization, model, stream=False)}

What is left:

  curl http://{public}/v1/account/balance {authorization}

Operator API  http://{admin}/v1/admin (token in {data_dir / "operator_token"})
Metrics       http://{private}/metrics
Logs          {data_dir / "logs"}

Ctrl-C stops everything."""


def _curl(flag: str, public: Address, authorization: str, model: str, *, stream: bool) -> str:
    body: dict[str, Any] = {"model": model}
    if stream:
        body["stream"] = True
    body["messages"] = [{"role": "user", "content": "Say hello."}]
    return (
        f"  curl {flag} http://{public}/v1/chat/completions {authorization} \\\n"
        f"    -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )
