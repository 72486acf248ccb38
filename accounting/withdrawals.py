"""Credits taken back from a grant: refunded for money, or clawed back.

Owns the table `withdrawals`. A refund takes exactly what is asked of a topup, or nothing; a
claw-back takes what is left of any grant, as far as nothing in flight holds it. The money
itself moves by hand; in the ledger the credits return to the account that paid for them.

Theory of operation. What is asked is written first, so that a request broken off anywhere is
finished by whoever comes next, the caller or accounting's loop. As with expiry, Redis sets the
credits aside before the ledger takes them, and the step that applies the delta ends the
reservation: no wallet goes below what it holds.
"""

from typing import Any, Literal

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis

from accounting import deltas, ledger, outbox
from accounting.contract.errors import Conflict, NotFound, Unavailable
from accounting.contract.money import format_usd
from accounting.ledger import CLAWBACK, REFUND, Journal, Transfer, wallet_account
from accounting.outbox import Told
from accounting.reservations import reserve
from accounting.stores import guarded

Kind = Literal["refund", "clawback"]

_CODES = {"refund": REFUND, "clawback": CLAWBACK}
_TOLD = {"refund": "grant.refunded", "clawback": "grant.clawed_back"}
_OPEN, _DONE, _REFUSED = "open", "done", "refused"
_ABANDONED_SECONDS = 5.0  # after that the loop finishes what a caller has left open
_AT_ONCE = 100
_TRIES = 20


class Withdrawal(Struct, frozen=True):
    """What was taken of what was asked, and what is left of the grant; µcr.

    `settled`: whether Redis has heard of it yet; what was taken cannot be spent either way.
    """

    id: str
    workspace_id: str
    grant_id: str
    kind: str
    wanted_ucr: int
    taken_ucr: int
    remaining_ucr: int
    settled: bool


@guarded
async def withdraw(
    pool: asyncpg.Pool,
    redis: Redis,
    withdrawal_id: str,
    grant_id: str,
    kind: Kind,
    amount_ucr: int | None = None,
    reason: str = "",
) -> Withdrawal:
    """Take credits back, once per `withdrawal_id`; a repetition shows it again.

    `amount_ucr` None: all that is left. Raises NotFound, Conflict, Unavailable.
    """
    grant = await pool.fetchrow(
        "select workspace_id, kind, amount_ucr, remaining_ucr from grants where id = $1", grant_id
    )
    if grant is None:
        raise NotFound("There is no such grant.")
    if kind == "refund" and grant["kind"] != "topup":
        raise Conflict("Only what was bought can be refunded.")
    wanted = amount_ucr or grant["remaining_ucr"] or grant["amount_ucr"]
    await pool.execute(
        "insert into withdrawals (id, workspace_id, grant_id, kind, wanted_ucr, reason)"
        " values ($1, $2, $3, $4, $5, $6) on conflict (id) do nothing",
        withdrawal_id,
        grant["workspace_id"],
        grant_id,
        kind,
        wanted,
        reason,
    )
    return await _finish(pool, redis, withdrawal_id, grant["workspace_id"])


async def finish_abandoned(pool: Any, redis: Redis) -> int:
    """Finish withdrawals that were broken off; how many. Raises WalletLostError and outages."""
    rows = await pool.fetch(
        "select id, workspace_id from withdrawals where state = 'open'"
        " and created_at < now() - make_interval(secs => $1) order by created_at limit $2",
        _ABANDONED_SECONDS,
        _AT_ONCE,
    )
    finished = 0
    for row in rows:
        await deltas.apply_pending(pool, redis, row["workspace_id"])
        finished += await _attempt(pool, redis, row["id"], row["workspace_id"])
    return finished


async def _finish(pool: Any, redis: Redis, withdrawal_id: str, workspace_id: str) -> Withdrawal:
    for _ in range(_TRIES):  # others move credits of the workspace at the same time
        await deltas.reached(pool, redis, workspace_id)
        if await _attempt(pool, redis, withdrawal_id, workspace_id):
            break
    else:
        raise Unavailable("Balances are being restored.")
    settled = await deltas.reached(pool, redis, workspace_id)
    row = await pool.fetchrow(
        "select w.*, g.remaining_ucr from withdrawals w join grants g on g.id = w.grant_id"
        " where w.id = $1",
        withdrawal_id,
    )
    if row["state"] == _REFUSED:
        left = format_usd(row["remaining_ucr"])
        raise Conflict(
            f"The grant has {left} US dollars left, and not as much of it is free as is asked."
        )
    return Withdrawal(
        id=row["id"],
        workspace_id=workspace_id,
        grant_id=row["grant_id"],
        kind=row["kind"],
        wanted_ucr=row["wanted_ucr"],
        taken_ucr=row["taken_ucr"],
        remaining_ucr=row["remaining_ucr"],
        settled=settled,
    )


async def _attempt(pool: Any, redis: Redis, withdrawal_id: str, workspace_id: str) -> bool:
    """Carry an open withdrawal out; False when Redis is not ready for it."""
    async with pool.acquire() as connection, connection.transaction():
        await ledger.lock_wallets(connection, [workspace_id])
        one = await connection.fetchrow(
            "select w.id, w.workspace_id, w.grant_id, w.kind, w.wanted_ucr, w.state,"
            " g.kind as grant_kind, g.remaining_ucr"
            " from withdrawals w join grants g on g.id = w.grant_id where w.id = $1",
            withdrawal_id,
        )
        if one["state"] != _OPEN:
            return True
        if await deltas.waiting(connection, workspace_id):
            return False
        wanted = min(one["wanted_ucr"], one["remaining_ucr"])
        taken = await reserve(redis, workspace_id, withdrawal_id, wanted)
        if taken < 0:
            return False
        if one["kind"] == "refund" and taken < one["wanted_ucr"]:
            await reserve(redis, workspace_id, withdrawal_id, 0)
            await _close(connection, withdrawal_id, _REFUSED, 0, None)
        else:
            journal_id = await _post(connection, one, taken) if taken else None
            await _close(connection, withdrawal_id, _DONE, taken, journal_id)
    return True


async def _post(connection: Any, one: Any, taken_ucr: int) -> int:
    """The journal; its id."""
    payer = await connection.fetchval(
        "select a.kind from transfers t join ledger_accounts a on a.id = t.debit_id"
        " where t.grant_id = $1 and t.code in (1, 21)",
        one["grant_id"],
    )
    wallet, code = wallet_account(one["grant_kind"]), _CODES[one["kind"]]
    [journal_id] = await ledger.new_journal_ids(connection, 1)
    journal = Journal(
        kind=one["kind"],
        workspace_id=one["workspace_id"],
        dedupe_key=f"withdrawal:{one['id']}",
        transfers=[Transfer(wallet, payer, taken_ucr, one["grant_id"], code)],
        id=journal_id,
        details={"grant_id": one["grant_id"]},
    )
    await connection.execute(
        "update grants set refunded_ucr = refunded_ucr + $2 where id = $1",
        one["grant_id"],
        taken_ucr,
    )
    await ledger.post(connection, [journal])
    await deltas.record(connection, one["workspace_id"], -taken_ucr, journal_id, one["id"])
    body = {"grant_id": one["grant_id"], "taken_ucr": taken_ucr}
    await outbox.tell(connection, [Told(one["workspace_id"], journal_id, _TOLD[one["kind"]], body)])
    return journal_id


async def _close(
    connection: Any, withdrawal_id: str, state: str, taken_ucr: int, journal_id: int | None
) -> None:
    await connection.execute(
        "update withdrawals set state = $2, taken_ucr = $3, journal_id = $4 where id = $1",
        withdrawal_id,
        state,
        taken_ucr,
        journal_id,
    )
