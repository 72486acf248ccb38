"""Migrations apply in order, once, under a lock, and never when files and database disagree."""

import asyncio

import asyncpg
import pytest

from accounting.migrate import Migration, MigrationError, apply, available, migrate, parse

ONE = Migration(1, "0001_one.sql", "create table one ()")
TWO = Migration(2, "0002_two.sql", "create table two (); create table three ()")


async def tables(url: str) -> set[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "select relname from pg_class where relnamespace = 'public'::regnamespace"
            " and relkind in ('r', 'p')"
        )
    finally:
        await connection.close()
    return {row["relname"] for row in rows}


async def applied(url: str, migrations: list[Migration]) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        return await apply(connection, migrations)
    finally:
        await connection.close()


async def test_the_schema_is_complete_and_applied_once(empty_database_url: str) -> None:
    names = [migration.name for migration in available()]
    assert await migrate(empty_database_url) == names
    assert {"workspaces", "grants", "usage_records", "redis_deltas"} <= await tables(
        empty_database_url
    )
    assert await migrate(empty_database_url) == []


async def test_several_processes_at_once_apply_each_once(empty_database_url: str) -> None:
    found = await asyncio.gather(*(migrate(empty_database_url) for _ in range(4)))
    assert sorted(found, key=len) == [[], [], [], [m.name for m in available()]]


async def test_only_what_is_new_is_applied(empty_database_url: str) -> None:
    assert await applied(empty_database_url, [ONE]) == [ONE.name]
    assert await applied(empty_database_url, [ONE, TWO]) == [TWO.name]
    assert {"one", "two", "three"} <= await tables(empty_database_url)


async def test_a_failing_file_leaves_nothing_of_itself(empty_database_url: str) -> None:
    broken = Migration(2, "0002_broken.sql", "create table two (); select nonsense")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await applied(empty_database_url, [ONE, broken])
    assert "one" in await tables(empty_database_url)
    assert "two" not in await tables(empty_database_url)
    assert await applied(empty_database_url, [ONE, TWO]) == [TWO.name]


async def test_a_changed_file_is_refused(empty_database_url: str) -> None:
    await applied(empty_database_url, [ONE])
    changed = ONE._replace(sql="create table other ()")
    with pytest.raises(MigrationError, match=r"0001_one\.sql: changed"):
        await applied(empty_database_url, [changed, TWO])
    assert "two" not in await tables(empty_database_url)


async def test_a_database_from_the_future_is_refused(empty_database_url: str) -> None:
    await applied(empty_database_url, [ONE, TWO])
    with pytest.raises(MigrationError, match=r"0002_two\.sql: applied here"):
        await applied(empty_database_url, [ONE])


@pytest.mark.parametrize(
    "names", [["0002_a.sql"], ["0001_a.sql", "0003_b.sql"], ["0001_a.sql", "0001_b.sql"], ["1.sql"]]
)
def test_names_out_of_line_are_refused(names: list[str]) -> None:
    with pytest.raises(MigrationError):
        parse(dict.fromkeys(names, ""))
