"""Applies `migrations/NNNN_*.sql` in order, each once, each in a transaction of its own.

Several processes may start at the same time: an advisory lock lets one migrate while the
others wait and then find nothing to do. What was applied is recorded with its checksum; a
file that was changed, removed or slipped in before the last applied one is refused.
"""

import hashlib
import re
from importlib import resources
from typing import Any, NamedTuple

import asyncpg

_LOCK = 0x70_6C_67_01  # any number that nobody else in this database locks
_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


class MigrationError(Exception):
    """The database and the migration files disagree; the text is fit for one line."""


class Migration(NamedTuple):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


async def migrate(database_url: str) -> list[str]:
    """Bring the schema up to date; the names of what was applied now.

    Raises MigrationError, and asyncpg's or OS errors when the database cannot be reached.
    """
    connection = await asyncpg.connect(database_url)
    try:
        return await apply(connection, available())
    finally:
        await connection.close()


def available() -> list[Migration]:
    """The migrations of this package, in order."""
    return parse(
        {
            entry.name: entry.read_text("utf-8")
            for entry in (resources.files("accounting") / "migrations").iterdir()
            if entry.name.endswith(".sql")
        }
    )


def parse(files: dict[str, str]) -> list[Migration]:
    """Files by name to migrations by number. Raises MigrationError for a name out of line."""
    found = []
    for number, name in enumerate(sorted(files), start=1):
        match = _NAME.fullmatch(name)
        if not match or int(match[1]) != number:
            raise MigrationError(f"migration {name}: expected a name {number:04d}_….sql")
        found.append(Migration(number, name, files[name]))
    return found


async def apply(connection: Any, migrations: list[Migration]) -> list[str]:
    """Apply those not yet applied, under the lock; their names."""
    await connection.execute("select pg_advisory_lock($1)", _LOCK)
    try:
        await connection.execute(
            "create table if not exists schema_migrations (number int primary key,"
            " name text not null, checksum text not null,"
            " applied_at timestamptz not null default now())"
        )
        rows = await connection.fetch("select number, name, checksum from schema_migrations")
        applied = {row["number"]: row for row in rows}
        _prove(migrations, applied)
        fresh = [migration for migration in migrations if migration.number not in applied]
        for migration in fresh:
            await _apply_one(connection, migration)
        return [migration.name for migration in fresh]
    finally:
        await connection.execute("select pg_advisory_unlock($1)", _LOCK)


def _prove(migrations: list[Migration], applied: dict[int, Any]) -> None:
    """What was applied must be the first files, unchanged."""
    known = {migration.number: migration for migration in migrations}
    for number, row in sorted(applied.items()):
        migration = known.get(number)
        if migration is None:
            raise MigrationError(f"migration {row['name']}: applied here, but unknown to this code")
        if migration.checksum != row["checksum"]:
            raise MigrationError(f"migration {migration.name}: changed since it was applied")
    if applied and max(applied) != len(applied):
        raise MigrationError("schema_migrations: has a gap")


async def _apply_one(connection: Any, migration: Migration) -> None:
    async with connection.transaction():
        await connection.execute(migration.sql)
        await connection.execute(
            "insert into schema_migrations (number, name, checksum) values ($1, $2, $3)",
            migration.number,
            migration.name,
            migration.checksum,
        )
