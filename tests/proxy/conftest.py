"""Every test here runs on uvloop, as a worker does; the proxy itself comes from `harness`."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.proxy.harness import proxy, start
from tests.proxy.host import host, seeds

__all__ = ["host", "proxy", "seeds", "start"]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}
