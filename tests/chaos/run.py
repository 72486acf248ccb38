"""One run of chaos: open, load, strike, heal, come to rest, compare."""

import asyncio
import time
from pathlib import Path

from tests.chaos.books import Books
from tests.chaos.faults import schedule
from tests.chaos.injector import Injector
from tests.chaos.load import Load, Noted
from tests.chaos.people import People
from tests.chaos.site import Site

CLIENTS = 24
ENDING_SECONDS = 60.0  # for exchanges that are under way, and operators' calls


class Run:
    """See the module; `wrong` is empty when every promise was kept."""

    def __init__(self, folder: Path, seed: int, brief: bool = False) -> None:
        self.seed = seed
        self.brief = brief
        self.seconds = 0.0
        self.site = Site(folder)
        self.noted = Noted()
        self.people = People(self.site, seed)
        self.injector = Injector(self.site, self.people, self.noted)
        self.books = Books(self.site, self.people, self.noted)

    @property
    def wrong(self) -> list[str]:
        return self.noted.wrong

    async def run(self, seconds: float) -> None:
        """Chaos for so long, then peace. Raises what stops the run itself."""
        try:
            await self.site.open()
            await self.people.settle_in()
            await self._under_load(seconds)
            await self.books.rest()
            await self.books.compare()
        finally:
            await self.site.close()

    async def _under_load(self, seconds: float) -> None:
        began = time.monotonic()
        meddled, struck, left, watched = (asyncio.Event() for _ in range(4))
        load = Load(self.site, self.people, self.noted, self.seed, CLIENTS)
        asyncio.get_running_loop().call_later(seconds, struck.set)
        tasks = [
            asyncio.create_task(self.books.watch(watched)),
            asyncio.create_task(load.run(left)),
            asyncio.create_task(self.people.meddle(meddled)),
        ]
        striking = asyncio.create_task(self.injector.run(schedule(self.seed, self.brief), struck))
        try:
            await asyncio.wait([striking, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if striking.done():
                await striking
                for event in (meddled, left, watched):
                    event.set()
                await asyncio.wait(tasks, timeout=ENDING_SECONDS)
        finally:
            for task in (striking, *tasks):
                task.cancel()
            ended = await asyncio.gather(striking, *tasks, return_exceptions=True)
        for problem in ended:
            if isinstance(problem, Exception):  # not one that was cancelled, for another's sake
                raise problem
        self.seconds = time.monotonic() - began
