"""The paper's four findings on consolidation (PAPER 1.4), each held against this run's numbers.

A claim holds where its 95 % interval lies wholly on the paper's side of zero in every series, differs where it
lies wholly on the other side in any, and is undecided in between.

Intervals are percentiles over resamples of the held-out documents (`tasks.report.bootstrap`). A resample draws whole
documents, the same for every checkpoint, model and token group, so differences are paired: what makes a document hard
for all of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.pretraining.loss_intervals import BUCKETS, HARDEST, TO_CONTENT, TO_FUNCTION
from tasks.report.bootstrap import estimates
from tasks.report.graph import SATURATED
from tasks.report.queries import resamples_of, rows, tables_of, value
from tasks.report.text import integer, listed, number, percent, plural, signed
from tasks.report.vocabulary import SAID, Estimate, Finding, Row, Sign, Verdict, beyond, every, untested

Floats = npt.NDArray[np.float64]
Checkpoints = Sequence[tuple[str, int]]

FEWEST_STEPS = 3
"""Checkpoints that say when a loss fell."""

HARM = 0.05
"""Nats that zeros in place of the activations must cost, for cross-entropy recovered to say something: it is the ratio
of two numbers near zero where they cost less, as in a model that has hardly been trained."""

PAPER_LEARNED = (1_942, 64_042)
PAPER_FINAL = 4.88
QUALITY_KEPT = 0.75
MOST = 0.5

TITLES = (
    "function→content is the hardest",
    "→function falls first",
    "The larger model gains most on →content",
    "Learned features grow, and function tokens activate most of them",
)
_DOUBLINGS = ("doublings of the step ahead of", "doublings of the step behind")

_HARDEST = BUCKETS.index(HARDEST)
_FUNCTION = [BUCKETS.index(bucket) for bucket in TO_FUNCTION]
_CONTENT = [BUCKETS.index(bucket) for bucket in TO_CONTENT]


@dataclass(frozen=True, kw_only=True)
class SeriesRow:
    """One pre-training run.

    Attributes:
        name: The column `model` of the tables.
        parameters: Numbers in its weights, where known.
        source: Where its checkpoints come from.
        steps: Steps of its checkpoints, ascending.
        tokens: Tokens shown by each of them, where known.
    """

    name: str
    parameters: int | None
    source: str
    steps: tuple[int, ...]
    tokens: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Hardest:
    """How far function→content is above the other three groups.

    Attributes:
        series: The series.
        loss: Mean loss of function→content at its last checkpoint.
        next_bucket: The highest of the other three there.
        gap: function→content minus the highest of the other three.
        highest_at: Checkpoints at which it is the highest.
        since: The step from which it is the highest at every checkpoint; None if it is not at the last.
    """

    series: SeriesRow
    loss: float
    next_bucket: str
    gap: Estimate
    highest_at: int
    since: int | None


@dataclass(frozen=True, kw_only=True)
class Halfway:
    """When each group has made half of its fall from the first to the last checkpoint.

    Attributes:
        series: The series.
        steps: Step by group, interpolated linearly in log step; infinite for a group that did not fall, which
            counts as the last step in what follows.
        lead: log2 of the step of →content, pooled, minus that of →function, pooled: in doublings of the step.
        order: The earlier of the two →content groups minus the later of the two →function groups, likewise.
    """

    series: SeriesRow
    steps: dict[str, float]
    lead: Estimate
    order: Estimate


@dataclass(frozen=True, kw_only=True)
class Gains:
    """How much lower the larger model's losses are.

    Attributes:
        small: The smaller model.
        large: The larger one.
        small_step: Its checkpoint that is compared.
        large_step: The other's.
        ground: Why these two checkpoints.
        by_bucket: Mean loss of the smaller minus that of the larger.
        relative: The same over the smaller model's loss.
        order: The lesser gain of the two →content groups minus the greater of the two →function groups.
        lead: Gain of function→content minus the greatest of the other three.
    """

    small: SeriesRow
    large: SeriesRow
    small_step: int
    large_step: int
    ground: str
    by_bucket: dict[str, Estimate]
    relative: dict[str, float]
    order: Estimate
    lead: Estimate


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the paper's findings are tested by.

    Attributes:
        series: The series, from the smallest model to the largest.
        hardest: One a series; None where a group has no prediction.
        halfway: One a series; None where there is nothing to fall.
        gains: The smallest model against the largest, or why there is none.
        learned: The SAEs, by series and step.
        graphs: The checkpoints' graphs, by series and step.
    """

    series: tuple[SeriesRow, ...]
    hardest: tuple[Hardest | None, ...]
    halfway: tuple[Halfway | None, ...]
    gains: Gains | str
    learned: list[dict[str, Any]]
    graphs: list[dict[str, Any]]


def findings(connection: Any) -> list[Finding]:
    """All four, in the paper's order; none where no losses are published."""
    return findings_of(measure(connection)) if has_losses(connection) else []


def findings_of(measured: Measured) -> list[Finding]:
    """All four, in the paper's order."""
    names = [one.name for one in measured.series]
    return [
        is_hardest(names, measured.hardest),
        falls_first(names, measured.halfway),
        larger_gains(measured.series, measured.gains),
        features_grow(measured.series, measured.learned, measured.graphs),
    ]


# What the tables say.


def has_losses(connection: Any) -> bool:
    """Whether this run has checkpoints and their losses."""
    there = tables_of(connection) >= {"checkpoints", "loss_buckets", "document_losses"}
    return there and bool(value(connection, "SELECT count(*) FROM loss_buckets"))


def series_of(connection: Any) -> list[SeriesRow]:
    """The series that have losses, from the smallest model to the largest.

    Where the size of any is not known, they stand as in the table `checkpoints`.
    """
    found: dict[str, list[Row]] = {
        row["model"]: [] for row in rows(connection, "SELECT model FROM checkpoints")
    }
    for row in rows(
        connection, "SELECT * FROM checkpoints SEMI JOIN loss_buckets USING (model, step) ORDER BY step"
    ):
        found[row["model"]].append(row)
    series = [
        SeriesRow(
            name=model,
            parameters=next((row["parameters"] for row in kept if row["parameters"] is not None), None),
            source=kept[-1]["source"],
            steps=tuple(row["step"] for row in kept),
            tokens=tuple(row["tokens"] for row in kept),
        )
        for model, kept in found.items()
        if kept
    ]
    if all(one.parameters is not None for one in series):
        series.sort(key=lambda one: one.parameters or 0)
    return series


def by_series(connection: Any, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have a `model`, in the order of the series and otherwise as they were."""
    order = [series.name for series in series_of(connection)]
    return sorted(found, key=lambda row: order.index(row["model"]))


def learned_rows(connection: Any) -> list[dict[str, Any]]:
    """The table `learned_features`, by series and step.

    Its `ce_recovered` stays as it is; `recovered` is null where it says nothing (`HARM`).
    """
    if "learned_features" not in tables_of(connection):
        return []
    query = (
        f"SELECT *, CASE WHEN ce_zero - ce >= {HARM} THEN ce_recovered END AS recovered FROM learned_features"
    )
    return by_series(connection, rows(connection, f"{query} ORDER BY step"))


def graph_rows(connection: Any) -> list[dict[str, Any]]:
    """The rows of `checkpoint_graph` that have an activated feature, by series and step."""
    if "checkpoint_graph" not in tables_of(connection):
        return []
    query = "SELECT * FROM checkpoint_graph WHERE activated_features > 0 ORDER BY step"
    return by_series(connection, rows(connection, query))


def measure(connection: Any, resamples: int | None = None) -> Measured:
    """Everything that the findings are tested by, where there are losses; resamples are the run's own, or as given."""
    resamples = resamples or resamples_of(connection, "loss")
    series = series_of(connection)
    return Measured(
        series=tuple(series),
        hardest=tuple(hardest(connection, one, resamples) for one in series),
        halfway=tuple(halfway(connection, one, resamples) for one in series),
        gains=_compared(connection, series, resamples),
        learned=learned_rows(connection),
        graphs=graph_rows(connection),
    )


def hardest(connection: Any, series: SeriesRow, resamples: int) -> Hardest | None:
    """How function→content compares with the other groups; None where a group has no prediction."""
    sums = _sums(connection, [(series.name, step) for step in series.steps])
    means = _means(sums.sum(axis=0))
    if not np.isfinite(means).all():
        return None
    is_highest = means.argmax(axis=-1) == _HARDEST
    not_highest = np.flatnonzero(~is_highest)
    since = 0 if not len(not_highest) else int(not_highest[-1]) + 1
    others = np.delete(means[-1], _HARDEST)
    return Hardest(
        series=series,
        loss=float(means[-1, _HARDEST]),
        next_bucket=[bucket for bucket in BUCKETS if bucket != HARDEST][int(others.argmax())],
        gap=estimates(sums[:, -1:], lambda of: _gap(_means(of)[:, 0]), resamples)[0],
        highest_at=int(is_highest.sum()),
        since=series.steps[since] if since < len(series.steps) else None,
    )


def halfway(connection: Any, series: SeriesRow, resamples: int) -> Halfway | None:
    """When each group has made half of its fall; None with too few checkpoints, or a group without a prediction.

    Of two checkpoints, half of the fall would lie in the middle between them, whatever the losses are.
    """
    if len(series.steps) < FEWEST_STEPS:
        return None
    sums = _sums(connection, [(series.name, step) for step in series.steps])
    if not np.isfinite(_means(sums.sum(axis=0))).all():
        return None
    x = log_steps(series.steps)

    def measured(of: Floats) -> Floats:
        pools = np.stack([of[:, :, _FUNCTION].sum(axis=2), of[:, :, _CONTENT].sum(axis=2)], axis=2)
        single, pooled = (np.minimum(half_step(x, _means(part)), x[-1]) for part in (of, pools))
        lead = pooled[:, 1] - pooled[:, 0]
        order = single[:, _CONTENT].min(axis=1) - single[:, _FUNCTION].max(axis=1)
        return np.column_stack([lead, order])

    lead, order = estimates(sums, measured, resamples)
    steps = 2 ** half_step(x, _means(sums.sum(axis=0))[None])[0]
    return Halfway(
        series=series,
        steps=dict(zip(BUCKETS, steps.tolist(), strict=True)),
        lead=lead,
        order=order,
    )


def gains(connection: Any, small: SeriesRow, large: SeriesRow, resamples: int) -> Gains | None:
    """How much lower the larger model's losses are; None where a group has no prediction."""
    small_step, large_step, ground = comparable(small, large)
    sums = _sums(connection, [(small.name, small_step), (large.name, large_step)])
    means = _means(sums.sum(axis=0))
    if not np.isfinite(means).all():
        return None

    def measured(of: Floats) -> Floats:
        both = _means(of)
        gain = both[:, 0] - both[:, 1]
        order = gain[:, _CONTENT].min(axis=1) - gain[:, _FUNCTION].max(axis=1)
        return np.column_stack([gain, order, _gap(gain)[:, 0]])

    *by_bucket, order, lead = estimates(sums, measured, resamples)
    return Gains(
        small=small,
        large=large,
        small_step=small_step,
        large_step=large_step,
        ground=ground,
        by_bucket=dict(zip(BUCKETS, by_bucket, strict=True)),
        relative=dict(zip(BUCKETS, (1 - means[1] / means[0]).tolist(), strict=True)),
        order=order,
        lead=lead,
    )


def _compared(connection: Any, series: Sequence[SeriesRow], resamples: int) -> Gains | str:
    if len(series) < 2:
        return "one series"
    small, large = series[0], series[-1]
    if small.parameters is not None and small.parameters == large.parameters:
        return f"all series have {small.parameters:,} parameters"
    found = gains(connection, small, large, resamples)
    return found or "a token group has no prediction in the held-out documents"


def comparable(small: SeriesRow, large: SeriesRow) -> tuple[int, int, str]:
    """Which checkpoints of two series to compare, and why those.

    The last of each if both were shown as many tokens; else the last step that both have; else the last
    of each, although one may have seen more.
    """
    if small.tokens[-1] is not None and small.tokens[-1] == large.tokens[-1]:
        return (
            small.steps[-1],
            large.steps[-1],
            f"the last checkpoint of each, {small.tokens[-1]:,} tokens into both",
        )
    common = set(small.steps) & set(large.steps)
    if common:
        return max(common), max(common), "the last step that both have"
    return (
        small.steps[-1],
        large.steps[-1],
        "the last checkpoint of each, as they have no step in common: one may have seen more tokens",
    )


def log_steps(steps: Sequence[int]) -> Floats:
    """log2 of each step; a step 0 stands one doubling before the next checkpoint's."""
    first = steps[1] / 2 if steps[0] == 0 else steps[0]
    return np.log2(np.array([first, *steps[1:]], dtype=np.float64))


def half_step(x: Floats, means: Floats) -> Floats:
    """Where curves first are down to the middle between their first and their last value.

    Args:
        x: (checkpoints,) ascending.
        means: (resamples, checkpoints, groups).

    Returns:
        (resamples, groups) in units of `x`, linear between checkpoints; infinite for a curve that ends no
        lower than it begins.
    """
    first, last = means[:, 0], means[:, -1]
    level = (first + last) / 2
    # A curve that falls has its first value above the level, so this is at least 1.
    after = np.maximum((means <= level[:, None]).argmax(axis=1), 1)
    y1 = np.take_along_axis(means, after[:, None], axis=1)[:, 0]
    y0 = np.take_along_axis(means, after[:, None] - 1, axis=1)[:, 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        at = x[after - 1] + (x[after] - x[after - 1]) * (y0 - level) / (y0 - y1)
    return np.where(first <= last, np.inf, at)


def _gap(means: Floats) -> Floats:
    """(resamples, 1) function→content minus the highest of the other groups, of (resamples, groups)."""
    others = np.delete(means, _HARDEST, axis=1)
    gap: Floats = (means[:, _HARDEST] - others.max(axis=1))[:, None]
    return gap


def _means(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Floats = sums[..., 0] / sums[..., 1]
    return means


def _sums(connection: Any, checkpoints: Checkpoints) -> Floats:
    """(documents, checkpoints, groups, 2): summed loss and number of predictions of every held-out document."""
    models, steps = (list(of) for of in zip(*checkpoints, strict=True))
    found = connection.execute(
        """
        WITH wanted AS (SELECT unnest($models) AS model, unnest($steps) AS step, unnest($places) AS checkpoint)
        SELECT doc_id, checkpoint, list_position($buckets, bucket) - 1 AS bucket, loss, n
        FROM document_losses JOIN wanted USING (model, step)
        """,
        {"models": models, "steps": steps, "places": list(range(len(models))), "buckets": list(BUCKETS)},
    ).fetchnumpy()
    _, document = np.unique(found["doc_id"], return_inverse=True)
    sums = np.zeros((int(document.max(initial=-1)) + 1, len(checkpoints), len(BUCKETS), 2))
    sums[document, found["checkpoint"], found["bucket"], 0] = found["loss"]
    sums[document, found["checkpoint"], found["bucket"], 1] = found["n"]
    return sums


# Findings.


def is_hardest(names: Sequence[str], rows: Sequence[Hardest | None]) -> Finding:
    """function→content is above the highest of the others at the last checkpoint of every series, `names`."""
    tested = [row for row in rows if row is not None]
    why = "a token group has no prediction in the held-out documents"
    if not tested:
        return untested(TITLES[0], why)
    left_out = _left_out(names, rows, why)
    verdict = every([row.gap.sign for row in tested] + ["unclear"] * bool(left_out))
    told = [
        f"In {row.series.name}, function→content ends at {signed(row.loss)} nats (step {row.series.steps[-1]:,}), "
        f"{beyond(row.gap)} the highest of the others, {row.next_bucket}, and is the highest at {row.highest_at} of "
        f"{plural(len(row.series.steps), 'checkpoint')}{_since(row)}."
        for row in tested
    ]
    throughout = all(row.highest_at == len(row.series.steps) for row in tested)
    also = ", though not throughout" if verdict == "holds" and not throughout else ""
    return _finding(
        0,
        verdict,
        f"{' '.join(told)}{left_out} That function→content is the hardest at the last checkpoint (in the paper "
        f"throughout, with {PAPER_FINAL} at the end of the 1.5B model) {SAID[verdict]}{also}.",
    )


def falls_first(names: Sequence[str], rows: Sequence[Halfway | None]) -> Finding:
    """Both →function groups have made half of their fall before both →content groups, in all of the series `names`."""
    tested = [row for row in rows if row is not None]
    why = "fewer than three checkpoints, or a token group without predictions"
    if not tested:
        return untested(TITLES[1], f"every series has {why}")
    left_out = _left_out(names, rows, why)
    signs: list[Sign] = [sign for row in tested for sign in (row.lead.sign, row.order.sign)]
    verdict = every(signs + ["unclear"] * bool(left_out))
    told = [
        f"In {row.series.name}, half of the fall from step {row.series.steps[0]:,} to step {row.series.steps[-1]:,} is "
        f"made by step "
        f"{_half_steps(row, TO_FUNCTION)} for →function and {_half_steps(row, TO_CONTENT)} for →content "
        f"(function→ and content→). Pooled, →function is {beyond(row.lead, _DOUBLINGS, 2)} →content; its later "
        f"group is {beyond(row.order, _DOUBLINGS, 2)} the earlier →content group."
        for row in tested
    ]
    return _finding(
        1,
        verdict,
        f"{' '.join(told)}{left_out} That →function falls first (both groups before both →content groups) "
        f"{SAID[verdict]}.",
    )


def larger_gains(series: Sequence[SeriesRow], compared: Gains | str) -> Finding:
    """Both →content groups gain more than both →function groups, and function→content the most."""
    if isinstance(compared, str):
        return untested(TITLES[2], compared)
    gain = compared.by_bucket
    verdict = every([gain[HARDEST].sign, compared.order.sign, compared.lead.sign])
    ranked = sorted(BUCKETS, key=lambda bucket: -gain[bucket].value)
    told = [f"{bucket} {beyond(gain[bucket], ('lower', 'higher'))}" for bucket in ranked]
    among = f" (the smallest and the largest of {len(series)} series)" if len(series) > 2 else ""
    relative = max(BUCKETS, key=lambda bucket: compared.relative[bucket])
    share = compared.relative[relative]
    most = f"{relative} falls most, by {percent(share, 1)}" if share > 0 else "none falls"
    return _finding(
        2,
        verdict,
        f"From {_sized(compared.small)} to {_sized(compared.large)}{among}, at {_places(compared)} "
        f"({compared.ground}), losses end, in nats: {listed(told)}; relative to the loss, {most}. "
        f"The lesser gain of →content is {beyond(compared.order)} the "
        f"greater one of →function, function→content’s {beyond(compared.lead)} the greatest of the others. That the "
        f"larger model gains most on →content, above all function→content, {SAID[verdict]}.",
    )


def features_grow(series: Sequence[SeriesRow], learned: Sequence[Row], graphs: Sequence[Row]) -> Finding:
    """More learned features at the end with an SAE about as good, most of them by function tokens, ever more."""
    if not learned or not graphs:
        return untested(TITLES[3], "this run has no SAE series (consolidation.growth)")
    claims: list[tuple[Sign, str]] = []
    for one in series:
        claims.append(_growth(one.name, [row for row in learned if row["model"] == one.name]))
        claims.append(_coverage([row for row in graphs if row["model"] == one.name]))
    grows, covers = (every(sign for sign, _ in claims[part::2]) for part in (0, 1))
    first, last = PAPER_LEARNED
    verdict = every(sign for sign, _ in claims)
    return _finding(
        3,
        verdict,
        f"{' '.join(text for _, text in claims if text)} That learned features grow (in the paper from {first:,} to "
        f"{last:,}) {_counted(grows)}; that function tokens activate over half of the activated features at every "
        f"checkpoint, the more so the later, {_counted(covers)}. These are counts of one SAE a checkpoint and have "
        "no interval.",
    )


def _growth(name: str, saes: Sequence[Row]) -> tuple[Sign, str]:
    if not saes:
        return "unclear", f"In {name}, no checkpoint has an SAE."
    first, last = saes[0], saes[-1]
    n_first, n_last = first["learned_features"], last["learned_features"]
    if len(saes) < 2:
        return "unclear", f"In {name}, one SAE alone has {integer(n_first)} learned features."
    variance, l0 = ([row[key] for row in (first, last)] for key in ("explained_variance", "l0"))
    told = (
        f"In {name}, learned features go from {integer(n_first)} at step {first['step']:,} to {integer(n_last)} at "
        f"step {last['step']:,} (of {integer(last['dictionary_size'])}), explained variance from "
        f"{signed(variance[0])} to {signed(variance[1])}, L0 from {number(l0[0])} to {number(l0[1])}, cross-entropy "
        f"recovered from {_recovered(first)} to {_recovered(last)}"
    )
    if n_last <= n_first:
        return "below", f"{told}."
    if not _quality_kept(first, last):
        return "unclear", (
            f"{told}: the later SAE is less than {percent(QUALITY_KEPT, 0)} as good as the first, so the rise may "
            "be the SAE’s and not the model’s."
        )
    return "above", f"{told}."


def _quality_kept(first: Row, last: Row) -> bool:
    """Whether explained variance and cross-entropy recovered are at least `QUALITY_KEPT` of what they were."""
    before, after = first["explained_variance"], last["explained_variance"]
    if before is None or after is None or after <= 0 or after < QUALITY_KEPT * before:
        return False
    before, after = first["recovered"], last["recovered"]
    return before is None or (after is not None and after >= QUALITY_KEPT * min(1.0, before))


def _recovered(row: Row) -> str:
    return "none (zeros do no harm yet)" if row["recovered"] is None else signed(row["recovered"])


def _coverage(graphs: Sequence[Row]) -> tuple[Sign, str]:
    if not graphs:
        return "unclear", ""
    first, last = graphs[0], graphs[-1]
    least = min(graphs, key=lambda row: row["function_coverage"])

    def reached(row: Row, by: str) -> str:
        return percent(row[f"{by}_coverage"], 1)

    at_last = f" and {reached(last, 'function')} at step {last['step']:,}" if len(graphs) > 1 else ""
    by_content = f" and {reached(last, 'content')}" if len(graphs) > 1 else ""
    told = (
        f"Function tokens activate {reached(first, 'function')} of its activated features at step {first['step']:,}"
        f"{at_last}, {reached(least, 'function')} where least (content tokens: {reached(first, 'content')}"
        f"{by_content})."
    )
    if least["function_coverage"] <= MOST:
        return "below", told
    if len(graphs) < 2:
        return "unclear", told
    if last["function_coverage"] > first["function_coverage"]:
        return "above", told
    if last["function_coverage"] >= SATURATED:
        return "unclear", f"{told} That leaves no room to rise."
    return "below", told


def _left_out(names: Sequence[str], rows: Sequence[object | None], why: str) -> str:
    """Which series could not be tested, and why."""
    missing = [name for name, row in zip(names, rows, strict=True) if row is None]
    return f" Not tested in {listed(missing)}: {why}." if missing else ""


def _counted(verdict: Verdict) -> str:
    return "is undecided here" if verdict == "undecided" else SAID[verdict]


def _half_steps(row: Halfway, buckets: Sequence[str]) -> str:
    return listed(
        [
            number(row.steps[bucket]) if math.isfinite(row.steps[bucket]) else "none (no fall)"
            for bucket in buckets
        ]
    )


def _since(row: Hardest) -> str:
    if row.since is None or row.highest_at == len(row.series.steps):
        return ""
    return f" (at all from step {row.since:,} on)"


def _sized(series: SeriesRow) -> str:
    return series.name if series.parameters is None else f"{series.name} ({series.parameters:,} parameters)"


def _places(compared: Gains) -> str:
    if compared.small_step == compared.large_step:
        return f"step {compared.small_step:,}"
    return f"steps {compared.small_step:,} and {compared.large_step:,}"


def _finding(index: int, verdict: Verdict, text: str) -> Finding:
    return Finding(title=TITLES[index], verdict=verdict, text=text)
