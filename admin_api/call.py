"""A call as a handler sees it: who calls, with what, and what there is to work with."""

from collections.abc import Mapping
from typing import Generic, TypeVar

import asyncpg
from msgspec import Struct
from redis.asyncio import Redis

from accounting.contract.errors import NotFound
from accounting.contract.identifiers import time_ms
from accounting.contract.settings import Secret, Settings
from accounting.keys import Holder
from admin_api.idempotency import Attempt
from admin_api.payloads import Body

B = TypeVar("B", bound=Body)


class Services(Struct, frozen=True):
    """What one admin API process works with; built in `app.py`."""

    settings: Settings
    operator_token: Secret
    pool: asyncpg.Pool
    redis: Redis


class Call(Struct, Generic[B], frozen=True):
    """An authenticated, decoded request. `holder` is None exactly when the operator calls."""

    services: Services
    holder: Holder | None
    path: Mapping[str, str]
    body: B
    attempt: Attempt

    @property
    def pool(self) -> asyncpg.Pool:
        return self.services.pool

    @property
    def redis(self) -> Redis:
        return self.services.redis

    @property
    def own(self) -> Holder:
        """The calling key and its workspace, on a route for keys."""
        assert self.holder is not None
        return self.holder

    def identifier(self, prefix: str) -> str:
        """The path's `{id}`. Raises NotFound for what can be no id of that kind."""
        text = self.path["id"]
        try:
            time_ms(text)
        except ValueError:
            raise NotFound from None
        if text.rpartition("_")[0] != prefix:
            raise NotFound
        return text
