"""The scenarios about what is behind the proxy: Redis per request, accounting per event.

Owns the crowd of workspaces of their own that make requests cold, and how Redis and
accounting are looked at. Only Tollgate itself can be measured by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Iterator, Sequence

from redis import Redis

from accounting import funding, keys, stores, workspaces
from accounting.contract import settings
from accounting.keys import Limits
from benchmarks.load import Load
from benchmarks.load_request import Ask, target_for
from benchmarks.measures import OURS, Meter, Observed, Plan, Scenario, Subject
from benchmarks.product import Product
from benchmarks.scenarios import MARGIN_SECONDS, chat_body, target

COLD_RATE = 1500.0
CREATING_AT_ONCE = 16
CROWD_USD_UCR = 100 * 100_000_000
CROWD_LIMITS = Limits(
    requests_per_minute=60_000,
    tokens_per_minute=1_000_000_000,
    tokens_per_day=1_000_000_000,
    concurrency=1000,
    cost_cap_ucr=CROWD_USD_UCR,
)


async def crowd(product: Product, size: int) -> list[str]:
    """The secrets of the keys of `size` funded workspaces, made as the operator API makes them."""
    environ = {
        "TOLLGATE_REDIS_URL": product.redis_url,
        "TOLLGATE_DATABASE_URL": product.database_url,
        "TOLLGATE_DATABASE_CONNECTIONS": str(CREATING_AT_ONCE),
    }
    chosen = settings.load(environ)
    made: list[str] = []
    async with (
        await stores.open_postgres(chosen) as pool,
        await stores.open_redis(chosen) as redis,
    ):

        async def member() -> None:
            while len(made) < size:
                secret = keys.secret_from(secrets.token_bytes(32))
                made.append(secret.reveal())
                workspace = await workspaces.create(pool, redis, "crowd")
                await funding.give(
                    pool,
                    redis,
                    workspace.id,
                    kind="topup",
                    amount_ucr=CROWD_USD_UCR,
                    expires_at=None,
                    source_ref=f"crowd:{workspace.id}",
                )
                await keys.create(pool, redis, workspace.id, "crowd", secret, limits=CROWD_LIMITS)

        await asyncio.gather(*(member() for _ in range(CREATING_AT_ONCE)))
    return made


async def gather_crowd(subject: Subject, plan: Plan) -> None:
    """Enlarge the product's crowd so that no cold key comes twice in a window."""
    product = ours(subject)
    size = int(COLD_RATE * (plan.warmup_seconds + plan.seconds + MARGIN_SECONDS))
    if len(product.crowd) < size:
        product.crowd += await crowd(product, size - len(product.crowd))
        await product.until_posted()


class RedisWork:
    """What Redis spends between the edges of a window: its process, and inside scripts."""

    def __init__(self, product: Product, meter: Meter) -> None:
        self._redis = Redis.from_url(product.redis_url)
        self._meter = meter
        self._scripts_us: list[float] = []

    def edge(self) -> None:
        """Note CPU and the time of all scripts up to now."""
        self._meter.edge()
        statistics = self._redis.info("commandstats")
        self._scripts_us.append(statistics.get("cmdstat_evalsha", {}).get("usec", 0.0))

    def figures(self, requests: int) -> dict[str, float]:
        """Per request of the window; and how many a second one core of Redis sustains so."""
        each_us = self._meter.spent()["redis"] / max(1, requests) * 1e6
        scripts_us = (self._scripts_us[-1] - self._scripts_us[0]) / max(1, requests)
        return {
            "of it in scripts µs": round(scripts_us, 2),
            "requests/s per Redis core": round(1e6 / each_us) if each_us else 0,
        }


def ours(subject: Subject) -> Product:
    """The product behind a subject that is one."""
    assert subject.product is not None, "only Tollgate itself has a Redis to look at"
    return subject.product


async def redis_hot(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """One key, as fast as it is answered."""
    return await redis_load(subject, plan, concurrency, meter, [])


async def redis_cold(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Open loop: every request comes with the key of another workspace, for the first time."""
    asks = asks_of(subject, ours(subject).crowd)
    return await redis_load(subject, plan, concurrency, meter, asks, COLD_RATE)


async def redis_mix(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Four requests of one key, then one of another workspace: as fast as they are answered."""
    hot = Ask(target(subject).request)
    cold = asks_of(subject, ours(subject).crowd)
    asks = [ask for one in cold for ask in (hot, hot, hot, hot, one)]
    return await redis_load(subject, plan, concurrency, meter, asks)


async def redis_load(
    subject: Subject,
    plan: Plan,
    concurrency: int,
    meter: Meter,
    asks: Sequence[Ask],
    rate_per_second: float | None = None,
) -> Observed:
    """One window of load with Redis looked at on its edges."""
    work = RedisWork(ours(subject), meter)
    load = Load(
        target(subject),
        concurrency=concurrency,
        duration_seconds=plan.seconds,
        warmup_seconds=plan.warmup_seconds,
        rate_per_second=rate_per_second,
        at_edges=work.edge,
        asks=asks,
    )
    result = await load.run()
    return Observed("own", result, work.figures(result.requests))


def asks_of(subject: Subject, crowd_secrets: Sequence[str]) -> list[Ask]:
    """The usual request, once with each key."""
    body = chat_body(subject)
    return [Ask(target_for(subject.base_url, body, secret).request) for secret in crowd_secrets]


async def accounting(subject: Subject, plan: Plan, concurrency: int, meter: Meter) -> Observed:
    """Hold accounting still while a backlog grows, then time how fast it is posted."""
    product = ours(subject)
    served = await product.served()
    with held_still(product.accounting):
        load = Load(
            target(subject),
            concurrency=concurrency,
            duration_seconds=plan.seconds,
            warmup_seconds=plan.warmup_seconds,
            at_edges=meter.edge,
        )
        result = await load.run()
        events = await product.settled() - served
    seconds = await product.until_posted()
    figures = {"backlog events": float(events), "posted events/s": round(events / seconds)}
    return Observed("own", result, figures)


@contextlib.contextmanager
def held_still(pids: Sequence[int]) -> Iterator[None]:
    """Stop processes for the length of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


SCENARIOS = (
    Scenario(
        "redis-hot", "plain requests of one key", "request", 64, redis_hot, OURS, repetitions=2
    ),
    Scenario(
        "redis-cold",
        f"open loop, {COLD_RATE:.0f}/s, every request of a workspace of its own",
        "request",
        256,
        redis_cold,
        OURS,
        repetitions=1,
        prepare=gather_crowd,
    ),
    Scenario(
        "redis-mix",
        "80 % of one key, 20 % cold",
        "request",
        64,
        redis_mix,
        OURS,
        repetitions=2,
        prepare=gather_crowd,
    ),
    Scenario(
        "accounting",
        "a backlog of plain requests, posted",
        "request",
        64,
        accounting,
        OURS,
        repetitions=2,
    ),
)
