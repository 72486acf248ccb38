"""Idempotency claims on a real Postgres: one attempt at a time, one resource for all of them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from accounting import idempotency
from accounting.contract.errors import IdempotencyInProgress, IdempotencyMismatch
from accounting.contract.settings import Secret
from accounting.idempotency import Claim
from tests.accounting.scene import pool_on


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[asyncpg.Pool]:
    async with pool_on(database_url, 8) as pool:
        yield pool


async def claim(pool: asyncpg.Pool, resource_id: str = "r1", **changed: Any) -> Claim:
    fields = {"scope": "ws", "route": "POST /x", "key": "k", "request_hash": b"h"} | changed
    return await idempotency.claim(pool, resource_id=resource_id, **fields)


async def age(pool: asyncpg.Pool, interval: str) -> None:
    """Let time pass for all claims."""
    await pool.execute(
        f"update idempotency set created_at = created_at - interval '{interval}',"
        f" claimed_at = claimed_at - interval '{interval}'"
    )


async def test_of_many_at_once_one_claims(pool: asyncpg.Pool) -> None:
    found = await asyncio.gather(
        *(claim(pool, f"r{number}") for number in range(8)), return_exceptions=True
    )
    claims = [one for one in found if isinstance(one, Claim)]
    refusals = [one for one in found if isinstance(one, IdempotencyInProgress)]
    assert len(claims) == 1 and len(refusals) == 7
    assert all(refusal.retry_after_seconds == 1 for refusal in refusals)


async def test_what_is_done_is_shown_under_its_first_id(pool: asyncpg.Pool) -> None:
    first = await claim(pool, "r1")
    assert not first.done and first.attempt == 1
    await idempotency.complete(pool, first)
    again = await claim(pool, "r2")
    assert again.done and again.resource_id == "r1" and again.seed == first.seed


async def test_another_request_under_the_key_is_a_mismatch_in_every_state(
    pool: asyncpg.Pool,
) -> None:
    first = await claim(pool)
    for end in (None, idempotency.break_off, idempotency.complete):
        if end is not None:
            await end(pool, first)
        with pytest.raises(IdempotencyMismatch):
            await claim(pool, request_hash=b"other")


async def test_scope_route_and_key_are_apart(pool: asyncpg.Pool) -> None:
    await claim(pool)
    for changed in ({"scope": "ws2"}, {"route": "POST /y"}, {"key": "k2"}):
        assert not (await claim(pool, "other", **changed)).done


async def test_a_refused_request_frees_its_key(pool: asyncpg.Pool) -> None:
    await idempotency.forget(pool, await claim(pool, "r1"))
    again = await claim(pool, "r2", request_hash=b"other")
    assert again.resource_id == "r2" and again.attempt == 1


async def test_a_broken_off_attempt_is_completed_under_its_id(pool: asyncpg.Pool) -> None:
    first = await claim(pool, "r1")
    await idempotency.break_off(pool, first)
    second = await claim(pool, "r2")
    assert second.resource_id == "r1" and second.attempt == 2 and not second.done
    assert second.derive(Secret("token")) == first.derive(Secret("token"))
    # A refusal of the second does not free the key: the first may have done something.
    await idempotency.forget(pool, second)
    assert (await claim(pool, "r3")).resource_id == "r1"


async def test_the_claim_of_a_dead_process_is_taken_over(pool: asyncpg.Pool) -> None:
    first = await claim(pool, "r1")
    await age(pool, f"{idempotency.CLAIM_SECONDS - 5} seconds")
    with pytest.raises(IdempotencyInProgress):
        await claim(pool)
    await age(pool, "6 seconds")
    second = await claim(pool, "r2")
    assert second.resource_id == "r1" and second.attempt == 2
    # The first was only slow: its end no longer counts.
    await idempotency.forget(pool, first)
    await idempotency.break_off(pool, first)
    with pytest.raises(IdempotencyInProgress):
        await claim(pool)


async def test_a_secret_needs_the_caller_and_the_seed(pool: asyncpg.Pool) -> None:
    made = await claim(pool)
    derived = made.derive(Secret("token"))
    assert derived is not None and len(derived) == 32
    assert made.derive(Secret("token")) == derived
    assert made.derive(Secret("other")) != derived
    assert (await claim(pool, key="k2")).derive(Secret("token")) != derived
    row = await pool.fetchrow("select * from idempotency where key = 'k'")
    assert derived not in [value for value in row if isinstance(value, bytes)]


async def test_after_a_day_secrets_are_gone_and_money_is_remembered(pool: asyncpg.Pool) -> None:
    await idempotency.complete(pool, await claim(pool, key="plain"))
    await idempotency.complete(pool, await claim(pool, key="money", kept=True))
    await age(pool, "23 hours")
    await idempotency.clear(pool)
    assert (await claim(pool, key="plain")).seed is not None
    await age(pool, "2 hours")
    late = await claim(pool, key="plain")
    assert late.done and late.seed is None and late.derive(Secret("token")) is None
    await idempotency.clear(pool)
    rows = await pool.fetch("select key, seed from idempotency")
    assert [tuple(row) for row in rows] == [("money", None)]


def test_the_derivation_is_the_standards() -> None:
    """RFC 5869, appendix A.1, first 32 bytes."""
    secret, salt = bytes([0x0B] * 22), bytes(range(13))
    expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    assert idempotency._hkdf(secret, salt, bytes(range(0xF0, 0xFA))).hex() == expected
