"""Micro-credits, exact decimals in and out, and the one rounding rule.

1 credit = $0.01 = 1,000,000 µcr. Every amount is an int; floats never touch money.
"""

import re
from decimal import Context, Decimal, Inexact, InvalidOperation

UCR_PER_CREDIT = 1_000_000
UCR_PER_USD = 100_000_000
MAX_UCR = 9_000_000_000_000_000  # below 2**53, so that a Lua double holds it exactly
_CREDIT_PLACES = 6
_USD_PLACES = 8
_PLACES = {_CREDIT_PLACES: "%d.%06d", _USD_PLACES: "%d.%08d"}
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_EXACT = Context(prec=40, traps=[Inexact, InvalidOperation])  # a lost digit is an error


class MoneyError(ValueError):
    """Not an exact, finite, representable amount; the text says why."""


def ceil_div(amount: int, divisor: int) -> int:
    """The one rounding rule: up, once per request."""
    return -(-amount // divisor)


def format_credits(ucr: int) -> str:
    """µcr as credits: exact, at most six places, no exponent: `2`, `0.012345`."""
    return _format(ucr, _CREDIT_PLACES)


def format_usd(ucr: int) -> str:
    """µcr as US dollars: exact, at most eight places: `19.99999877`."""
    return _format(ucr, _USD_PLACES)


def _format(ucr: int, places: int) -> str:
    if ucr < 0:
        return "-" + _format(-ucr, places)
    whole, part = divmod(ucr, 10**places)
    if not part:
        return str(whole)
    return (_PLACES[places] % (whole, part)).rstrip("0")


def parse_credits(text: str | int | Decimal) -> int:
    """Credits (exact decimal, at most six places, not negative) to µcr. Raises MoneyError."""
    return _parse(text, _CREDIT_PLACES)


def parse_usd(text: str | int | Decimal) -> int:
    """US dollars (exact decimal, at most eight places, not negative) to µcr."""
    return _parse(text, _USD_PLACES)


def _parse(text: str | int | Decimal, places: int) -> int:
    if isinstance(text, bool) or not isinstance(text, (str, int, Decimal)):
        raise MoneyError("expected an exact decimal, not a float or flag")
    if isinstance(text, str) and not _DECIMAL.fullmatch(text):
        raise MoneyError("not a decimal number")
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise MoneyError("not a decimal number") from None
    if not amount.is_finite():
        raise MoneyError("not a finite number")
    if amount < 0:
        raise MoneyError("must not be negative")
    if amount > Decimal(MAX_UCR).scaleb(-places):
        raise MoneyError("too large")
    try:
        exact = amount.quantize(Decimal(1).scaleb(-places), context=_EXACT)
    except Inexact:
        raise MoneyError(f"more than {places} decimal places") from None
    return int(exact.scaleb(places))
