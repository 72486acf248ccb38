"""Usage summed per workspace, hour, model and key: what dashboards and invoices read.

Owns the table `usage_hourly`. Rows are added in the statement that inserts usage records, so
a rollup counts exactly the rows that are there, and changes with a row that is revised. The
hour is that of the exchange's start, UTC.
"""

from typing import Any

from accounting.usage_entries import Billed

TOKENS = (
    "input_tokens",
    "output_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
)
KEYS = ("workspace_id", "hour", "model", "key_id")
SUMS = ("requests", "errors", *TOKENS, "charge_ucr")

GROUPED = (
    "select workspace_id, date_trunc('hour', started_at, 'UTC') as hour, model, key_id,"  # noqa: S608
    " count(*) as requests, count(*) filter (where settlement = 'void') as errors, "
    + ", ".join(f"sum({name})::bigint as {name}" for name in (*TOKENS, "charge_ucr"))
    + " from {rows} group by 1, 2, 3, 4"
)

ADD = (  # {rows}: usage records just inserted
    f"insert into usage_hourly ({', '.join((*KEYS, *SUMS))}) {GROUPED} order by 1, 2, 3, 4"
    f" on conflict ({', '.join(KEYS)}) do update set "
    + ", ".join(f"{name} = usage_hourly.{name} + excluded.{name}" for name in SUMS)
)

_ROLLUP = (
    "h.workspace_id = u.workspace_id and h.hour = date_trunc('hour', u.started_at, 'UTC')"
    " and h.model = u.model and h.key_id = u.key_id"
)


async def recharge(connection: Any, day: Any, request_id: str, difference_ucr: int) -> None:
    """Change what a recorded exchange costs, in its row and in its rollup."""
    await connection.execute(
        "with u as (update usage_records set charge_ucr = charge_ucr + $3,"  # noqa: S608
        " revised_ucr = revised_ucr + $3 where day = $1 and request_id = $2 returning *)"
        f" update usage_hourly h set charge_ucr = h.charge_ucr + $3 from u where {_ROLLUP}",
        day,
        request_id,
        difference_ucr,
    )


async def retell(connection: Any, billed: Billed) -> None:
    """Take over what an event tells anew but for its charge: how it ended, tokens, revision."""
    event = billed.event
    told = [getattr(event.tokens, name.removesuffix("_tokens")) for name in TOKENS]
    tokens = ", ".join(f"{name} = ${n}" for n, name in enumerate(TOKENS, start=7))
    sums = ", ".join(f"{name} = h.{name} + ${n} - u.{name}" for n, name in enumerate(TOKENS, 7))
    await connection.execute(
        "with u as (select * from usage_records where day = $1 and request_id = $2),"  # noqa: S608
        " h as (update usage_hourly h set errors = h.errors + ($4 = 'void')::int"
        f" - (u.settlement = 'void')::int, {sums} from u where {_ROLLUP})"
        f" update usage_records set revision = $3, settlement = $4, outcome = $5, status = $6,"
        f" {tokens} where day = $1 and request_id = $2",
        billed.day,
        event.request_id,
        event.revision,
        event.settlement,
        event.outcome,
        event.status,
        *told,
    )
