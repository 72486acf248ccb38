"""Which stores answer, and one log line when that changes."""

import logging
from collections import defaultdict
from collections.abc import Iterable

from redis.exceptions import RedisError

POSTGRES, REDIS = "Postgres", "Redis"
_log = logging.getLogger("tollgate.accounting")


class StoreStates:
    """A line when a store is lost and one when it is back, however many notice.

    It is back when it answers everyone who found it lost: one that is full, for example,
    answers those who only read.
    """

    def __init__(self) -> None:
        self._lost: defaultdict[str, set[object]] = defaultdict(set)  # and who found it so

    def __repr__(self) -> str:
        return f"<StoreStates lost={sorted(store for store, by in self._lost.items() if by)}>"

    def lost(self, error: BaseException, found_by: object) -> bool:
        """Note an outage; True when it is news."""
        store = store_of(error)
        is_news = not self._lost[store]
        self._lost[store].add(found_by)
        if is_news:
            _log.warning("%s does not answer: %s", store, str(error) or type(error).__name__)
        return is_news

    def answered(self, stores: Iterable[str], found_by: object) -> None:
        for store in stores:
            if found_by in self._lost[store]:
                self._lost[store].discard(found_by)
                if not self._lost[store]:
                    _log.info("%s answers again", store)


def store_of(error: BaseException) -> str:
    """Whose outage this is."""
    return REDIS if isinstance(error, RedisError) else POSTGRES
