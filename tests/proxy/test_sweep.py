"""Every connection is looked at, few in a turn of the loop, none that has gone."""

import asyncio

from proxy.sweep import SLICE, look_at_all


class Connection:
    def __init__(self, among: "set[Connection]") -> None:
        self.among = among
        self.looks: list[float] = []
        self.takes: Connection | None = None
        among.add(self)

    def check_time(self, now: float) -> None:
        self.looks.append(now)
        if self.takes is not None:
            self.among.discard(self.takes)


async def test_each_is_looked_at_once() -> None:
    among: set[Connection] = set()
    every = [Connection(among) for _ in range(3 * SLICE + 1)]
    await look_at_all(among, 0.0, lambda: 7.0)
    assert [one.looks for one in every] == [[7.0]] * len(every)


async def test_few_are_looked_at_in_a_turn() -> None:
    among: set[Connection] = set()
    every = [Connection(among) for _ in range(5 * SLICE)]
    task = asyncio.create_task(look_at_all(among, 0.0, asyncio.get_running_loop().time))
    seen, most = 0, 0
    while not task.done():
        await asyncio.sleep(0)
        now = sum(len(one.looks) for one in every)
        seen, most = now, max(most, now - seen)
    assert seen == len(every) and 0 < most <= SLICE


async def test_what_has_gone_is_left_alone() -> None:
    among: set[Connection] = set()
    first, second = Connection(among), Connection(among)
    first.takes, second.takes = second, first
    await look_at_all(among, 0.0, lambda: 1.0)
    assert sorted(map(len, (first.looks, second.looks))) == [0, 1]


async def test_nothing_to_look_at_takes_its_time_too() -> None:
    task = asyncio.create_task(look_at_all([], 60.0, lambda: 1.0))
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
