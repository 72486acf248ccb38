"""What usage costs, and the most it can cost: pure functions of price and tokens.

Prices are integer µcr per million tokens. One `ceil` per request, so that a charge is
never a fraction of a µcr and never rounded twice.
"""

from msgspec import Struct

from accounting.contract.money import ceil_div
from accounting.contract.usage_event import TokenUsage

MILLION = 1_000_000


class Rates(Struct, frozen=True):
    """µcr per million tokens of each meter."""

    input: int
    output: int
    cached_input: int
    cache_write: int
    audio_input: int
    audio_output: int


class Price(Struct, frozen=True):
    """A model's rates; `long` replaces `base` when the input exceeds `long_above` tokens."""

    base: Rates
    long_above: int
    long: Rates | None
    version: str


def cost_ucr(price: Price, usage: TokenUsage) -> int:
    """The exact price of `usage` in µcr, rounded up once; zero usage costs nothing."""
    rates = price.base
    if price.long is not None and usage.input > price.long_above:
        rates = price.long
    if not (usage.cached_input or usage.cache_write or usage.audio_input or usage.audio_output):
        return ceil_div(usage.input * rates.input + usage.output * rates.output, MILLION)
    # A token counted on two meters (cached audio) is charged on the first; so a charge can
    # never exceed the worst case of `input` and `output`, whatever parts a provider reports.
    cached = min(usage.cached_input, usage.input)
    written = min(usage.cache_write, usage.input - cached)
    audio_in = min(usage.audio_input, usage.input - cached - written)
    audio_out = min(usage.audio_output, usage.output)
    return ceil_div(
        (usage.input - cached - written - audio_in) * rates.input
        + cached * rates.cached_input
        + written * rates.cache_write
        + audio_in * rates.audio_input
        + (usage.output - audio_out) * rates.output
        + audio_out * rates.audio_output,
        MILLION,
    )


def worst_case_ucr(price: Price, input_tokens: int, output_tokens: int, audio: bool) -> int:
    """The most that at most so many tokens can cost: the hold of a request, in µcr."""
    dearest = _dearest(price.base, input_tokens, output_tokens, audio)
    if price.long is not None and input_tokens > price.long_above:
        dearest = max(dearest, _dearest(price.long, input_tokens, output_tokens, audio))
    return ceil_div(dearest, MILLION)


def _dearest(rates: Rates, input_tokens: int, output_tokens: int, audio: bool) -> int:
    input_rate = max(rates.input, rates.cached_input, rates.cache_write)
    output_rate = rates.output
    if audio:
        input_rate = max(input_rate, rates.audio_input)
        output_rate = max(output_rate, rates.audio_output)
    return input_tokens * input_rate + output_tokens * output_rate
