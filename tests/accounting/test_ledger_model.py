"""Random histories: the real scripts and the real ledger against the simplest model.

On failure hypothesis prints the shortest history it found and the blob that repeats it; the
long run prints its seed, and `LEDGER_SEED=… LEDGER_STEPS=…` repeats it.
"""

import asyncio
import os
import random
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from redis.asyncio import Redis

from accounting.contract.keyspace import EPOCH
from tests.accounting.books import assert_clean
from tests.accounting.ledger_world import OPERATIONS, World
from tests.accounting.scene import pool_on

SEARCH = settings(
    max_examples=20,
    stateful_step_count=35,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
STEPS = int(os.environ.get("LEDGER_STEPS", "500"))
numbers = st.integers(0, 4000)


class Histories(RuleBasedStateMachine):
    """Each in a workspace of its own."""

    def __init__(self, runner: asyncio.Runner, pool: asyncpg.Pool, redis: Redis) -> None:
        super().__init__()
        self.runner, self.pool, self.redis = runner, pool, redis

    @initialize(amounts=st.lists(st.integers(1, 1500), min_size=1, max_size=4))
    def begin(self, amounts: list[int]) -> None:
        self.world = self.runner.run(World.make(self.pool, self.redis))
        for n, amount in enumerate(amounts):
            self.runner.run(self.world.do("grant", n, amount, 7 * amount))

    @rule(operation=st.sampled_from(OPERATIONS), a=numbers, b=numbers, c=numbers)
    def step(self, operation: str, a: int, b: int, c: int) -> None:
        self.runner.run(self.world.do(operation, a, b, c))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.runner.run(self.world.settle_all())


def test_histories_agree_with_the_model(database_url: str, redis_url: str) -> None:
    async def stores() -> Any:
        redis = Redis.from_url(redis_url)
        await redis.flushall()
        await redis.set(EPOCH, "filled")
        return await asyncpg.create_pool(database_url, min_size=1, max_size=4), redis

    async def close() -> None:
        await assert_clean(pool, redis)
        await redis.aclose()
        await pool.close()

    with asyncio.Runner() as runner:
        pool, redis = runner.run(stores())
        run_state_machine_as_test(lambda: Histories(runner, pool, redis), settings=SEARCH)
        runner.run(close())


@pytest.mark.parametrize(
    "seed", [424242, int(os.environ.get("LEDGER_SEED", random.randrange(10**6)))]
)
async def test_a_long_history_agrees_with_the_model(
    database_url: str, redis_client: Redis, seed: int
) -> None:
    print(f"LEDGER_SEED={seed} LEDGER_STEPS={STEPS}")
    chance = random.Random(seed)
    async with pool_on(database_url) as pool:
        await redis_client.set(EPOCH, "filled")
        world = await World.make(pool, redis_client)
        for step in range(STEPS):
            operation = chance.choice(OPERATIONS)
            a, b, c = (chance.randrange(4001) for _ in range(3))
            print(step, operation, a, b, c)
            await world.do(operation, a, b, c)
        await world.settle_all()
        await assert_clean(pool, redis_client)
