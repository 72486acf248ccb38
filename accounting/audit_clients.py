"""What clients were told their requests cost, against what the books say (R5).

Reads a log that a load generator wrote: a JSON object per line with `request_id` and
`credits_used` (a number or the same as text; null or absent: its client left before it was
told). What is still on the stream counts too, so a live system can be compared.
"""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from redis.asyncio import Redis

from accounting import usage_entries
from accounting.audit_ledger import Finding
from accounting.contract.identifiers import day_of
from accounting.contract.money import MoneyError, format_credits, parse_credits
from accounting.contract.settings import SHARDS
from accounting.usage_entries import StreamId
from accounting.usage_records import watermark
from accounting.usage_stream import read_range

_PAGE = 1000
_END = StreamId(2**62, 0)


class ClientLogError(Exception):
    """The log cannot be read; the text names the line, and is fit for one line."""


class _Line(Struct):
    request_id: str
    credits_used: Decimal | None = None


async def check(pool: Any, redis: Redis, log: Path) -> Finding:
    """R5. Raises ClientLogError, and the drivers' errors."""
    checked, total, wrong = 0, 0, list[str]()
    absent: dict[str, int] = {}
    for page in _pages(log):
        charged = await _recorded(pool, page)
        checked, total = checked + len(page), total + sum(page.values())
        absent |= {one: page[one] for one in page.keys() - charged.keys()}
        wrong += _differences(page, charged)
    if absent:
        charged = await _on_streams(pool, redis, absent)
        charged |= await _recorded(pool, absent)  # some may have been posted since
        wrong += _differences(absent, charged)
        wrong += [f"{one}: in no book" for one in sorted(absent.keys() - charged.keys())]
    title = f"what clients were told is charged: {format_credits(total)} credits"
    return Finding("R5", title, checked, len(wrong), wrong[0] if wrong else None)


def _differences(told: dict[str, int], charged: dict[str, int]) -> Iterator[str]:
    for request_id in sorted(told.keys() & charged.keys()):
        if told[request_id] != charged[request_id]:
            yield f"{request_id}: told {told[request_id]}, charged {charged[request_id]}"


def _pages(log: Path) -> Iterator[dict[str, int]]:
    try:
        with log.open("rb") as lines:
            numbered = iter(enumerate(lines, start=1))
            while page := list(islice(numbered, _PAGE)):
                yield dict(_told(page))
    except OSError as error:
        raise ClientLogError(f"{log}: {error.strerror}") from None


def _told(lines: Iterable[tuple[int, bytes]]) -> Iterator[tuple[str, int]]:
    """Request ids and µcr of those who were told."""
    for number, line in lines:
        try:
            one = msgspec.json.decode(line, type=_Line)
            day_of(one.request_id)
            if one.credits_used is not None:
                yield one.request_id, parse_credits(one.credits_used)
        except (msgspec.DecodeError, MoneyError, ValueError) as error:
            raise ClientLogError(f"line {number}: {error}") from None


async def _recorded(pool: Any, asked: Iterable[str]) -> dict[str, int]:
    """What was charged first: what operators gave back later no client was told."""
    ids = list(asked)
    rows = await pool.fetch(
        "select u.request_id, u.charge_ucr - u.revised_ucr from usage_records u"
        " join unnest($1::date[], $2::text[]) as x(day, request_id)"
        " on u.day = x.day and u.request_id = x.request_id",
        [day_of(one) for one in ids],
        ids,
    )
    found = dict(rows)
    rows = await pool.fetch(
        "select request_id, charge_ucr from quarantine"
        " where request_id = any($1) and charge_ucr is not null",
        [one for one in ids if one not in found],
    )
    return found | dict(rows)


async def _on_streams(pool: Any, redis: Redis, asked: dict[str, int]) -> dict[str, int]:
    """What is charged by entries that are not posted yet."""
    found: dict[str, int] = {}
    today = datetime.now(UTC).date()
    for shard in range(SHARDS):
        after = await watermark(pool, shard)
        while page := await read_range(redis, shard, after, _END):
            after = page[-1].id
            for entry in page:
                for one in usage_entries.read(entry, today)[0]:
                    if one.event.request_id in asked:
                        found.setdefault(one.event.request_id, one.event.charge_ucr)
    return found
