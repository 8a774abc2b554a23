"""Tokens and numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from tasks.models.token_texts import OPEN_BOX, visible

DASH = "–"
"""What is not there."""

LONGEST_TEXT = 2000


def visible_text(text: str | None, longest: int = LONGEST_TEXT) -> str:
    r"""A longer text with nothing hidden in it, yet with its words apart.

    As `visible`, but a space stays a space between two other characters, so that lines can break there; one at an
    end or beside another one is ␣.
    """
    shown = visible(text, longest)
    return re.sub(rf"(?<=[^{OPEN_BOX}]){OPEN_BOX}(?=[^{OPEN_BOX}])", " ", shown)


def quoted(token: str | None) -> str:
    """A visible token between typographic quotes, for sentences and legends."""
    return f"“{visible(token, 24)}”"


def passage(text: str | None, longest: int = LONGEST_TEXT) -> str:
    """A generated text; one that ended before it began says so."""
    return "(ended at once)" if text == "" else visible_text(text, longest)


def plain(value: float | str | None) -> str:
    """An id or a setting as it is, without commas; a dash for what is not there."""
    return DASH if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def integer(value: float | None) -> str:
    """Thousands separated by commas; a dash for what is not there."""
    return DASH if value is None else f"{round(value):,}"


def number(value: float | None, digits: int = 3, *, is_even: bool = False) -> str:
    """So many significant digits; a dash for what is not there.

    Args:
        value: The number.
        digits: How many.
        is_even: Whether zeros at the end are kept, so that numbers below each other have as many digits.
    """
    if value is None or not math.isfinite(value):
        return DASH
    # What rounds to one digit more would be told with an exponent.
    if abs(value) >= 10**digits - 0.5:
        return f"{value:,.0f}"
    return f"{value:#,.{digits}g}".removesuffix(".") if is_even and value else f"{value:,.{digits}g}"


def decimal(value: float | None, digits: int = 2) -> str:
    """So many digits after the point, thousands separated by commas; a dash for what is not there."""
    return DASH if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with a real minus sign; a dash for what is not there."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def change(value: float | None, digits: int = 2) -> str:
    """A number with its sign, plus or minus; a dash for what is not there."""
    return f"+{value:.{digits}f}" if value is not None and value > 0 else signed(value, digits)


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage; a dash for what is not there."""
    return DASH if share is None or not math.isfinite(share) else f"{signed(100 * share, digits)} %"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def layers_told(layers: Sequence[int]) -> str:
    """`layer 3`, `layers 3 and 8`."""
    return f"layer{'s' if len(layers) > 1 else ''} {listed([str(layer) for layer in layers])}"
