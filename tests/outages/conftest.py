"""A town for each test; its Postgres is the run's, unless a test wants to harm it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.accounting.scene import pool_on
from tests.outages.town import Town


@pytest.fixture
async def town(tmp_path: Path, database_url: str) -> AsyncIterator[Town]:
    async with pool_on(database_url, size=8) as pool:
        found = Town(tmp_path, database_url, pool)
        try:
            yield await found.open()
        finally:
            await found.close()
