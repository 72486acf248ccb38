"""A running stack as a journey sees it: its doors, its ledger, and whether its books balance.

Starting and stopping is `tests/stack.py`; here is what is asked of a stack that runs.
"""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from http.client import HTTPConnection, HTTPMessage
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg

from tests.stack import ROOT, Stack

UCR_PER_CREDIT = 1_000_000
_ANSWER_SECONDS = 30
_AUDIT_SECONDS = 60


class Reply(NamedTuple):
    status: int
    headers: HTTPMessage
    body: Any

    @property
    def code(self) -> str:
        """The code of an error answer."""
        return str(self.body["error"]["code"])


def call(
    connection: HTTPConnection,
    method: str,
    path: str,
    token: str,
    body: Mapping[str, Any] | None = None,
) -> Reply:
    """One request on a connection of the caller's; a JSON body is read with exact decimals."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    text = None if body is None else json.dumps(body, default=str)
    connection.request(method, path, text, headers)
    response = connection.getresponse()
    raw = response.read()
    return Reply(response.status, response.headers, json.loads(raw, parse_float=Decimal))


class Running:
    """One stack that is ready. Amounts are exact: US dollars and credits as Decimal."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        found = re.search(r"base URL +(http://\S+)/v1", stack.output)
        operator = re.search(r"Operator API +(http://\S+)/v1/admin", stack.output)
        assert found and operator, stack.output
        self.public, self.admin = found[1], operator[1]
        self.base_url = f"{self.public}/v1"
        self._operator_token = (stack.data_dir / "operator_token").read_text().strip()
        self._environment = next(
            process.environ()
            for process in stack.processes
            if process.cmdline()[-2:] == ["accounting", "run"]
        )

    def operator(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What the operator API answers below `/v1/admin`; it has to succeed."""
        reply = self._once(self.admin, method, f"/v1/admin{path}", self._operator_token, body)
        assert reply.status in (200, 201), reply
        return reply.body

    def client(
        self, method: str, path: str, key: str, body: Mapping[str, Any] | None = None
    ) -> Reply:
        """What a client with `key` is answered at the public door, on a fresh connection."""
        return self._once(self.public, method, path, key, body)

    def connection(self) -> HTTPConnection:
        """A connection to the public door, to be closed by the caller."""
        url = urlsplit(self.public)
        return HTTPConnection(str(url.hostname), url.port, timeout=_ANSWER_SECONDS)

    def _once(
        self, door: str, method: str, path: str, token: str, body: Mapping[str, Any] | None
    ) -> Reply:
        url = urlsplit(door)
        connection = HTTPConnection(str(url.hostname), url.port, timeout=_ANSWER_SECONDS)
        try:
            return call(connection, method, path, token, body)
        finally:
            connection.close()

    def rows(self, sql: str, *arguments: object) -> list[dict[str, Any]]:
        """What the ledger's database answers."""

        async def fetch() -> list[dict[str, Any]]:
            url = self._environment["TOLLGATE_DATABASE_URL"]
            connection = await asyncpg.connect(url, timeout=_ANSWER_SECONDS)
            try:
                return [dict(row) for row in await connection.fetch(sql, *arguments)]
            finally:
                await connection.close()

        with ThreadPoolExecutor(1) as thread:  # away from the event loops of the tests
            return thread.submit(asyncio.run, fetch()).result(_ANSWER_SECONDS)

    def audit(self) -> None:
        """`python -m accounting audit` on this live system; it has to find no drift."""
        done = subprocess.run(
            [sys.executable, "-m", "accounting", "audit"],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_AUDIT_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "DRIFT" not in done.stdout
        assert done.stdout.count("ok ") >= 15, done.stdout
