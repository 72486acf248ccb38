"""What usage costs: golden vectors per provider shape, and the bound every hold relies on."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accounting.contract.money import MAX_UCR, ceil_div
from accounting.contract.pricing import MILLION, Price, Rates, cost_ucr, worst_case_ucr
from accounting.contract.usage_event import TokenUsage

CREDIT = 1_000_000  # per million tokens this is one µcr per token


def flat(
    input: int,
    output: int,
    *,
    cached: int | None = None,
    write: int | None = None,
    audio_in: int | None = None,
    audio_out: int | None = None,
) -> Rates:
    """Rates in credits per million tokens = µcr per token; the rest as the catalogue fills it."""
    return Rates(
        input=input * CREDIT,
        output=output * CREDIT,
        cached_input=(input if cached is None else cached) * CREDIT,
        cache_write=(input if write is None else write) * CREDIT,
        audio_input=(input if audio_in is None else audio_in) * CREDIT,
        audio_output=(output if audio_out is None else audio_out) * CREDIT,
    )


PLAIN = Price(flat(15, 60), 0, None, "v1")
CACHED = Price(flat(250, 1000, cached=125), 0, None, "v1")
WRITTEN = Price(flat(300, 1500, cached=30, write=375), 0, None, "v1")
AUDIO = Price(flat(250, 1000, audio_in=4000, audio_out=8000), 0, None, "v1")
LONG = Price(flat(125, 1000, cached=31), 200_000, flat(250, 1500, cached=62), "v1")


@pytest.mark.parametrize(
    ("price", "usage", "ucr"),
    [
        # plain chat: 19 in, 10 out
        (PLAIN, TokenUsage(19, 10), 19 * 15 + 10 * 60),
        # OpenAI: prompt_tokens 2006 of which cached_tokens 1920
        (CACHED, TokenUsage(2006, 300, cached_input=1920), 86 * 250 + 1920 * 125 + 300 * 1000),
        # everything cached
        (CACHED, TokenUsage(1000, 0, cached_input=1000), 1000 * 125),
        # Anthropic, normalised: input 21, cache write 188086, cache read 1000
        (
            WRITTEN,
            TokenUsage(21 + 188_086 + 1000, 393, cached_input=1000, cache_write=188_086),
            21 * 300 + 188_086 * 375 + 1000 * 30 + 393 * 1500,
        ),
        # reasoning inside the output (OpenAI: completion_tokens 1700, reasoning_tokens 1600)
        (PLAIN, TokenUsage(50, 1700, reasoning=1600), 50 * 15 + 1700 * 60),
        # reasoning beside the output (xAI: completion 100 + reasoning 1600), normalised to a part
        (PLAIN, TokenUsage(50, 100 + 1600, reasoning=1600), 50 * 15 + 1700 * 60),
        # audio both ways: 100 of 140 in, 80 of 90 out
        (
            AUDIO,
            TokenUsage(140, 90, audio_input=100, audio_output=80),
            40 * 250 + 100 * 4000 + 10 * 1000 + 80 * 8000,
        ),
        # Gemini at its threshold and one token above it: the whole request changes tier
        (LONG, TokenUsage(200_000, 10), 200_000 * 125 + 10 * 1000),
        (LONG, TokenUsage(200_001, 10), 200_001 * 250 + 10 * 1500),
        (
            LONG,
            TokenUsage(300_000, 10, cached_input=250_000),
            50_000 * 250 + 250_000 * 62 + 10 * 1500,
        ),
    ],
)
def test_golden_vectors(price: Price, usage: TokenUsage, ucr: int) -> None:
    assert cost_ucr(price, usage) == ucr


@pytest.mark.parametrize("price", [PLAIN, CACHED, WRITTEN, AUDIO, LONG])
def test_zero_usage_costs_nothing(price: Price) -> None:
    assert cost_ucr(price, TokenUsage()) == 0
    assert worst_case_ucr(price, 0, 0, True) == 0


def test_a_part_of_a_micro_credit_costs_a_whole_one() -> None:
    price = Price(Rates(1, 1, 1, 1, 1, 1), 0, None, "v1")
    assert cost_ucr(price, TokenUsage(input=1)) == 1
    assert cost_ucr(price, TokenUsage(output=MILLION)) == 1
    assert cost_ucr(price, TokenUsage(output=MILLION + 1)) == 2


def test_rounding_happens_once_for_the_whole_request() -> None:
    price = Price(Rates(1, 1, 1, 1, 1, 1), 0, None, "v1")
    usage = TokenUsage(4, 2, cached_input=1, cache_write=1, audio_input=1, audio_output=1)
    assert cost_ucr(price, usage) == 1
    third = Price(Rates(333_333, 333_333, 333_333, 333_333, 333_333, 333_333), 0, None, "v1")
    assert cost_ucr(third, TokenUsage(2, 1, cached_input=1, audio_output=1)) == 1


def test_reasoning_is_never_charged_beside_the_output() -> None:
    with_it = cost_ucr(PLAIN, TokenUsage(10, 100, reasoning=90))
    assert with_it == cost_ucr(PLAIN, TokenUsage(10, 100))


def test_the_worst_case_knows_the_dearer_tier() -> None:
    assert worst_case_ucr(LONG, 200_000, 1, False) == 200_000 * 125 + 1000
    assert worst_case_ucr(LONG, 200_001, 1, False) == 200_001 * 250 + 1500


def test_a_cheaper_long_tier_does_not_lower_the_worst_case() -> None:
    price = Price(flat(100, 200), 1000, flat(1, 2), "v1")
    assert worst_case_ucr(price, 1001, 1, False) == 1001 * 100 + 200
    assert cost_ucr(price, TokenUsage(1000, 1)) <= worst_case_ucr(price, 1001, 1, False)


def test_the_worst_case_counts_audio_only_where_it_can_occur() -> None:
    assert worst_case_ucr(AUDIO, 10, 10, False) == 10 * 250 + 10 * 1000
    assert worst_case_ucr(AUDIO, 10, 10, True) == 10 * 4000 + 10 * 8000


def test_the_worst_case_covers_writing_the_cache() -> None:
    assert worst_case_ucr(WRITTEN, 10, 0, False) == 10 * 375


def test_parts_that_overlap_are_never_charged_twice() -> None:
    """Cached audio may be counted both as cached and as audio: 100 tokens stay 100 tokens."""
    price = Price(flat(250, 1000, cached=125, audio_in=4000), 0, None, "v1")
    usage = TokenUsage(100, 0, cached_input=100, audio_input=100)
    assert cost_ucr(price, usage) <= worst_case_ucr(price, 100, 0, True) == 400_000
    same = Price(flat(10, 10), 0, None, "v1")
    assert cost_ucr(same, usage) == 1000
    assert cost_ucr(same, TokenUsage(0, 5, audio_output=9)) == 50


RATE = st.integers(1, 10**10)
RATES = st.builds(Rates, RATE, RATE, RATE, RATE, RATE, RATE)
TOKENS = st.integers(0, 2_000_000)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    long = draw(st.none() | RATES)
    return Price(draw(RATES), draw(TOKENS) if long else 0, long, "v1")


@st.composite
def usages(draw: st.DrawFn) -> TokenUsage:
    """Any counts a provider may report, parts larger than their whole included."""
    return draw(st.builds(TokenUsage, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS))


@given(prices(), usages(), TOKENS, TOKENS)
@example(LONG, TokenUsage(200_000, 1), 1, 0)
def test_no_usage_within_its_bounds_costs_more_than_the_hold(
    price: Price, usage: TokenUsage, spare_input: int, spare_output: int
) -> None:
    hold = worst_case_ucr(price, usage.input + spare_input, usage.output + spare_output, True)
    assert 0 <= cost_ucr(price, usage) <= hold


@given(prices(), TOKENS, TOKENS, TOKENS, TOKENS)
def test_without_audio_the_smaller_hold_is_enough(
    price: Price, input: int, output: int, cached: int, write: int
) -> None:
    usage = TokenUsage(input, output, cached_input=cached, cache_write=write)
    assert cost_ucr(price, usage) <= worst_case_ucr(price, input, output, False)


@given(RATES, st.lists(st.integers(0, 100_000), min_size=4, max_size=4), TOKENS, TOKENS)
def test_cost_is_the_exact_sum_rounded_up(
    rates: Rates, parts: list[int], output: int, audio_output: int
) -> None:
    plain, cached, write, audio = parts
    usage = TokenUsage(
        input=sum(parts),
        output=output + audio_output,
        cached_input=cached,
        cache_write=write,
        audio_input=audio,
        audio_output=audio_output,
    )
    exact = Fraction(
        plain * rates.input
        + cached * rates.cached_input
        + write * rates.cache_write
        + audio * rates.audio_input
        + output * rates.output
        + audio_output * rates.audio_output,
        MILLION,
    )
    cost = cost_ucr(Price(rates, 0, None, "v1"), usage)
    assert exact <= cost < exact + 1


@given(prices(), TOKENS, TOKENS, st.booleans())
def test_the_worst_case_rises_with_its_bounds(
    price: Price, input: int, output: int, audio: bool
) -> None:
    hold = worst_case_ucr(price, input, output, audio)
    assert hold <= worst_case_ucr(price, input + 1, output, audio)
    assert hold <= worst_case_ucr(price, input, output + 1, audio)
    assert hold <= worst_case_ucr(price, input, output, True)


def test_figures_beyond_a_double_stay_exact() -> None:
    price = Price(Rates(MAX_UCR, 1, 1, 1, 1, 1), 0, None, "v1")
    assert cost_ucr(price, TokenUsage(MILLION + 1)) == ceil_div(MAX_UCR * (MILLION + 1), MILLION)
