"""Tokens and numbers as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.models.token_texts import OPEN_BOX, label, shared_texts, visible

__all__ = ["label", "shared_texts", "visible"]

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


def integer(value: float | None) -> str:
    """Thousands separated by commas; a dash for what is not there."""
    return "–" if value is None else f"{round(value):,}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; a dash for what is not there."""
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with a real minus sign; a dash for what is not there."""
    return "–" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 2) -> str:
    """A share as a percentage; a dash for what is not there."""
    return "–" if share is None or share != share else f"{100 * share:.{digits}f} %"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
