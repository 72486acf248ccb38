"""Which faults strike, in which order: a function of the seed alone.

A deck of every kind, some of them several times, is shuffled and dealt, then shuffled anew; so
even a short run is varied, and a long one leaves nothing out. How many are dealt is a matter of
time; what they are is not. Carrying them out is `injector`'s.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

DECK = {
    "worker killed": 3,
    "supervisor killed": 1,
    "accounting killed": 2,
    "admin API killed": 1,
    "Redis killed": 2,
    "Redis rolled back": 2,
    "Redis emptied": 1,
    "Redis flushed": 1,
    "Postgres killed": 1,
    "Postgres stopped at once": 1,
    "Postgres away": 1,
    "Postgres connections used up": 1,
    "worker paused": 2,
    "worker away": 1,
    "supervisor paused": 1,
    "accounting paused": 1,
    "admin API paused": 1,
    "Redis paused": 2,
    "Postgres paused": 1,
    "proxy rolled": 2,
    "everything killed": 1,
    "power lost": 1,
}
FORGETFUL = {"Redis rolled back", "Redis emptied", "Redis flushed", "power lost"}
LASTING = {"worker away"}  # takes longer than a short run has


class Fault(NamedTuple):
    """`gap` seconds after the one before; `alone`: once all is well again, and nothing else
    strikes until it is again. `size` and `which` lie between 0 and 1: how long or how much,
    and whom of several."""

    number: int
    kind: str
    gap: float
    alone: bool
    size: float
    which: float


def schedule(seed: int, brief: bool = False) -> Iterator[Fault]:
    """Without end; `brief` leaves out what lasts long."""
    dice = random.Random(f"{seed} faults")
    number = 0
    while True:
        deck = [kind for kind, count in DECK.items() for _ in range(count)]
        dice.shuffle(deck)
        for kind in deck:
            gap, overlaps = dice.uniform(0.2, 1.2), dice.random() < 0.3
            size, which = dice.random(), dice.random()
            if brief and kind in LASTING:
                continue
            alone = kind in FORGETFUL or not overlaps
            yield Fault(number, kind, gap, alone, size, which)
            number += 1
