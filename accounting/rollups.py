"""Usage summed per workspace, hour, model and key: what dashboards and invoices read.

Owns the table `usage_hourly`. Rows are added in the statement that inserts usage records, so
a rollup counts exactly the rows that are there. The hour is that of the exchange's start, UTC.
"""

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
