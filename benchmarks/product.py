"""Tollgate itself, all of it, as a subject: `accounting.up` with stores of its own.

Owns its settings for a benchmark, the rich workspace whose key the load uses, and what is
asked of it afterwards: has accounting posted everything, does the audit find drift. Leaves
how it is built up to `accounting.up`.

Every limit of the key is on, far above what the load needs: each is really evaluated, none
refuses. One worker unless more are asked for, pinned to the subject's core; everything else is
on the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from redis import RedisError
from redis.asyncio import Redis

from accounting.contract.keyspace import stream_key
from accounting.contract.settings import SHARDS
from accounting.embedded_files import noted_url
from benchmarks.kernel import named_in_tree, pin_tree
from benchmarks.processes import Cores, ProcessFailure, Running, is_answering, running

MODEL = "sandbox"
GRANTS, GRANT_USD = 10, "1000000"
LIMITS = {
    "rpm": 60_000_000,
    "tpm": 1_000_000_000_000,
    "daily_tokens": 1_000_000_000_000,
    "concurrency": 1_000_000,
    "cost_cap_usd": "90000000",
}
READY_LINE = "Ctrl-C stops everything"
READY_SECONDS, STOP_SECONDS, POSTED_SECONDS = 120.0, 90.0, 120.0
RELEASED_SECONDS = 5.0
POLL_SECONDS = 0.05

CATALOGUE = """\
[providers.standin]
base_url = "{provider_url}"

[models.{model}]
targets = ["standin/{model}"]
context_tokens = 100000000
max_output_tokens = 50000000
price = {{ input = "15", cached_input = "7.5", output = "60" }}
"""

SETTINGS = {
    "TOLLGATE_LISTEN": "127.0.0.1:0",
    "TOLLGATE_ADMIN_LISTEN": "127.0.0.1:0",
    "TOLLGATE_PRIVATE_LISTEN": "127.0.0.1:0",
    "TOLLGATE_ACCOUNTING_LISTEN": "127.0.0.1:0",
    "TOLLGATE_CONNECTIONS": "50000",
    "TOLLGATE_UPSTREAM_CONNECTIONS": "50000",
    "TOLLGATE_UPSTREAM_WAITING": "50000",
    # Redis shares its core with the load: a refusal for its being slow would measure that.
    "TOLLGATE_REDIS_TIMEOUT_SECONDS": "10",
    "TOLLGATE_DRAIN_TIMEOUT_SECONDS": "2",
}


class Product:
    """A running Tollgate: where it is, its processes, the key, its books."""

    def __init__(self, started: Running, data_dir: Path, operator_token: str) -> None:
        self._started, self._data_dir, self._token = started, data_dir, operator_token
        output = started.output.read_text()
        self.base_url = found(r"base URL +(\S+)", output)
        self.admin_url = found(r"Operator API +(\S+)", output)
        self.metrics_url = found(r"Metrics +(\S+)", output)
        self.redis_url = noted_url(data_dir, "redis")
        self.database_url = noted_url(data_dir, "postgres")
        self.key = ""
        self.workspace_id = ""
        root = [started.pid]
        self.proxy = named_in_tree(root, "-m proxy")
        self.worker = named_in_tree(root, "-m proxy.worker")
        self.accounting = named_in_tree(root, "-m accounting run")
        self.crowd: list[str] = []
        self.groups = {
            "tollgate": self.proxy,
            "redis": named_in_tree(root, "redis-server"),
            "postgres": named_in_tree(root, "bin/postgres"),
            "accounting": root,
        }
        if not all((self.worker, self.accounting, *self.groups.values())):
            raise ProcessFailure(f"not all parts of Tollgate run: {self.groups}")

    async def call(self, path: str, body: object = None) -> Any:
        """The decoded answer of the operator API; raises ProcessFailure."""
        return await self._asked(lambda: self._call(path, body))

    async def _asked(self, ask: Callable[[], Any]) -> Any:
        """Ask in a thread; when it has ended meanwhile, say with which words."""
        try:
            return await asyncio.to_thread(ask)
        except OSError as error:
            raise ProcessFailure(f"{error}; Tollgate: {self._last_words()}") from error

    def _last_words(self) -> str:
        """The ends of what its parts said."""
        logs = sorted((self._data_dir / "logs").glob("*.log"))
        ends = [f"{log.name}: {log.read_text(errors='replace')[-300:]}" for log in logs]
        return "\n".join([self._started.last_output()[-500:], *ends])

    def _call(self, path: str, body: object) -> Any:
        request = urllib.request.Request(self.admin_url + path)
        request.add_header("Authorization", f"Bearer {self._token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    async def make_key(self) -> None:
        """A workspace that the load cannot empty, and its key with every limit on."""
        self.workspace_id = (await self.call("/workspaces", {"name": "load"}))["workspace_id"]
        here = f"/workspaces/{self.workspace_id}"
        for _ in range(GRANTS):
            grant = await self.call(f"{here}/grants", {"kind": "topup", "amount_usd": GRANT_USD})
            if not grant["spendable"]:
                raise ProcessFailure(f"a grant did not reach the wallet: {grant}")
        key = await self.call(f"{here}/keys", {"name": "load", "limits": LIMITS})
        self.key = key["key_secret"]

    async def until_posted(self) -> float:
        """Seconds until accounting has posted all that is in the streams."""
        began = time.monotonic()
        try:
            async with Redis.from_url(self.redis_url) as redis:
                while not await is_posted(redis):
                    if time.monotonic() - began > POSTED_SECONDS:
                        raise TimeoutError(f"accounting is {POSTED_SECONDS:.0f} s behind")
                    await asyncio.sleep(POLL_SECONDS)
        except RedisError as error:
            raise ProcessFailure(f"{error}; Tollgate: {self._last_words()}") from error
        return round(time.monotonic() - began, 2)

    async def until_ready(self) -> None:
        """Wait until every worker serves and may admit; raises TimeoutError."""
        url = self.metrics_url.removesuffix("/metrics") + "/readyz"
        deadline = time.monotonic() + READY_SECONDS
        while not await asyncio.to_thread(is_answering, url):
            if time.monotonic() > deadline:
                raise TimeoutError("the new worker is not ready")
            await asyncio.sleep(POLL_SECONDS)

    async def settled(self) -> int:
        """The same, when Redis has confirmed every settle."""
        deadline = time.monotonic() + POSTED_SECONDS
        while self._sum(rb"tollgate_settles_unacknowledged", await self._metrics()):
            if time.monotonic() > deadline:
                raise TimeoutError("Redis does not take what the proxy has settled")
            await asyncio.sleep(POLL_SECONDS)
        return await self.served()

    async def served(self) -> int:
        """Requests whose charge the proxy has fixed so far."""
        return self._sum(rb"tollgate_requests_total", await self._metrics())

    async def _metrics(self) -> bytes:
        found = await self._asked(lambda: urllib.request.urlopen(self.metrics_url).read())
        return bytes(found)

    def _sum(self, name: bytes, text: bytes) -> int:
        return sum(int(float(n)) for n in re.findall(rb"^%b[ {].*?([^ ]+)$" % name, text, re.M))

    async def held_usd(self) -> float:
        """Dollars still held with nothing under way; what is leased ahead is given back soon."""
        deadline = time.monotonic() + RELEASED_SECONDS
        while held := await self._held():
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_SECONDS)
        return held

    async def _held(self) -> float:
        return float((await self.call(f"/workspaces/{self.workspace_id}"))["held_usd"])

    async def audit(self) -> str:
        """What `accounting audit` finds: `clean`, or the findings that drifted."""
        environment = {
            "TOLLGATE_REDIS_URL": self.redis_url,
            "TOLLGATE_DATABASE_URL": self.database_url,
        }
        async with running(
            [sys.executable, "-m", "accounting", "audit"], None, environment
        ) as audit:
            code = await asyncio.wait_for(audit.process.wait(), POSTED_SECONDS)
            output = audit.output.read_text()
        return "clean" if code == 0 else output.strip() or f"exit status {code}"


async def is_posted(redis: Redis) -> bool:
    """Whether every stream has been read to its end and nothing of it is unacknowledged."""
    pipeline = redis.pipeline(transaction=False)
    for shard in range(SHARDS):
        pipeline.xinfo_groups(stream_key(shard))
        pipeline.xinfo_stream(stream_key(shard))
    answers = await pipeline.execute(raise_on_error=False)
    for groups, stream in zip(answers[::2], answers[1::2], strict=True):
        if isinstance(stream, Exception):
            continue  # nothing was ever written to this shard
        for group in groups:
            if group["pending"] or group["last-delivered-id"] != stream["last-generated-id"]:
                return False
    return True


def found(pattern: str, text: str) -> str:
    """The first group of `pattern` in `text`; raises `ProcessFailure`."""
    match = re.search(pattern, text)
    if match is None:
        raise ProcessFailure(f"Tollgate did not say {pattern!r}: {text}")
    return match[1]


@contextlib.asynccontextmanager
async def start_tollgate(
    provider_url: str, cores: Cores, workers: int = 1
) -> AsyncIterator[Product]:
    """Everything `tollgate up` starts, before the stand-in, with a rich key."""
    token = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="benchmark-tollgate-") as folder:
        catalogue = Path(folder) / "catalogue.toml"
        catalogue.write_text(CATALOGUE.format(provider_url=provider_url, model=MODEL))
        data_dir = Path(folder) / "data"
        environment = SETTINGS | {
            "TOLLGATE_WORKERS": str(workers),
            "TOLLGATE_OPERATOR_TOKEN": token,
            "TOLLGATE_DATA_DIR": str(data_dir),
            "TOLLGATE_CATALOGUE": str(catalogue),
        }
        command = [sys.executable, "-m", "accounting.up"]
        async with running(command, cores.load, environment, STOP_SECONDS) as started:
            await until_ready(started)
            product = Product(started, data_dir, token)
            pin_tree(product.proxy, cores.subject)
            await product.make_key()
            yield product


async def until_ready(started: Running) -> None:
    """Wait for the line that says everything runs; raises `ProcessFailure`."""
    deadline = time.monotonic() + READY_SECONDS
    while READY_LINE not in started.output.read_text(errors="replace"):
        if started.process.returncode is not None or time.monotonic() > deadline:
            raise ProcessFailure(f"Tollgate does not start: {started.last_output()}")
        await asyncio.sleep(POLL_SECONDS)
