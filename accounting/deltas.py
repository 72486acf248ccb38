"""Money that moved in the ledger and has yet to move in Redis: written, applied, retried.

Owns `redis_deltas`. Deltas of a workspace are numbered from 1 without gaps; `credit.lua`
applies each once and in order, so sending one again is harmless and sending one too early is
answered with what is missing.
"""

import logging
from collections import defaultdict
from typing import Any

import msgspec
from redis.asyncio import Redis

from accounting.contract import keyspace, scripts
from accounting.reservations import RESERVE
from accounting.stores import OUTAGES

_PAGE = 1000
_COLUMNS = "workspace_id, delta_id, amount_ucr, releases, key_id, spent_ucr"
_GAP, _UNKNOWN = -1, -2  # credit.lua's replies; 1 applied, 0 applied before
_log = logging.getLogger("tollgate.accounting")
_wallet_decoder = msgspec.msgpack.Decoder(keyspace.Wallet)


class WalletLostError(Exception):
    """Redis does not know a wallet that has been used; only a rebuild can tell its balance."""


async def record(
    connection: Any,
    workspace_id: str,
    amount_ucr: int,
    journal_id: int,
    releases: str | None = None,
    *,
    key_id: str | None = None,
    spent_ucr: int = 0,
) -> int:
    """Number and write a delta, the wallet being locked; its id.

    `releases` names a reservation (`reservations.py`) that ends in the step that applies the
    delta; `spent_ucr` is by how much the key `key_id` has spent more, or less.
    """
    delta_id = await connection.fetchval(
        "update wallets set last_delta = last_delta + 1 where workspace_id = $1"
        " returning last_delta",
        workspace_id,
    )
    await connection.execute(
        "insert into redis_deltas (workspace_id, delta_id, amount_ucr, journal_id, releases,"
        " key_id, spent_ucr) values ($1, $2, $3, $4, $5, $6, $7)",
        workspace_id,
        delta_id,
        amount_ucr,
        journal_id,
        releases,
        key_id,
        spent_ucr,
    )
    return int(delta_id)


async def apply_pending(pool: Any, redis: Redis, workspace_id: str | None = None) -> int:
    """Bring Redis up to the ledger: of one workspace, or of the first page of all that wait.

    Returns how many deltas took effect. Raises WalletLostError, and the drivers' errors.
    """
    rows = await pool.fetch(
        f"select {_COLUMNS} from redis_deltas"  # noqa: S608
        " where applied_at is null and ($1::text is null or workspace_id = $1)"
        " order by workspace_id, delta_id limit $2",
        workspace_id,
        _PAGE,
    )
    waiting = defaultdict(list)
    for row in rows:
        waiting[row["workspace_id"]].append(row)
    applied = 0
    lost: WalletLostError | None = None
    for workspace, pending in waiting.items():
        try:
            applied += await _apply(pool, redis, workspace, pending)
        except WalletLostError as error:
            lost = error  # the others need not wait for this one
    if lost:
        raise lost
    return applied


async def reached(pool: Any, redis: Redis, workspace_id: str) -> bool:
    """Bring Redis up to the ledger now, if it can be; whether it is. Raises asyncpg's errors."""
    try:
        await apply_pending(pool, redis, workspace_id)
    except (*OUTAGES, WalletLostError) as error:
        _log.warning("credits of %s will reach Redis later: %s", workspace_id, type(error).__name__)
    return not await waiting(pool, workspace_id)


async def waiting(connection: Any, workspace_id: str) -> bool:
    """Whether money of a workspace has yet to move in Redis."""
    return bool(
        await connection.fetchval(
            "select exists (select from redis_deltas"
            " where workspace_id = $1 and applied_at is null)",
            workspace_id,
        )
    )


async def _apply(pool: Any, redis: Redis, workspace_id: str, pending: list[Any]) -> int:
    applied = 0
    while pending:
        status, last = await _send(redis, workspace_id, pending[0])
        if status == _UNKNOWN:
            if not await _open_wallet(pool, redis, workspace_id):
                return applied
            pending = await _after(pool, workspace_id, 0)
        elif status == _GAP:
            pending = await _after(pool, workspace_id, last)
            if not pending or pending[0]["delta_id"] != last + 1:
                raise WalletLostError(f"Redis and ledger number {workspace_id}'s deltas apart")
        else:
            applied += status
            done = pending.pop(0)["delta_id"]
            if not pending:
                await _mark(pool, workspace_id, done)
    return applied


async def _send(redis: Redis, workspace_id: str, row: Any) -> tuple[int, int]:
    """Apply one delta; with it, in one step, the end of the reservation it accounts for."""
    key = keyspace.workspace_key(workspace_id)
    arguments = [row["delta_id"], row["amount_ucr"]]
    if row["spent_ucr"]:
        arguments += [row["key_id"], row["spent_ucr"]]
    if row["releases"] is None:
        status, last = await scripts.call(redis, "credit", [key], arguments)
        return status, last
    packed = await redis.hget(key, "w")
    if packed is None:
        return _UNKNOWN, 0
    assert isinstance(packed, bytes)  # the client does not decode
    last = _wallet_decoder.decode(packed).last_delta
    if last < row["delta_id"] - 1:
        return _GAP, last  # not yet its turn: the reservation has to stay
    leases = keyspace.leases_key(keyspace.shard_of(workspace_id), RESERVE)
    async with redis.pipeline(transaction=True) as both:
        both.eval(scripts.SCRIPTS["credit"].source, 1, key, *arguments)
        release = scripts.SCRIPTS["release"].source
        both.eval(release, 2, key, leases, RESERVE, row["releases"], workspace_id)
        (status, last), _given_back = await both.execute()
    return status, last


async def _after(pool: Any, workspace_id: str, delta_id: int) -> list[Any]:
    return list(
        await pool.fetch(
            f"select {_COLUMNS} from redis_deltas"  # noqa: S608
            " where workspace_id = $1 and delta_id > $2 order by delta_id",
            workspace_id,
            delta_id,
        )
    )


async def _mark(pool: Any, workspace_id: str, delta_id: int) -> None:
    await pool.execute(
        "update redis_deltas set applied_at = now()"
        " where workspace_id = $1 and delta_id <= $2 and applied_at is null",
        workspace_id,
        delta_id,
    )


async def _open_wallet(pool: Any, redis: Redis, workspace_id: str) -> bool:
    """Make a wallet known to Redis, unless Redis is waiting to be rebuilt anyway."""
    if not await redis.exists(keyspace.EPOCH):
        return False
    used = await pool.fetchval(
        "select exists (select from journals where workspace_id = $1 and kind = 'usage')",
        workspace_id,
    )
    if used:
        raise WalletLostError(f"Redis has no wallet of {workspace_id}: rebuild it")
    state = await pool.fetchval("select state from workspaces where id = $1", workspace_id)
    await scripts.call(redis, "put_workspace", [keyspace.workspace_key(workspace_id)], [state])
    return True
