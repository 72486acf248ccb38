"""Micro-credits: exact both ways, one rounding rule, and everything inexact refused."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from accounting.contract.money import (
    MAX_UCR,
    UCR_PER_CREDIT,
    UCR_PER_USD,
    MoneyError,
    ceil_div,
    format_credits,
    format_usd,
    parse_credits,
    parse_usd,
)

AMOUNTS = st.integers(0, MAX_UCR)


def test_a_credit_is_a_cent() -> None:
    assert UCR_PER_USD == 100 * UCR_PER_CREDIT == 100_000_000
    assert parse_usd("0.01") == parse_credits("1") == UCR_PER_CREDIT


def test_the_largest_amount_is_exact_in_a_double() -> None:
    assert MAX_UCR < 2**53
    assert int(float(MAX_UCR)) == MAX_UCR


@pytest.mark.parametrize(
    ("ucr", "credits", "usd"),
    [
        (0, "0", "0"),
        (1, "0.000001", "0.00000001"),
        (10, "0.00001", "0.0000001"),
        (12_345, "0.012345", "0.00012345"),
        (2_000_000, "2", "0.02"),
        (4_999_999_877, "4999.999877", "49.99999877"),
        (100_000_000, "100", "1"),
        (120_000_000, "120", "1.2"),
        (MAX_UCR, "9000000000", "90000000"),
        (MAX_UCR - 1, "8999999999.999999", "89999999.99999999"),
        (-1, "-0.000001", "-0.00000001"),
        (-150_000_000, "-150", "-1.5"),
    ],
)
def test_amounts_are_written_exactly(ucr: int, credits: str, usd: str) -> None:
    assert format_credits(ucr) == credits
    assert format_usd(ucr) == usd


@given(AMOUNTS)
@example(MAX_UCR)
def test_what_is_written_reads_back(ucr: int) -> None:
    assert parse_credits(format_credits(ucr)) == ucr
    assert parse_usd(format_usd(ucr)) == ucr


@given(st.integers(-MAX_UCR, MAX_UCR))
def test_writing_uses_no_exponent_and_no_idle_zero(ucr: int) -> None:
    for text, places in ((format_credits(ucr), 6), (format_usd(ucr), 8)):
        whole, _, part = text.removeprefix("-").partition(".")
        assert whole.isdigit()
        assert whole == "0" or not whole.startswith("0")
        assert len(part) <= places and not part.endswith("0")
        assert Decimal(text) * 10**places == ucr


@given(st.decimals(min_value=0, max_value=90_000_000, places=8))
def test_dollars_with_eight_places_are_exact(amount: Decimal) -> None:
    assert parse_usd(amount) == parse_usd(str(amount)) == int(Fraction(amount) * UCR_PER_USD)


@given(st.integers(0, 9_000_000_000))
def test_whole_credits_need_no_text(credits: int) -> None:
    assert parse_credits(credits) == credits * UCR_PER_CREDIT


def test_idle_zeros_and_exponents_are_no_extra_precision() -> None:
    assert parse_credits("1.500000000000") == 1_500_000
    assert parse_credits(Decimal("15E-1")) == 1_500_000
    assert parse_credits("007") == 7_000_000
    assert parse_usd("1e1") == 10 * UCR_PER_USD
    assert parse_usd(Decimal("-0")) == 0
    assert parse_usd("0." + "0" * 60) == 0


@pytest.mark.parametrize("parse", [parse_credits, parse_usd])
@pytest.mark.parametrize(
    "amount",
    [
        "", " ", "abc", "1,5", "1.2.3", "0x10", "1 000", "--1", "1_5", " 1", "1\n", "٣", "1²",
        "nan", "NaN", "sNaN", "inf", "-Infinity", Decimal("NaN"), Decimal("sNaN"), Decimal("Inf"),
        "-1", -1, "-0.000001", Decimal("-1"),
        True, False, 1.0, 0.1, float("nan"), None, b"1", [], {"amount": 1},
        "90000000000", 10**30, "1e999999", "1e999999999999999999", Decimal("1e400"),
        "0.000000001", "1e-999999", "1e-999999999999999999", "1.0000000000000001",
        "1." + "0" * 40 + "1", Decimal("1." + "0" * 40 + "1"), "0.99999999" + "9" * 30,
    ],
    ids=repr,
)  # fmt: skip
def test_inexact_negative_or_foreign_amounts_are_refused(parse: Any, amount: Any) -> None:
    with pytest.raises(MoneyError):
        parse(amount)


def test_the_refusal_says_why() -> None:
    for amount, why in [
        (1.5, "float"),
        (True, "flag"),
        ("x", "not a decimal"),
        ("-1", "negative"),
        ("0.0000001", "more than 6 decimal places"),
        ("9000000001", "too large"),
        (Decimal("Infinity"), "finite"),
    ]:
        with pytest.raises(MoneyError, match=why):
            parse_credits(amount)  # type: ignore[arg-type]


def test_the_largest_amount_is_the_last() -> None:
    assert parse_credits("9000000000") == parse_usd("90000000") == MAX_UCR
    with pytest.raises(MoneyError, match="too large"):
        parse_credits("9000000000.000001")
    with pytest.raises(MoneyError, match="too large"):
        parse_usd("90000000.00000001")


@given(st.integers(0, 10**30), st.integers(1, 10**12))
@example(0, 1)
@example(10**6, 10**6)
@example(10**6 + 1, 10**6)
def test_rounding_is_up_and_by_less_than_one(amount: int, divisor: int) -> None:
    rounded = ceil_div(amount, divisor)
    assert 0 <= rounded * divisor - amount < divisor


@given(st.lists(st.integers(0, 10**18), max_size=10))
def test_rounding_once_never_exceeds_rounding_each(amounts: list[int]) -> None:
    assert ceil_div(sum(amounts), 10**6) <= sum(ceil_div(amount, 10**6) for amount in amounts)
