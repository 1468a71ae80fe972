"""Numbers as text, rounded to what their standard error supports."""

from __future__ import annotations

import math

SMALL = 1e-4  # below this, powers of ten read better than leading zeros
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def bits(value: float | None) -> str:
    """Two decimals: 4.50."""
    return "" if value is None else f"{value:.2f}"


def significant(value: float, digits: int = 3) -> str:
    """Round to significant digits, with a power of ten for small values.

    >>> significant(0.012345), significant(0.0000123)
    ('0.0123', '1.23×10⁻⁵')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < SMALL:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}{power_of_ten(int(exponent))}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def power_of_ten(exponent: int) -> str:
    """Write ×10⁻⁵."""
    return "×10" + str(exponent).translate(SUPERSCRIPTS)


def short(value: float) -> str:
    """Fit a cell of a heat map: four characters, five below zero.

    >>> short(0.0312), short(0.00034), short(2.24)
    ('0.03', '3e-4', '2.2')
    """
    if abs(value) >= 1:
        return f"{value:.1f}"
    if abs(value) >= 0.01 or value == 0:
        return f"{value:.2f}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def with_error(value: float, error: float) -> str:
    """Round value and standard error to the error's leading digit, two digits after a 1.

    >>> with_error(0.012345, 0.00067), with_error(0.012345, 0.00013), with_error(2e-6, 3e-7)
    ('0.0123 ± 0.0007', '0.01235 ± 0.00013', '(2.0 ± 0.3)×10⁻⁶')
    """
    if not (error > 0 and math.isfinite(error)):
        return significant(value)
    largest = max(abs(value), error)
    if largest < SMALL:
        power = math.floor(math.log10(largest))
        return f"({_rounded(value / 10.0**power, error / 10.0**power)}){power_of_ten(power)}"
    return _rounded(value, error)


def _rounded(value: float, error: float) -> str:
    power = math.floor(math.log10(error))
    decimals = max(0, -power + (error < 2 * 10.0**power))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def percent(value: float, digits: int = 1) -> str:
    """Write a share as percent.

    >>> percent(0.9375)
    '93.8 %'
    """
    return f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Write a difference of shares as signed percentage points, with a true minus.

    >>> points(-0.012)
    '−1.2'
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def count(value: int) -> str:
    """Group digits by thin spaces.

    >>> count(16384) == "16\\u202f384"
    True
    """
    return f"{value:,}".replace(",", "\u202f")


def size(num_bytes: float) -> str:
    """Write bytes in decimal units.

    >>> size(2_500_000)
    '2.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def ratio(value: float | None) -> str:
    """Two decimals, and the bound where those would say nothing.

    >>> ratio(0.518), ratio(0.0004), ratio(None)
    ('0.52', '< 0.01', '')
    """
    if value is None:
        return ""
    return "< 0.01" if 0 < value < 0.005 else f"{value:.2f}"


def signed(value: float, digits: int = 2) -> str:
    """Write a difference with its sign, a true minus.

    >>> signed(-0.01234), signed(0.5), signed(0.0)
    ('−0.012', '+0.50', '0')
    """
    if value == 0:
        return "0"
    return f"{'−' if value < 0 else '+'}{significant(abs(value), digits)}"


def signed_with_error(value: float, error: float) -> str:
    """Write a difference and its standard error, with a sign and a true minus.

    >>> signed_with_error(-0.01234, 0.0016), signed_with_error(9.1e-5, 1.2e-5)
    ('−0.0123 ± 0.0016', '+(9.1 ± 1.2)×10⁻⁵')
    """
    if value == 0 and error == 0:
        return "0"
    return f"{'−' if value < 0 else '+'}{with_error(abs(value), error)}"
