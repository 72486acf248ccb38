"""Which stores answer, and one log line when that changes."""

import logging
from collections.abc import Iterable

from redis.exceptions import RedisError

POSTGRES, REDIS = "Postgres", "Redis"
_log = logging.getLogger("tollgate.accounting")


class StoreStates:
    """A line when a store is lost and one when it is back, however many notice."""

    def __init__(self) -> None:
        self._lost: set[str] = set()

    def __repr__(self) -> str:
        return f"<StoreStates lost={sorted(self._lost)}>"

    def lost(self, error: BaseException) -> bool:
        """Note an outage; True when it is news."""
        store = REDIS if isinstance(error, RedisError) else POSTGRES
        if store in self._lost:
            return False
        self._lost.add(store)
        _log.warning("%s does not answer: %s", store, str(error) or type(error).__name__)
        return True

    def answered(self, stores: Iterable[str]) -> None:
        for store in self._lost.intersection(stores):
            self._lost.discard(store)
            _log.info("%s answers again", store)
