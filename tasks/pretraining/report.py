"""The report's sections on consolidation (PAPER 1.4): training, losses, learned features, graphs, texts.

A run may have no training of its own, no SAE series and no generations; what it has not been asked for has no
section.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tasks.pretraining import figures as consolidation_figures
from tasks.pretraining import findings as consolidation_findings
from tasks.pretraining.report_checkpoints import (
    bucket_losses,
    checkpoint_degree_bins,
    continuations,
    graph_rows,
    has_losses,
    last_of_each,
    learned_rows,
    series_of,
    training_points,
    training_rows,
)
from tasks.pretraining.report_tables import (
    gains_table,
    generation_tables,
    graphs_table,
    halfway_table,
    last_losses_table,
    learned_table,
    series_table,
    training_table,
)
from tasks.pretraining.rows import HARDEST, BucketLoss
from tasks.pretraining.statistics import measure
from tasks.report.old_page import Section, picture
from tasks.report.queries import resamples_of
from tasks.report.text import integer, listed, percent, plural, signed
from tasks.report.vocabulary import Finding

HAS_OWN_GRAPHS = True


def findings(connection: Any) -> list[Finding]:
    """The paper's four findings; none where no losses are published.

    Args:
        connection: Of `infra.duck.connect`.
    """
    if not has_losses(connection):
        return []
    return consolidation_findings.findings(measure(connection))


def final_losses(connection: Any) -> list[BucketLoss]:
    """Each series' last checkpoint, a row a token group; none where no losses are published."""
    return last_of_each(bucket_losses(connection)) if has_losses(connection) else []


def facts(connection: Any) -> list[tuple[str, str]]:
    """The checkpoints in numbers, for the head of the report."""
    if not has_losses(connection):
        return []
    series, last = series_of(connection), final_losses(connection)
    return [
        ("checkpoint series", integer(len(series))),
        ("checkpoints", integer(sum(len(one.steps) for one in series))),
        ("predictions on held-out text", integer(sum(row.n for row in last if row.model == last[0].model))),
    ]


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section that there are tables for; none where no losses are published."""
    if not has_losses(connection):
        return []
    built = [_findings]
    built += [_training] * bool(training_rows(connection))
    built += [_losses]
    if learned_rows(connection):
        built += [_learned]
    if graph_rows(connection):
        built += [_degree] * bool(checkpoint_degree_bins(connection)) + [_coverage]
    built += [_generations] * bool(continuations(connection))
    return [functools.partial(build, connection) for build in built]


def _findings(connection: Any) -> Section:
    measured = measure(connection)
    halfway = [row for row in measured.halfway if row is not None]
    tables = [series_table(measured.series)]
    if halfway:
        tables.append(halfway_table(halfway))
    if not isinstance(measured.gains, str):
        tables.append(gains_table(measured.gains))
    return Section(
        key="consolidation",
        title="Consolidation: the paper’s findings",
        shows="What the paper says of pre-training, held against the checkpoints of this run. A token group is the "
        "kind of the current and of the next token. In parentheses stand 95 % intervals: percentiles of "
        f"{integer(resamples_of(connection, 'loss'))} resamples of the held-out documents, the same for all "
        "checkpoints and models. They say what other documents would change, not what another training would.",
        findings=consolidation_findings.findings(measured),
        tables=tables,
    )


def _training(connection: Any) -> Section:
    models, rows = _models(connection), training_rows(connection)
    parameters = {series.name: series.parameters for series in series_of(connection)}
    drawn = [model for model in models if any(row.model == model for row in rows)]
    ends = [f"{signed(row.last_loss)} in {row.model}" for row in rows]
    return Section(
        key="training",
        title="Training",
        shows="The loss on the documents shown, against the tokens shown so far: medians of neighbouring steps.",
        picture=picture(
            consolidation_figures.training_loss(training_points(connection), drawn),
            "Line plot, tokens shown on a logarithmic axis: the training loss, one line a series, ends at "
            f"{listed(ends)} nats.",
        ),
        tables=[training_table(rows, parameters)],
    )


def _losses(connection: Any) -> Section:
    rows = bucket_losses(connection)
    last = last_of_each(rows)
    return Section(
        key="losses",
        title="Losses of the four token groups",
        shows="Mean cross-entropy of next-token predictions on held-out documents against the optimizer step, by the "
        "kind of the current and of the next token. Colour tells the next token’s kind; line and marker the current "
        "one’s. Bands are 95 % intervals by document; all panels have one scale.",
        picture=picture(
            consolidation_figures.bucket_losses(rows, _models(connection)),
            "One panel a series on one scale, steps on a logarithmic axis: mean loss of four token groups. "
            f"Last: {'; '.join(f'{row.model} {row.bucket} {signed(row.mean_loss)}' for row in last)}.",
        ),
        findings=[_weight(last)],
        tables=[last_losses_table(last)],
    )


def _weight(last: list[BucketLoss]) -> Finding:
    """How much of the total loss the paper's hardest group makes up, and of the predictions."""
    told = []
    for model in dict.fromkeys(row.model for row in last):
        mine = {row.bucket: row for row in last if row.model == model}
        if HARDEST in mine:
            row, n = mine[HARDEST], sum(other.n for other in mine.values())
            told.append(
                f"{percent(row.loss_share, 1)} of the loss from {percent(row.n / n, 1)} of the predictions in {model}"
            )
    if not told:
        return Finding(text=f"No held-out prediction is of the group {HARDEST}.")
    return Finding(text=f"At the last checkpoint, {HARDEST} makes up {listed(told)}.")


def _learned(connection: Any) -> Section:
    rows = learned_rows(connection)
    return Section(
        key="learned",
        title="Learned features",
        shows="An SAE of the same size is trained on each selected checkpoint, on as many activations. Learned "
        "features are those active on held-out text neither hardly ever nor nearly always. The panels at the "
        "right tell whether a rise is the model’s or the SAE’s: the count means the same only where the SAEs are "
        "about as good. Cross-entropy recovered is left out where zeros do the model no harm yet.",
        picture=picture(
            consolidation_figures.learned_features(rows, _models_in(connection, rows)),
            "Learned features against step, with explained variance, L0 and cross-entropy recovered beside it: "
            + "; ".join(f"{row.model} step {row.step:,} {integer(row.learned)}" for row in rows)
            + ".",
        ),
        tables=[learned_table(rows)],
    )


def _degree(connection: Any) -> Section:
    bins = checkpoint_degree_bins(connection)
    models = _models_in(connection, bins)
    steps = len({(row.model, row.step) for row in bins})
    return Section(
        key="checkpoint-degree",
        title="Degree against rank, by checkpoint",
        shows="How many distinct features a token activated, against its frequency rank: medians of neighbouring "
        "ranks and bands from their 5th to their 95th percentile, over the tokens that have an edge. All panels "
        "have one scale.",
        picture=picture(
            consolidation_figures.degree_by_checkpoint(bins, models),
            f"One panel a series, logarithmic axes: degree against frequency rank at {plural(steps, 'checkpoint')}.",
        ),
    )


def _coverage(connection: Any) -> Section:
    rows = graph_rows(connection)
    reached = [f"{percent(row.function, 1)} ({row.model}, step {row.step:,})" for row in rows]
    return Section(
        key="checkpoint-coverage",
        title="Coverage, by checkpoint",
        shows="The share of a checkpoint’s activated features that are activated by any function token, by any "
        "content token, and by any of the ten most frequent tokens.",
        picture=picture(
            consolidation_figures.coverage_by_checkpoint(rows, _models_in(connection, rows)),
            f"One panel a series: coverage against step. Function tokens reach {listed(reached)}.",
        ),
        tables=[graphs_table(rows)],
    )


def _generations(connection: Any) -> Section:
    rows = continuations(connection)
    prompts = len({row.prompt for row in rows})
    return Section(
        key="generations",
        title="Generations",
        shows=f"How each checkpoint continues {plural(prompts, 'fixed prompt')}. Line ends are shown as \\n, spaces "
        "that could be missed as ␣. In the paper: first function tokens only, then fluent phrases, then long-range "
        "sense.",
        tables=generation_tables(rows),
    )


def _models(connection: Any) -> list[str]:
    return [series.name for series in series_of(connection)]


def _models_in(connection: Any, rows: Any) -> list[str]:
    present = {row.model for row in rows}
    return [model for model in _models(connection) if model in present]
