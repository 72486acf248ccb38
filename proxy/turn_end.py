"""What many connections have to do at the end of a loop turn, planned once for all of them.

Writes wait for the end of the turn so that the reading and deciding of all requests that came
in together is done first: see ARCHITECTURE. A handle of the loop for each would cost 0.5 µs.
"""

import asyncio
from collections.abc import Callable


class TurnEnd:
    """`add(call)`: call it before the loop waits again. One that raises costs others nothing."""

    __slots__ = ("_calls", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"TurnEnd({len(self._calls)})"

    def add(self, call: Callable[[], None]) -> None:
        if not self._calls:
            self._loop.call_soon(self._run)
        self._calls.append(call)

    def _run(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception as error:
                self._loop.call_exception_handler({"message": "turn end", "exception": error})
