"""The scenario of a long backlog: a million usage events wait, then accounting posts them.

Owns the making of the backlog, which is settled through the real script as a worker settles,
only without a provider in front. Leaves load and CPU to `measures`, the product to `product`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from redis.asyncio import Redis

from accounting import funding, keys, stores, workspaces
from accounting.contract import identifiers, keyspace, scripts, settings
from accounting.contract.figures import pack_figures
from accounting.contract.usage_event import (
    SCHEMA,
    TokenUsage,
    UsageEvent,
    encode_event,
    join_events,
)
from benchmarks import kernel
from benchmarks.load import Load
from benchmarks.measures import OURS, Meter, Observed, Plan, Scenario, Subject
from benchmarks.product import Product, is_posted
from benchmarks.scenarios import target
from benchmarks.stores import held_still, ours

EVENTS = 1_000_000
EVENTS_PER_ENTRY = 8  # what 10 ms of a busy worker settle in one shard
WORKSPACES = 200
CHARGE_UCR = 309_000
PIPELINED = 200
LOOK_SECONDS = 0.25
LIMIT_SECONDS = 300.0
MIB_KB = 1024


class Account(NamedTuple):
    """Whose events they are."""

    workspace_id: str
    key_id: str


async def backlog(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Hold accounting still while a million events are settled, then time and watch it."""
    product = ours(subject)
    load = Load(
        target(subject), concurrency=concurrency, duration_seconds=plan.seconds, at_edges=meter.edge
    )
    result = await load.run()
    await product.until_posted()
    accounts = await open_accounts(product)
    before_kb = memory_kb(product)
    async with Redis.from_url(product.redis_url) as redis:
        with held_still(product.accounting):
            await settle_all(redis, accounts)
        began = time.monotonic()
        most_kb = await watch(product, redis, began)
        seconds = time.monotonic() - began
    figures = {
        "backlog events": float(EVENTS),
        "drained s": round(seconds, 1),
        "posted events/s": round(EVENTS / seconds),
        "accounting MiB before": round(before_kb / MIB_KB),
        "accounting MiB at most": round(most_kb / MIB_KB),
    }
    return Observed("own", result, figures)


async def watch(product: Product, redis: Redis, began: float) -> int:
    """Until all is posted: the most memory that accounting had, KiB. Raises TimeoutError."""
    most_kb = 0
    while not await is_posted(redis):
        if time.monotonic() - began > LIMIT_SECONDS:
            raise TimeoutError(f"accounting is {LIMIT_SECONDS:.0f} s behind")
        most_kb = max(most_kb, memory_kb(product))
        await asyncio.sleep(LOOK_SECONDS)
    return most_kb


def memory_kb(product: Product) -> int:
    return sum(kernel.proportional_kb(pid) for pid in product.accounting)


async def open_accounts(product: Product) -> list[Account]:
    """Workspaces with enough for their share of the events, each with a key."""
    environ = {
        "TOLLGATE_REDIS_URL": product.redis_url,
        "TOLLGATE_DATABASE_URL": product.database_url,
    }
    chosen = settings.load(environ)
    share = 2 * CHARGE_UCR * EVENTS // WORKSPACES
    made = []
    async with (
        await stores.open_postgres(chosen) as pool,
        await stores.open_redis(chosen) as redis,
    ):
        for _ in range(WORKSPACES):
            workspace = await workspaces.create(pool, redis, "backlog")
            await funding.give(
                pool,
                redis,
                workspace.id,
                kind="topup",
                amount_ucr=share,
                expires_at=None,
                source_ref=f"backlog:{workspace.id}",
            )
            key = await keys.create(pool, redis, workspace.id, "backlog", keys.new_secret())
            made.append(Account(workspace.id, key.id))
    return made


async def settle_all(redis: Redis, accounts: list[Account]) -> None:
    """All events, a few per batch, the accounts in turn."""
    await scripts.load_all(redis)
    digest, boot = scripts.SCRIPTS["settle"].digest, identifiers.new_id("backlog")
    pipe = redis.pipeline(transaction=False)
    waiting = 0
    for keys_, arguments in batches(boot, accounts):
        pipe.evalsha(digest, len(keys_), *keys_, *arguments)
        waiting += 1
        if waiting == PIPELINED:
            await pipe.execute()
            waiting = 0
    await pipe.execute()


def batches(boot: str, accounts: list[Account]) -> Iterator[tuple[list[str], list[object]]]:
    """Keys and arguments of each settle."""
    numbers: dict[int, int] = {}
    charged = CHARGE_UCR * EVENTS_PER_ENTRY
    figures = pack_figures(1, charged, charged, 0, 120 * EVENTS_PER_ENTRY, 0)
    for n in range(EVENTS // EVENTS_PER_ENTRY):
        account = accounts[n % len(accounts)]
        shard = keyspace.shard_of(account.workspace_id)
        numbers[shard] = numbers.get(shard, 0) + 1
        yield (
            [
                keyspace.stream_key(shard),
                keyspace.boots_key(shard),
                keyspace.workspace_key(account.workspace_id),
            ],
            [boot, numbers[shard], body_of(account), account.key_id, figures],
        )


def body_of(account: Account) -> bytes:
    """The events of one batch."""
    now = time.time_ns() // 1000
    first = UsageEvent(
        schema=SCHEMA,
        request_id="",
        workspace_id=account.workspace_id,
        key_id=account.key_id,
        route="chat/completions",
        model="sandbox",
        served_by="sandbox/sandbox",
        price_version="0123456789ab",
        started_at_us=now,
        charge_ucr=CHARGE_UCR,
        hold_ucr=CHARGE_UCR,
        overrun_ucr=0,
        settlement="exact",
        outcome="completed",
        status=200,
        streamed=False,
        fallback_depth=0,
        tokens=TokenUsage(input=100, output=20),
        total_us=500_000,
        provider_us=480_000,
        first_byte_us=90_000,
        request_bytes=1024,
        answer_bytes=700,
    )
    events = (
        msgspec.structs.replace(first, request_id=identifiers.new_id("req"))
        for _ in range(EVENTS_PER_ENTRY)
    )
    return join_events([encode_event(event) for event in events])


SCENARIOS = (
    Scenario(
        "backlog",
        "a million usage events, posted",
        "request",
        64,
        backlog,
        OURS,
        repetitions=1,
        seconds=1.0,
    ),
)
