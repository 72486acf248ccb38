"""The day partitions of `usage_records`: made ahead of time, and when a row needs one.

A row's day is that of its request id. Days further back than any backlog, or further ahead
than clocks differ, are not believed: such rows go to quarantine (`usage_entries.py`).
"""

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import Any

BELIEVED_BACK = timedelta(days=35)
BELIEVED_AHEAD = timedelta(days=1)
_MADE_AHEAD_DAYS = 3
_LOCK = 0x70_6C_67_02
_EXISTS = (  # unlike to_regclass, this sees what was committed while we waited for the lock
    "select exists (select from pg_class where relname = $1"
    " and relnamespace = current_schema()::regnamespace)"
)


def believed(day: date, today: date) -> bool:
    """Whether a request of that day can be arriving now."""
    return today - BELIEVED_BACK <= day <= today + BELIEVED_AHEAD


def due(now: datetime) -> list[date]:
    """The days that should have a partition now: yesterday's to some days ahead."""
    today = now.astimezone(UTC).date()
    return [today + timedelta(days=offset) for offset in range(-1, _MADE_AHEAD_DAYS + 1)]


async def ensure(connection: Any, days: Iterable[date]) -> None:
    """Make the partitions of those days that have none.

    A partition is built beside the table and then attached, which readers and writers of the
    other days do not notice.
    """
    for day in sorted(set(days)):
        name = f"usage_records_{day:%Y%m%d}"
        if await connection.fetchval(_EXISTS, name):
            continue
        async with connection.transaction():
            await connection.execute("select pg_advisory_xact_lock($1)", _LOCK)
            if await connection.fetchval(_EXISTS, name):
                continue
            await connection.execute(
                f"create table {name}"
                " (like usage_records including defaults including constraints);"
                f"alter table usage_records attach partition {name}"
                f" for values from ('{day}') to ('{day + timedelta(days=1)}')"
            )
