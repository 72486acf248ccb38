"""What must be true of the stores: at any moment, and once everything has come to rest.

Owns the watch on the wallets, the wait for rest, and the comparison of what clients and
operators were told with the ledger, request by request and grant by grant. What holds within
the ledger and between the stores is the product's own audit's.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from msgspec import Struct
from redis.asyncio import Redis
from redis.exceptions import RedisError

from accounting.contract import keyspace
from accounting.contract.keyspace import Wallet
from accounting.contract.money import format_credits
from accounting.contract.settings import SHARDS
from tests.chaos.load import Exchange, Noted
from tests.chaos.people import People
from tests.chaos.site import ROOT, WORKERS, Site

REST_SECONDS = 60.0
LOOK_SECONDS = 0.1
AUDIT_SECONDS = 120.0
UNTOLD = "did not tell what they hold"
_wallets = msgspec.msgpack.Decoder(Wallet)


class Row(Struct):
    """One request in the ledger; amounts in µcr."""

    request_id: str
    key_id: str
    charge_ucr: int
    hold_ucr: int


class Books:
    """See the module."""

    def __init__(self, site: Site, people: People, noted: Noted) -> None:
        self.samples = 0
        self.lowest_ucr: int | None = None
        self.below: dict[str, Wallet] = {}  # the first wallet of each that was below zero
        self.receivable_ucr = 0
        self.charged_ucr = 0
        self.told_ucr = 0
        self.audit = ""
        self._site = site
        self._people = people
        self._noted = noted

    # At any moment

    async def watch(self, stopping: asyncio.Event) -> None:
        """No wallet is ever below zero, but while the gate is closed: a rebuild begins with
        empty wallets, and what is settled meanwhile is added up with the rest at its end."""
        while not stopping.is_set():
            try:
                async with Redis.from_url(self._site.redis_url, socket_timeout=1.0) as redis:
                    run = (await redis.info("server"))["run_id"]
                    while not stopping.is_set():
                        if keyspace.is_filled(await self._epoch(redis), run):
                            found = await self._wallets(redis)
                            if keyspace.is_filled(await self._epoch(redis), run):
                                self._look_at(found)
                        await asyncio.sleep(LOOK_SECONDS / 2)
            except (OSError, RedisError):
                await asyncio.sleep(LOOK_SECONDS / 2)

    async def _epoch(self, redis: Redis) -> str:
        found: Any = await redis.get(keyspace.EPOCH)
        return found.decode() if found else ""

    async def _wallets(self, redis: Redis) -> dict[str, Wallet]:
        ids = sorted({one.workspace_id for one in self._people.known})
        async with redis.pipeline(transaction=False) as pipe:
            for one in ids:
                pipe.hget(keyspace.workspace_key(one), "w")
            found = await pipe.execute()
        return {
            one: _wallets.decode(raw)
            for one, raw in zip(ids, found, strict=True)
            if raw is not None
        }

    def _look_at(self, wallets: dict[str, Wallet]) -> None:
        self.samples += 1
        for whose, wallet in wallets.items():
            if self.lowest_ucr is None or wallet.balance < self.lowest_ucr:
                self.lowest_ucr = wallet.balance
            if wallet.balance < 0 or wallet.held < 0:
                self.below.setdefault(whose, wallet)

    def _wrong(self, text: str) -> None:
        if text not in self._noted.wrong:
            self._noted.wrong.append(text)

    # At rest

    async def rest(self) -> None:
        """Wait until nothing is under way any more: no hold, no journal, nothing unposted."""
        deadline = time.monotonic() + REST_SECONDS
        while missing := await self._restless():
            if time.monotonic() > deadline:
                self._wrong(f"no rest within {REST_SECONDS:.0f} s: {missing}")
                return
            await asyncio.sleep(LOOK_SECONDS / 2)

    async def _restless(self) -> str:
        """What is still under way; empty: nothing."""
        if not await self._site.is_ready():
            return "the proxy is not ready"
        for name in ("tollgate_settles_unacknowledged", "tollgate_journal_slots_used"):
            if (figure := await self._site.gauge(name)) != 0:
                return f"{name} is {figure}"
        journals = list((self._site.data_dir / "journals").glob("*.journal"))
        if len(journals) != WORKERS:
            return f"{len(journals)} journals of {WORKERS} workers"
        try:
            async with Redis.from_url(self._site.redis_url) as redis:
                if waiting := await unposted(redis):
                    return f"not posted: {waiting}"
                holding = {w: one for w, one in (await self._wallets(redis)).items() if one.held}
        except (OSError, RedisError) as error:
            return repr(error)
        return f"held: {holding}" if holding else ""

    async def compare(self) -> None:
        """Everything told against everything recorded.

        Beyond a wallet or a cap may be served only what a worker held that did not say so in
        time to a Redis that had forgotten it: accounting then says that it has not.
        """
        excused = any(UNTOLD in line for line in self._site.log_lines())
        await self._run_audit()
        connection = await asyncpg.connect(self._site.database_url)
        try:
            rows = await connection.fetch(
                "select request_id, key_id, charge_ucr - revised_ucr as charge_ucr, hold_ucr"
                " from usage_records"
            )
            await self._compare_grants(connection)
            await self._compare_debts(connection, excused)
        finally:
            await connection.close()
        recorded = [Row(**dict(row)) for row in rows]
        self._compare_requests(recorded)
        self._compare_keys(recorded, excused)

    async def _run_audit(self) -> None:
        log = self._site.logs / "clients.jsonl"
        write_log(log, self._noted.exchanges)
        environment = {
            "TOLLGATE_REDIS_URL": self._site.redis_url,
            "TOLLGATE_DATABASE_URL": self._site.database_url,
            "TOLLGATE_TOTAL_TIMEOUT_SECONDS": "30",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "accounting", "audit", "--client-log", str(log)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )
        async with asyncio.timeout(AUDIT_SECONDS):
            output, _ = await process.communicate()
        self.audit = output.decode()
        if process.returncode:
            self._wrong(f"the audit: {self.audit}")

    def _compare_requests(self, recorded: list[Row]) -> None:
        by_id: dict[str, Row] = {}
        for row in recorded:
            if row.request_id in by_id:
                self._wrong(f"twice in the ledger: {row}")
            by_id[row.request_id] = row
            if row.charge_ucr > row.hold_ucr:
                self._wrong(f"charged more than was held: {row}")
        self.charged_ucr = sum(row.charge_ucr for row in recorded)
        for one in self._noted.exchanges:
            found = by_id.get(one.request_id)
            if found is not None and found.key_id != one.person.key_id:
                self._wrong(f"charged to {found.key_id}: {one}")
            if one.status == 200 and one.request_id and found is None:
                self._wrong(f"not in the ledger: {shown(one)}")
            if found is not None and one.status != 200 and one.status and found.charge_ucr:
                self._wrong(f"charged {found.charge_ucr} though refused: {shown(one)}")
            if found is not None and one.told_ucr not in (None, found.charge_ucr):
                self._wrong(f"charged {found.charge_ucr}, told otherwise: {shown(one)}")
            self.told_ucr += one.told_ucr or 0

    def _compare_keys(self, recorded: list[Row], excused: bool) -> None:
        sent = Counter(one.person.key_id for one in self._noted.exchanges)
        rows = Counter(row.key_id for row in recorded)
        spent: Counter[str] = Counter()
        for row in recorded:
            spent[row.key_id] += row.charge_ucr
        for person in self._people.known:
            if rows[person.key_id] > sent[person.key_id]:
                self._wrong(
                    f"{person.kind}: {sent[person.key_id]} sent, {rows[person.key_id]} rows"
                )
            cap = person.cap_ucr
            if cap is not None and spent[person.key_id] > cap and not excused:
                self._wrong(f"{person.kind}: spent {spent[person.key_id]} of {cap}")

    async def _compare_grants(self, connection: Any) -> None:
        rows = await connection.fetch(
            "select id, workspace_id, amount_ucr from grants where source_ref like 'operator:%'"
        )
        found = {row["id"]: (row["workspace_id"], row["amount_ucr"]) for row in rows}
        for grant, given in self._people.granted.items():
            if found.get(grant) != given:
                self._wrong(f"grant {grant} of {given} is {found.get(grant)} in the ledger")
        uncertain = list(self._people.uncertain)
        for grant in found.keys() - self._people.granted.keys():
            if found[grant] in uncertain:
                uncertain.remove(found[grant])
            else:
                self._wrong(f"grant {grant} of {found[grant]} was never asked for")

    async def _compare_debts(self, connection: Any, excused: bool) -> None:
        self.receivable_ucr = int(
            await connection.fetchval(
                "select coalesce(sum(amount_ucr), 0) from transfers where code = 12"
            )
        )
        if self.receivable_ucr and not excused:
            self._wrong(f"{self.receivable_ucr} µcr were served beyond wallets")
        if self.below and not (excused and self.receivable_ucr):
            self._wrong(f"below zero: {self.below}")
        quarantined = await connection.fetchval("select count(*) from quarantine")
        if quarantined:
            self._wrong(f"{quarantined} entries are in quarantine")


async def unposted(redis: Redis) -> list[str]:
    """Of each stream that is not posted to its end, what is pending, or comes next."""
    found = []
    for shard in range(SHARDS):
        key = keyspace.stream_key(shard)
        if not await redis.exists(key):
            continue
        for group in await redis.xinfo_groups(key):
            after = group["last-delivered-id"].decode()
            following = await redis.xrange(key, f"({after}", "+", 1)
            if group["pending"] or following:
                found.append(f"shard {shard}: {group['pending']} pending, then {following}"[:200])
    return found


def shown(one: Exchange) -> str:
    return (
        f"{one.request_id} {one.person.kind} status {one.status} streamed {one.streamed}"
        f" whole {one.whole} left {one.left} told {one.told_ucr}"
        f" at {one.sent_at:.2f}–{one.ended_at:.2f}"
    )


def write_log(path: Path, exchanges: list[Exchange]) -> None:
    """As `accounting audit --client-log` reads it."""
    with path.open("w") as log:
        for one in exchanges:
            if one.request_id and one.told_ucr is not None:
                told = format_credits(one.told_ucr)
                log.write(json.dumps({"request_id": one.request_id, "credits_used": told}) + "\n")
