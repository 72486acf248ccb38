"""Calls at the end of a loop turn: in order, once, none lost to another's failure."""

import asyncio
from typing import Any

from proxy.turn_end import TurnEnd


async def test_calls_are_made_in_order_when_the_turn_ends() -> None:
    found: list[int] = []
    turn_end = TurnEnd(asyncio.get_running_loop())
    for number in range(3):
        turn_end.add(lambda number=number: found.append(number))  # type: ignore[misc]
    assert found == [] and repr(turn_end) == "TurnEnd(3)"
    await asyncio.sleep(0)
    assert found == [0, 1, 2]
    await asyncio.sleep(0)
    assert found == [0, 1, 2]


async def test_what_is_added_meanwhile_waits_for_the_next_turn() -> None:
    found: list[str] = []
    turn_end = TurnEnd(asyncio.get_running_loop())

    def first() -> None:
        found.append("first")
        turn_end.add(lambda: found.append("second"))

    turn_end.add(first)
    await asyncio.sleep(0)
    assert found == ["first"]
    await asyncio.sleep(0)
    assert found == ["first", "second"]


async def test_one_that_raises_is_told_and_the_others_are_called() -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    found: list[int] = []
    turn_end = TurnEnd(loop)
    turn_end.add(lambda: found.append(1 // 0))
    turn_end.add(lambda: found.append(2))
    await asyncio.sleep(0)
    assert found == [2] and isinstance(told[0]["exception"], ZeroDivisionError)
