"""Every scenario by its name, and the names that stand for several."""

from __future__ import annotations

from benchmarks import backlog, endurance, scenarios, stores

SCENARIOS = {
    one.name: one for group in (scenarios, endurance, stores, backlog) for one in group.SCENARIOS
}
SEVERAL = {
    "rates": ("rate-1", "rate-16", "rate", "rate-256"),
    "big-bodies": ("big-prompts", "big-answers", "big-streams", "stalled-readers"),
    "redis": ("redis-hot", "redis-cold", "redis-mix"),
    # Memory per stream is looked at first: a process does not give back what it has had.
    # A backlog costs two minutes and a gigabyte of Redis: it is asked for by name.
    "all": (
        "open-streams",
        *(name for name in SCENARIOS if name not in ("open-streams", "backlog")),
    ),
}
NAMES = (*SCENARIOS, *SEVERAL)


def named(name: str) -> list[scenarios.Scenario]:
    """The scenarios that `name` stands for, in the order in which they are run."""
    return [SCENARIOS[one] for one in SEVERAL.get(name, (name,))]
