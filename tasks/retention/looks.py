"""How policies look in charts, in which order they stand, and which of many settings a chart shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tasks.report import charts
from tasks.report.charts import Key
from tasks.report.text import integer, listed
from tasks.report.vocabulary import Row
from tasks.retention import claims
from tasks.retention.claims import Setting

LOOKS = {
    "full": (charts.INK, "circle", charts.SOLID),
    "window": (charts.SKY, "square", charts.DOTTED),
    "streaming": (charts.SKY, "triangle-up", charts.DASHED),
    "random": (charts.GREEN, "diamond", charts.DOTTED),
    "h2o": (charts.ORANGE, "triangle-down", charts.DASHED),
    "snapkv": (charts.ORANGE, "cross", charts.DASHDOT),
    "tova": (charts.ORANGE, "square", charts.DOTTED),
    "function": (charts.FUNCTION, "triangle-up", charts.DOTTED),
    "content": (charts.CONTENT, "circle", charts.DOTTED),
    "str": (charts.PURPLE, "circle", charts.SOLID),
    "cmp": (charts.PURPLE, "diamond", charts.DASHED),
}
"""Colour, marker and line of each policy; one of `retention.options` looks as the one that its name begins with, in
green."""

Place = tuple[Setting, float]
"""A setting and a budget."""

FAR = 3
"""A policy is not drawn if all of it lies so many times as far as the farthest of the others."""


def policy_key(found: Sequence[Row]) -> Key:
    """The look of the policies that some rows are of."""
    looks = {}
    for place, name in enumerate(dict.fromkeys(row["policy"] for row in found)):
        colour, shape, dash = LOOKS.get(
            claims.family(name),
            (charts.COLOURS[place % 6], charts.SHAPES[place % 7], charts.DASHES[place % 4]),
        )
        looks[name] = charts.Look(colour if name in LOOKS else charts.GREEN, shape, dash)
    return Key(field="policy", looks=looks)


def in_order(found: list[Row]) -> list[Row]:
    """Rows by policy, as `LOOKS` has them; those of one policy stay as they are."""
    order = {name: place for place, name in enumerate(LOOKS)}
    return sorted(found, key=lambda row: (order.get(claims.family(row["policy"]), len(order)), row["policy"]))


def setting_of(row: Row) -> Setting:
    """Protocol and length of a row."""
    return row["protocol"], row["length"]


def settings_of(found: Sequence[Row]) -> list[Setting]:
    """All of some rows, by length, streamed first."""
    return sorted(
        {setting_of(row) for row in found}, key=lambda setting: (setting[1], setting[0] != "stream")
    )


def setting_told(setting: Setting) -> str:
    """As titles and sentences say it."""
    return f"{setting[0]}, {integer(setting[1])} tokens"


def place_of(found: Sequence[Row]) -> Place:
    """The setting that most policies were read in, streamed before prefilled, long before short; its middle budget."""
    policies = Counter(setting for setting, _ in {(setting_of(row), row["policy"]) for row in found})
    setting = max(policies, key=lambda of: (policies[of], of[0] == "stream", of[1]))
    return setting, middle_budget([row for row in found if setting_of(row) == setting])


def middle_budget(found: Sequence[Row]) -> float:
    """The middle one of the budgets that most policies have."""
    policies = Counter(budget for budget, _ in {(row["budget"], row["policy"]) for row in found})
    most = max(policies.values())
    budgets = sorted(budget for budget, n in policies.items() if n == most)
    return float(budgets[len(budgets) // 2])


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def without_far(found: Sequence[Row], field: str, least: float = 0) -> tuple[list[Row], list[str]]:
    """The rows but those of a policy that would press all others together, and the policies that were left out.

    Args:
        found: Rows of several policies.
        field: What is drawn.
        least: The best that it can be.
    """
    ends = {
        policy: (min(values), max(values))
        for policy in dict.fromkeys(row["policy"] for row in found)
        if (values := [row[field] - least for row in found if row["policy"] == policy])
    }
    far = [
        policy
        for policy, (lowest, _) in ends.items()
        if (others := [highest for name, (_, highest) in ends.items() if name != policy])
        and lowest > FAR * max(others) > 0
    ]
    return [row for row in found if row["policy"] not in far], far


def far_told(far: Sequence[str]) -> str:
    """What a caption says of the policies that were left out."""
    return f"Not drawn, for it lies far above the others: {listed(far)}." if far else ""
