"""One line when a store is lost and one when it is back, however many find it so."""

import logging

import pytest
from redis.exceptions import ConnectionError as RedisGone
from redis.exceptions import OutOfMemoryError

from accounting.store_states import POSTGRES, REDIS, StoreStates


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_who_only_reads_does_not_say_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """A full Redis answers the one and not the other."""
    caplog.set_level(logging.INFO)
    states = StoreStates()
    assert states.lost(OutOfMemoryError("full"), "writer")
    for _ in range(3):
        states.answered({POSTGRES, REDIS}, "reader")
        assert not states.lost(OutOfMemoryError("full"), "writer")
    assert said(caplog) == ["Redis does not answer: full"]
    states.answered({POSTGRES, REDIS}, "writer")
    assert said(caplog)[1:] == ["Redis answers again"]


def test_it_is_back_when_it_answers_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    states = StoreStates()
    assert states.lost(OSError("gone"), 1)
    assert not states.lost(OSError("gone"), 2)
    assert states.lost(RedisGone("away"), 2)
    assert repr(states) == "<StoreStates lost=['Postgres', 'Redis']>"
    states.answered({POSTGRES}, 1)
    states.answered({POSTGRES}, 2)
    states.answered({REDIS}, 1)
    assert said(caplog)[2:] == ["Postgres answers again"]
    states.answered({REDIS}, 2)
    assert said(caplog)[3:] == ["Redis answers again"]
    assert states.lost(OSError("gone"), 1)
