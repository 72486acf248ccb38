"""The whole product as single processes, each of which a test can kill or stop, and what it says.

A Redis of its own, a Postgres by its URL, accounting, admin API, proxy; one workspace with
credits and two keys, one that the proxy knows already and one that it has never seen.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Self

import asyncpg
import msgspec
from redis.asyncio import Redis

from accounting import audit, funding, keys, workspaces
from accounting.contract import keyspace
from accounting.contract.keyspace import Wallet
from accounting.contract.settings import Secret
from accounting.embedded import Server, start_redis
from tests.proxy.ends import STREAM_END, Answer, Client, chat, sse, usage_chunk
from tests.proxy.harness import credits_of
from tests.proxy.host import Host, quiet_port, stream_begun
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
GIVEN_UCR = 1_000_000_000
SOON = 20.0  # seconds; four times what is promised, for the machine may be busy
OUTAGE = ("redis down", "gate closed", "redis up", "gate open")
REFUSED_IN_A_ROW = 20
BALANCE = "/v1/account/balance"


class Part:
    """One program and every line it has said."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name, self._command, self._env = name, command, env
        self.lines: list[dict[str, Any]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._command, cwd=ROOT, env=self._env, stderr=subprocess.PIPE
        )
        self._listening = asyncio.create_task(self._listen(self._process))
        await eventually(lambda: self.lines or self._process.returncode is not None, SOON)
        return self

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            text = line.decode()
            self.lines.append(json.loads(text) if text.startswith("{") else {"text": text})

    @property
    def said(self) -> list[str]:
        return [str(line["text"]).partition(":")[0] for line in self.lines]

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self._ended()

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            await self._ended()

    async def _ended(self) -> None:
        assert self._process is not None and self._listening is not None
        async with asyncio.timeout(SOON):
            await self._process.wait()
            await self._listening


class Town:
    """See the module."""

    def __init__(self, folder: Path, database_url: str, pool: asyncpg.Pool) -> None:
        self.folder = folder
        self.pool = pool
        self.server: Server = start_redis(folder)
        self.redis = Redis.from_url(self.server.url)
        self.admin_port = quiet_port()
        self.env = {
            **{name: text for name, text in os.environ.items() if not name.startswith("TOLLGATE_")},
            "TOLLGATE_REDIS_URL": self.server.url,
            "TOLLGATE_DATABASE_URL": database_url,
            "TOLLGATE_DATA_DIR": str(folder / "parts"),
            "TOLLGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TOLLGATE_ACCOUNTING_LISTEN": "127.0.0.1:0",
            "TOLLGATE_OPERATOR_TOKEN": "operator-token-of-the-tests",
            "TOLLGATE_REDIS_TIMEOUT_SECONDS": "2",
            "TOLLGATE_DATABASE_TIMEOUT_SECONDS": "2",
        }
        self.accounting = Part("accounting", ["-m", "accounting", "run"], self.env)
        self.admin = Part("admin", ["-m", "admin_api"], self.env)
        self.host = Host(folder, self.server.url)
        self.host.env |= {
            "TOLLGATE_WORKERS": "2",
            "TOLLGATE_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}",
            "TOLLGATE_REDIS_TIMEOUT_SECONDS": "2",
        }
        self.workspace_id = ""
        self.charged = 0

    async def open(self) -> Self:
        await self.host.open()
        await self.accounting.start()
        await eventually(lambda: self.redis.exists(keyspace.EPOCH), SOON)
        workspace = await workspaces.create(self.pool, self.redis, "Acme")
        self.workspace_id = workspace.id
        more = {"kind": "promo", "expires_at": None, "source_ref": "gift"}
        await funding.give(self.pool, self.redis, workspace.id, amount_ucr=GIVEN_UCR, **more)
        self.secret, self.cold = await self._new_key("known"), await self._new_key("cold")
        await self.admin.start()
        await (await self.host.start()).until_ready()
        return self

    async def _new_key(self, name: str) -> str:
        secret: Secret = keys.new_secret()
        await keys.create(self.pool, self.redis, self.workspace_id, name, secret)
        return secret.reveal()

    async def close(self) -> None:
        if self.server.alive():
            os.kill(self.server.pid, signal.SIGCONT)
        await self.host.close()
        await self.admin.stop()
        await self.accounting.stop()
        await self.redis.aclose()
        self.server.stop()

    # Redis

    async def kill_redis(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        await eventually(lambda: not self.server.alive())
        await self.redis.aclose()

    def start_redis(self) -> None:
        self.server = start_redis(self.folder)
        self.redis = Redis.from_url(self.server.url)

    # Requests

    async def serve(self, count: int = 1) -> None:
        """Requests one after the other, all of them served."""
        for _ in range(count):
            answer = await self.host.ask(self.secret, chat())
            assert answer.status == 200, answer
            self.charged += credits_of(answer)

    async def account(self) -> Answer:
        """The balance, asked for at the public door."""
        return await self.host.ask(self.secret, None, method="GET", path=BALANCE)

    async def refuses(self, times: int = 1) -> None:
        """Who has a valid key is told to come again soon, whether it is known here or not."""
        for secret in (self.secret, self.cold) * times:
            is_outage(await self.host.ask(secret, chat()))

    async def stops_serving(self) -> None:
        """What was leased ahead may still be used, for a second; then all are refused."""
        refused = 0

        async def ask() -> bool:
            nonlocal refused
            answer = await self.host.ask(self.secret, chat())
            if answer.status == 200:
                self.charged += credits_of(answer)
                refused = 0
            else:
                is_outage(answer)
                refused += 1
            return refused >= REFUSED_IN_A_ROW

        await eventually(ask, SOON)

    async def stream(self) -> tuple[Client, Any]:
        return await stream_begun(self.host, self.secret)

    async def finish(self, client: Client, upstream: Any) -> None:
        """An open stream comes to its end, with its price."""
        upstream >> sse(usage_chunk(10, 20)) + STREAM_END
        events = [await client.event() for _ in range(2)]
        assert events[-1] == "[DONE]"
        self.charged += round(events[-2]["credits_used"] * 1_000_000)

    async def serves_again(self) -> None:
        """All workers do; refused until then with 503, never 401."""

        async def served() -> bool:
            answer = await self.host.ask(self.secret, chat())
            if answer.status != 200:
                is_outage(answer)
                return False
            self.charged += credits_of(answer)
            return True

        await eventually(served, SOON)
        await self.host.until_ready()
        await self.serve(2)

    # What is left, and what was said

    async def books_balance(self) -> None:
        """All is posted once and nothing is held; the audit finds no drift."""
        await eventually(self._all_posted, SOON)
        findings = await audit.audit(self.pool, self.redis, 900)
        assert [finding for finding in findings if finding.drifted] == []

    async def _all_posted(self) -> bool:
        return await self.is_posted() and await self.is_settled()

    async def is_posted(self) -> bool:
        return await self.posted() == self.charged

    async def posted(self) -> int:
        """µcr of usage in the ledger."""
        sql = "select coalesce(sum(charge_ucr), 0) from usage_records"
        return int(await self.pool.fetchval(sql))

    async def is_settled(self) -> bool:
        """Redis has taken all that was charged, and holds nothing."""
        return await self.is_charged() and (await self._wallet()).held == 0

    async def is_charged(self) -> bool:
        """Redis has taken all that was charged."""
        return (await self._wallet()).balance == GIVEN_UCR - self.charged

    async def _wallet(self) -> Wallet:
        packed: Any = await self.redis.hget(keyspace.workspace_key(self.workspace_id), "w")
        return msgspec.msgpack.decode(packed, type=Wallet)

    async def told(self, *events: str, workers: int = 2) -> None:
        """The proxy said each of these once per worker since it was ready, and nothing else."""

        def found() -> bool:
            counts = Counter((line["pid"], line["event"]) for line in self.new_lines())
            assert all(count == 1 and event in events for (_, event), count in counts.items()), (
                counts
            )
            return len(counts) == workers * len(events)

        await eventually(found, SOON)

    def new_lines(self) -> list[dict[str, Any]]:
        """What the proxy has said since it began."""
        return [json.loads(line) for line in self.host.said.splitlines()[self._ready_lines :]]

    def begin(self) -> None:
        """From here on lines are counted."""
        self._ready_lines = len(self.host.said.splitlines())
        self.accounting.lines.clear()
        self.admin.lines.clear()


def is_outage(answer: Answer) -> None:
    assert answer.refused == (503, "service_unavailable"), answer
    assert int(answer.headers["retry-after"]) >= 1
