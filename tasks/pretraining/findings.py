"""The paper's four findings on consolidation (PAPER 1.4), each held against this run's numbers.

A claim holds where its 95 % interval lies wholly on the paper's side of zero in every series, differs where it
lies wholly on the other side in any, and is undecided in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tasks.pretraining.loss_intervals import BUCKETS
from tasks.pretraining.rows import (
    HARDEST,
    TO_CONTENT,
    TO_FUNCTION,
    Gains,
    GraphRow,
    Halfway,
    Hardest,
    LearnedRow,
    Measured,
    SeriesRow,
)
from tasks.report.graph import SATURATED
from tasks.report.text import integer, listed, number, percent, plural, signed
from tasks.report.vocabulary import SAID, Finding, Sign, Verdict, beyond, every

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


def findings(measured: Measured) -> list[Finding]:
    """All four, in the paper's order."""
    names = [one.name for one in measured.series]
    return [
        is_hardest(names, measured.hardest),
        falls_first(names, measured.halfway),
        larger_gains(measured.series, measured.gains),
        features_grow(measured.series, measured.learned, measured.graphs),
    ]


def is_hardest(names: Sequence[str], rows: Sequence[Hardest | None]) -> Finding:
    """function→content is above the highest of the others at the last checkpoint of every series, `names`."""
    tested = [row for row in rows if row is not None]
    why = "a token group has no prediction in the held-out documents"
    if not tested:
        return _untested(0, why)
    left_out = _left_out(names, rows, why)
    verdict = every([row.gap.sign for row in tested] + ["unclear"] * bool(left_out))
    told = [
        f"In {row.model}, function→content ends at {signed(row.loss)} nats (step {row.step:,}), "
        f"{beyond(row.gap)} the highest of the others, {row.next_bucket}, and is the highest at {row.highest_at} of "
        f"{plural(row.checkpoints, 'checkpoint')}{_since(row)}."
        for row in tested
    ]
    throughout = all(row.highest_at == row.checkpoints for row in tested)
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
        return _untested(1, f"every series has {why}")
    left_out = _left_out(names, rows, why)
    signs: list[Sign] = [sign for row in tested for sign in (row.lead.sign, row.order.sign)]
    verdict = every(signs + ["unclear"] * bool(left_out))
    told = [
        f"In {row.model}, half of the fall from step {row.first:,} to step {row.last:,} is made by step "
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
        return _untested(2, compared)
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


def features_grow(
    series: Sequence[SeriesRow], learned: Sequence[LearnedRow], graphs: Sequence[GraphRow]
) -> Finding:
    """More learned features at the end with an SAE about as good, most of them by function tokens, ever more."""
    if not learned or not graphs:
        return _untested(3, "this run has no SAE series (consolidation.growth)")
    claims: list[tuple[Sign, str]] = []
    for one in series:
        claims.append(_growth(one.name, [row for row in learned if row.model == one.name]))
        claims.append(_coverage([row for row in graphs if row.model == one.name]))
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


def _growth(name: str, rows: Sequence[LearnedRow]) -> tuple[Sign, str]:
    if not rows:
        return "unclear", f"In {name}, no checkpoint has an SAE."
    first, last = rows[0], rows[-1]
    if len(rows) < 2:
        return "unclear", f"In {name}, one SAE alone has {integer(first.learned)} learned features."
    told = (
        f"In {name}, learned features go from {integer(first.learned)} at step {first.step:,} to "
        f"{integer(last.learned)} at step {last.step:,} (of {integer(last.dictionary_size)}), explained variance "
        f"from {signed(first.explained_variance)} to {signed(last.explained_variance)}, L0 from {number(first.l0)} "
        f"to {number(last.l0)}, cross-entropy recovered from {_share(first)} to {_share(last)}"
    )
    if last.learned <= first.learned:
        return "below", f"{told}."
    if not _quality_kept(first, last):
        return "unclear", (
            f"{told}: the later SAE is less than {percent(QUALITY_KEPT, 0)} as good as the first, so the rise may "
            "be the SAE’s and not the model’s."
        )
    return "above", f"{told}."


def _quality_kept(first: LearnedRow, last: LearnedRow) -> bool:
    """Whether explained variance and cross-entropy recovered are at least `QUALITY_KEPT` of what they were."""
    if first.explained_variance is None or last.explained_variance is None or last.explained_variance <= 0:
        return False
    if last.explained_variance < QUALITY_KEPT * first.explained_variance:
        return False
    before, after = first.recovered, last.recovered
    return before is None or (after is not None and after >= QUALITY_KEPT * min(1.0, before))


def _share(row: LearnedRow) -> str:
    return "none (zeros do no harm yet)" if row.recovered is None else signed(row.recovered)


def _coverage(rows: Sequence[GraphRow]) -> tuple[Sign, str]:
    if not rows:
        return "unclear", ""
    first, last = rows[0], rows[-1]
    least = min(rows, key=lambda row: row.function)
    told = (
        f"Function tokens activate {percent(first.function, 1)} of its activated features at step {first.step:,}"
        + (f" and {percent(last.function, 1)} at step {last.step:,}" if len(rows) > 1 else "")
        + f", {percent(least.function, 1)} where least (content tokens: {percent(first.content, 1)}"
        + (f" and {percent(last.content, 1)}" if len(rows) > 1 else "")
        + ")."
    )
    if least.function <= MOST:
        return "below", told
    if len(rows) < 2:
        return "unclear", told
    if last.function > first.function:
        return "above", told
    if last.function >= SATURATED:
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
    if row.since is None or row.highest_at == row.checkpoints:
        return ""
    return f" (at all from step {row.since:,} on)"


def _sized(series: SeriesRow) -> str:
    return series.name if series.parameters is None else f"{series.name} ({series.parameters:,} parameters)"


def _places(compared: Gains) -> str:
    if compared.small_step == compared.large_step:
        return f"step {compared.small_step:,}"
    return f"steps {compared.small_step:,} and {compared.large_step:,}"


def _untested(index: int, why: str) -> Finding:
    return _finding(index, "untested", f"{why[:1].upper()}{why[1:]}.")


def _finding(index: int, verdict: Verdict, text: str) -> Finding:
    return Finding(title=TITLES[index], verdict=verdict, text=text)
