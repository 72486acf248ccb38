"""Cool-downs: when a target is passed over, for how long, who probes it, and what ends it."""

import random

import pytest

from proxy.cooldown import PROBE, REFUSED, SERVING, Cooldown, CooldownRules

RULES = CooldownRules(window_seconds=10, failures=4, rate=0.5, seconds=2, limit_seconds=30)

pytestmark = pytest.mark.interpreted


class Target(Cooldown):
    """A cool-down that keeps what it told."""

    def __init__(self, rules: CooldownRules = RULES) -> None:
        self.told: list[float] = []
        super().__init__(rules, self.told.append)


def failing(now: float, times: int = RULES.failures) -> Target:
    target = Target()
    for _ in range(times):
        target.failed(now, probe=False)
    return target


def test_it_serves_until_enough_have_failed() -> None:
    target = failing(100, RULES.failures - 1)
    assert target.admit(100) == SERVING and not target.told
    target.failed(100, probe=False)
    assert target.admit(100) == REFUSED and target.told == [2]


def test_it_serves_while_enough_succeed() -> None:
    target = Target()
    for _ in range(1000):
        target.succeeded(100)
        target.failed(100, probe=False)
        target.succeeded(100)
    assert target.admit(100) == SERVING


def test_the_rate_is_met_exactly() -> None:
    target = Target()
    for _ in range(5):
        target.succeeded(100)
    for _ in range(4):
        target.failed(100, probe=False)
    assert target.admit(100) == SERVING
    target.failed(100, probe=False)  # five of ten
    assert target.admit(100) == REFUSED


def test_failures_out_of_the_window_do_not_count() -> None:
    target = failing(100, RULES.failures - 1)
    target.failed(100 + RULES.window_seconds, probe=False)
    assert target.admit(110) == SERVING


def test_successes_out_of_the_window_do_not_hide_an_outage() -> None:
    target = Target()
    for _ in range(100_000):
        target.succeeded(100)
    for number in range(RULES.failures):
        target.failed(110 + number / 100, probe=False)
    assert target.admit(111) == REFUSED


@pytest.mark.parametrize("seconds_between", [0.5, 1.0, 1.2])
def test_a_window_slides(seconds_between: float) -> None:
    """Failures that come steadily, at least four in half a window, are seen wherever it turns."""
    target = Target()
    for number in range(8):
        target.failed(100 + number * seconds_between, probe=False)
    assert target.cooling


def test_one_probe_is_let_through_when_the_time_is_up() -> None:
    target = failing(100)
    assert [target.admit(101.9), target.admit(102), target.admit(102), target.admit(500)] == [
        *(REFUSED, PROBE, REFUSED, REFUSED)
    ]


def test_a_probe_that_succeeds_ends_it() -> None:
    target = failing(100)
    assert target.admit(102) == PROBE
    target.recovered(102.5)
    assert target.admit(102.5) == SERVING and target.told == [2, 0]
    target.failed(102.6, probe=False)  # its record begins anew
    assert target.admit(102.6) == SERVING


def test_a_probe_that_fails_doubles_it_up_to_the_bound() -> None:
    target = failing(100)
    while len(target.told) < 7:
        assert target.admit(target.until - 0.001) == REFUSED
        assert target.admit(target.until) == PROBE
        target.failed(target.until, probe=True)
    assert target.told == [2, 4, 8, 16, 30, 30, 30]


def test_a_probe_that_tells_nothing_makes_way_for_the_next() -> None:
    target = failing(100)
    assert target.admit(102) == PROBE
    target.forgone()
    assert [target.admit(102), target.admit(102)] == [PROBE, REFUSED]


def test_failures_of_others_do_not_prolong_it() -> None:
    target = failing(100)
    for _ in range(50):
        target.failed(101, probe=False)
    assert (target.until, target.told) == (102, [2])


def test_a_late_success_of_an_older_attempt_does_not_end_it() -> None:
    target = failing(100)
    target.succeeded(101)
    assert target.admit(101) == REFUSED


@pytest.mark.parametrize(("after", "seconds"), [(1, 4), (9.9, 4), (10.1, 2)])
def test_a_relapse_goes_on_doubling(after: float, seconds: float) -> None:
    target = failing(100)
    assert target.admit(102) == PROBE
    target.recovered(102)
    for _ in range(RULES.failures):
        target.failed(102 + after, probe=False)
    assert target.told == [2, 0, seconds]


def test_a_provider_is_obeyed_at_once_and_within_the_bound() -> None:
    target = Target()
    target.failed(100, probe=False, stay_away_seconds=7)
    assert (target.until, target.told) == (107, [7])
    target.failed(101, probe=False, stay_away_seconds=20)  # of one that was under way
    assert target.until == 121
    target.failed(102, probe=False, stay_away_seconds=3)
    assert target.until == 121
    target.failed(103, probe=False, stay_away_seconds=3600)
    assert target.until == 103 + RULES.limit_seconds


def test_a_short_wait_does_not_shorten_a_cool_down() -> None:
    target = failing(100)
    assert target.admit(102) == PROBE
    target.failed(102, probe=True, stay_away_seconds=1)
    assert target.told == [2, 4]


@pytest.mark.parametrize("seed", range(40))
def test_any_history_keeps_its_promises(seed: int) -> None:
    """At most one probe at a time; never passed over for longer than the bound; what is told
    matches the state; without a failure nothing cools."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    target, now, probes, ordinary = Target(), 1000.0, 0, 0
    for _ in range(3000):
        now += chance.choice([0, 0.01, 0.3, 2, 15])
        was_cooling = target.cooling
        step = chance.random()
        if step < 0.5:
            footing = target.admit(now)
            assert footing != PROBE or (not probes and now >= target.until)
            assert (footing == SERVING) == (not target.cooling)
            probes += footing == PROBE
            ordinary += footing == SERVING
        elif step < 0.7 and ordinary:
            ordinary -= 1
            target.succeeded(now)
            assert target.cooling == was_cooling
        elif step < 0.9 and ordinary:
            ordinary -= 1
            stay_away = chance.choice([0, 0, 0, 5, 1000])
            target.failed(now, probe=False, stay_away_seconds=stay_away)
            assert target.cooling or not was_cooling
        elif probes:
            probes -= 1
            ending = chance.randrange(3)
            if ending == 0:
                target.recovered(now)
            elif ending == 1:
                target.failed(now, probe=True, stay_away_seconds=chance.choice([0, 9]))
            else:
                target.forgone()
            assert target.cooling == (ending != 0)
        assert target.until <= now + RULES.limit_seconds
        assert target.cooling == bool(target.told and target.told[-1])
