"""`python -m accounting run | migrate | audit [--json] [--recent] [--client-log FILE] | rebuild`.

Exit status: 0 done (or stopped when asked to), 1 a store cannot be reached or an audit found
drift, 2 settings or arguments are wrong. What goes wrong is one line on stderr.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.exceptions import RedisError

from accounting import audit, log_lines, rebuild
from accounting.audit_clients import ClientLogError
from accounting.contract.settings import Settings, SettingsError, load
from accounting.migrate import MigrationError, migrate
from accounting.rebuild import RebuildError
from accounting.reckoning import RestlessError
from accounting.stores import OUTAGES, StoreError, open_postgres, open_redis
from accounting.worker import Worker

_EXPECTED = (
    StoreError,
    MigrationError,
    RestlessError,
    RebuildError,
    ClientLogError,
    *OUTAGES,
    asyncpg.PostgresError,
    RedisError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m accounting")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", help="post usage until stopped")
    verbs.add_parser("migrate", help="bring the database's schema up to date")
    audits = verbs.add_parser("audit", help="prove every invariant on the live system")
    audits.add_argument("--json", action="store_true", help="one JSON object")
    extent = audits.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="all there is (the default)")
    extent.add_argument(
        "--recent", action="store_true", help="only what was posted since the last clean audit"
    )
    audits.add_argument(
        "--client-log", type=Path, metavar="FILE", help="compare what clients were told, too"
    )
    verbs.add_parser("rebuild", help="fill Redis from Postgres and the stream")
    options = parser.parse_args(argv)
    verb: Callable[[Settings], Coroutine[Any, Any, int]] = {
        "run": _run,
        "migrate": _migrate,
        "audit": partial(_audit, options=options),
        "rebuild": _rebuild,
    }[options.verb]
    try:
        settings = load(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"tollgate: {error}\n")
        return 2
    try:
        return uvloop.run(verb(settings))
    except _EXPECTED as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"tollgate accounting: {text}\n")
        return 1


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


async def _run(settings: Settings) -> int:
    log_lines.start()
    logging.getLogger("asyncpg").setLevel(logging.ERROR)  # store_states.py says it in one line
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await Worker(settings).run(stopping)
    return 0


async def _migrate(settings: Settings) -> int:
    if not settings.database_url:
        raise StoreError("TOLLGATE_DATABASE_URL is not set")
    for name in await migrate(settings.database_url.reveal()):
        say(f"applied {name}")
    return 0


async def _audit(settings: Settings, options: argparse.Namespace) -> int:
    async with await open_postgres(settings) as pool, await open_redis(settings) as redis:
        longest = settings.total_timeout_seconds
        findings = await audit.audit(
            pool, redis, longest, options.client_log, recent=options.recent
        )
        aside = await audit.not_applicable(pool)
    say(audit.as_json(findings) if options.json else audit.as_text(findings))
    if aside and not options.json:
        say(aside)
    return 1 if any(finding.drifted for finding in findings) else 0


async def _rebuild(settings: Settings) -> int:
    async with await open_postgres(settings) as pool, await open_redis(settings) as redis:
        count = await rebuild.rebuild(pool, redis, always=True)
    say(f"rebuilt {count} workspaces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
