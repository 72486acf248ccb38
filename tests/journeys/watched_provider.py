"""The stand-in provider inside the test process, so that a test can see what reached it."""

import asyncio
import json
import threading
from concurrent.futures import Future
from typing import Any

from benchmarks.provider import Request, StandInProvider

API_KEY = "sk-watched-0123456789abcdef"
_TIMEOUT_SECONDS = 10


class WatchedProvider:
    """A `StandInProvider` that runs on a thread of its own; accepts `API_KEY` only."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._provider = StandInProvider(api_key=API_KEY)
        self._run(self._provider.start())
        self.base_url = self._provider.base_url

    @property
    def requests(self) -> list[Request]:
        """What it was asked since `forget`, oldest first."""
        return list(self._provider.requests)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for request in self.requests]

    def forget(self) -> None:
        self._call(self._provider.requests.clear)

    def script(self, **fields: Any) -> None:
        """What the next request (or the next `times`) shall be answered."""
        self._call(lambda: self._provider.script(**fields))

    def stop(self) -> None:
        self._run(self._provider.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_SECONDS)
        self._loop.close()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_TIMEOUT_SECONDS)

    def _call(self, function: Any) -> None:
        done: Future[None] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(function()))
        done.result(_TIMEOUT_SECONDS)
