"""A stand-in provider for each test, on a free port."""

from collections.abc import AsyncIterator

import pytest

from benchmarks.provider import StandInProvider


@pytest.fixture
async def provider() -> AsyncIterator[StandInProvider]:
    async with StandInProvider(port=0) as running:
        yield running
