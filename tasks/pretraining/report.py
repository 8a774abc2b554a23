"""The report's sections on consolidation (PAPER 1.4): training, losses, learned features, graphs, texts.

A run may have no training of its own, no SAE series and no generations; what it has not been asked for has no
section.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.models.token_texts import visible
from tasks.pretraining.findings import (
    Gains,
    Halfway,
    SeriesRow,
    by_series,
    findings,
    findings_of,
    graph_rows,
    has_losses,
    learned_rows,
    measure,
    series_of,
)
from tasks.pretraining.loss_intervals import BUCKETS, HARDEST, TO_FUNCTION
from tasks.report import charts
from tasks.report.queries import DEGREE_BINS, percentiles, rank_bin, resamples_of, rows, tables_of, value
from tasks.report.text import integer, listed, number, percent, plural, signed, visible_text
from tasks.report.vocabulary import Chart, Column, Finding, Row, Section, Table

__all__ = ["HAS_OWN_GRAPHS", "facts", "final_losses", "findings", "sections"]

HAS_OWN_GRAPHS = True

MOST_PROMPTS = 20
LONGEST_CAPTION = 80

GROUPS = charts.Key(
    field="bucket",
    looks={
        bucket: charts.Look(
            charts.FUNCTION if bucket in TO_FUNCTION else charts.CONTENT,
            *(("circle", charts.SOLID) if bucket.startswith("function") else ("triangle-up", charts.DASHED)),
        )
        for bucket in BUCKETS
    },
)
"""Colour tells the next token's kind; line and marker the current one's."""

REACHED = {
    "function_coverage": "function tokens",
    "content_coverage": "content tokens",
    "top10_coverage": "ten most frequent tokens",
}
REACHING = charts.Key(
    field="tokens",
    looks={
        REACHED["function_coverage"]: charts.Look(charts.FUNCTION, "circle"),
        REACHED["content_coverage"]: charts.Look(charts.CONTENT, "triangle-up", charts.DASHED),
        REACHED["top10_coverage"]: charts.Look(charts.GREEN, "square", charts.DASHDOT),
    },
)


def facts(connection: Any) -> list[tuple[str, str]]:
    """The checkpoints in numbers, for the head of the report; none where no losses are published."""
    if not has_losses(connection):
        return []
    series, last = series_of(connection), final_losses(connection)
    return [
        ("checkpoint series", integer(len(series))),
        ("checkpoints", integer(sum(len(one.steps) for one in series))),
        (
            "predictions on held-out text",
            integer(sum(row["n"] for row in last if row["model"] == last[0]["model"])),
        ),
    ]


def final_losses(connection: Any) -> list[dict[str, Any]]:
    """Each series' last checkpoint, a row a token group, as `bucket_losses` has it; none without losses."""
    return last_of_each(bucket_losses(connection)) if has_losses(connection) else []


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section; none where no losses are published."""
    if not has_losses(connection):
        return []
    graphs = graph_rows(connection)
    built = {
        _findings: True,
        training_section: bool(training_rows(connection)),
        losses_section: True,
        learned_section: bool(learned_rows(connection)),
        degree_section: bool(graphs and degree_bins(connection)),
        coverage_section: bool(graphs),
        _generations: bool(continuations(connection)),
    }
    return [functools.partial(build, connection) for build, is_there in built.items() if is_there]


def _findings(connection: Any) -> Section:
    measured = measure(connection)
    halfway = [row for row in measured.halfway if row is not None]
    return Section(
        key="consolidation",
        title="Consolidation: the paper’s findings",
        shows="What the paper says of pre-training, held against the checkpoints of this run. A token group is the "
        "kind of the current and of the next token. In parentheses stand 95 % intervals: percentiles of "
        f"{integer(resamples_of(connection, 'loss'))} resamples of the held-out documents, the same for all "
        "checkpoints and models. They say what other documents would change, not what another training would.",
        findings=findings_of(measured),
        tables=[
            series_table(measured.series),
            *([halfway_table(halfway)] if halfway else []),
            *([] if isinstance(measured.gains, str) else [gains_table(measured.gains)]),
        ],
    )


def training_section(connection: Any) -> Section:
    trained = training_rows(connection)
    ends = [f"{signed(row['last_loss'])} in {row['model']}" for row in trained]
    return Section(
        key="training",
        title="Training",
        shows="The loss on the documents shown, against the tokens shown so far: medians of neighbouring steps.",
        charts=[
            Chart(
                spec=training_loss(training_points(connection)),
                alt="Line plot, tokens shown on a logarithmic axis: the training loss, one line a series, ends at "
                f"{listed(ends)} nats.",
            )
        ],
        tables=[
            Table(
                caption="Trainings",
                columns=[
                    Column("model", heading="series"),
                    Column("parameters", "integer"),
                    Column("steps", "integer"),
                    Column("tokens", "integer", "tokens shown"),
                    Column("epochs", "decimal"),
                    Column("first_loss", "signed"),
                    Column("last_loss", "signed"),
                ],
                rows=trained,
                note="Losses in nats; the last is the median of the last hundredth of the steps. Epochs: tokens "
                "shown over the corpus’ tokens without those of the documents that losses are of; too low where "
                "losses.max_tokens left some held-out documents out.",
            )
        ],
    )


def losses_section(connection: Any) -> Section:
    losses = bucket_losses(connection)
    last = last_of_each(losses)
    told = [f"{row['model']} {row['bucket']} {signed(row['mean_loss'])}" for row in last]
    return Section(
        key="losses",
        title="Losses of the four token groups",
        shows="Mean cross-entropy of next-token predictions on held-out documents against the optimizer step, by the "
        "kind of the current and of the next token. Colour tells the next token’s kind; line and marker the current "
        "one’s. Bands are 95 % intervals by document; all panels have one scale.",
        charts=[
            Chart(
                spec=losses_by_group(losses),
                alt="One panel a series on one scale, steps on a logarithmic axis: mean loss of four token groups. "
                f"Last: {'; '.join(told)}.",
            )
        ],
        findings=[_weight(last)],
        tables=[
            Table(
                caption="Losses at the last checkpoint",
                columns=[
                    Column("model", heading="series"),
                    Column("step", "integer"),
                    Column("bucket", heading="group"),
                    Column("n", "integer", "predictions"),
                    Column("mean_loss", "signed", digits=3),
                    Column("mean_loss", "signed", "95 %", digits=3, shows="interval"),
                    Column("loss_share", "percent", "share of the loss", digits=1),
                    Column("loss_share", "percent", "95 %", digits=1, shows="interval"),
                ],
                rows=last,
                note="Current → next token. Intervals by bootstrap over documents.",
            )
        ],
    )


def _weight(last: Sequence[Row]) -> Finding:
    """How much of the total loss the paper's hardest group makes up, and of the predictions."""
    told = []
    for model in _models(last):
        mine = {row["bucket"]: row for row in last if row["model"] == model}
        if HARDEST in mine:
            row, n = mine[HARDEST], sum(other["n"] for other in mine.values())
            told.append(
                f"{percent(row['loss_share'], 1)} of the loss from {percent(row['n'] / n, 1)} of the predictions in "
                f"{model}"
            )
    if not told:
        return Finding(text=f"No held-out prediction is of the group {HARDEST}.")
    return Finding(text=f"At the last checkpoint, {HARDEST} makes up {listed(told)}.")


def learned_section(connection: Any) -> Section:
    saes = learned_rows(connection)
    bounds = {(row["min_density"], row["max_density"]) for row in saes}
    between = " or ".join(f"{number(low)} and {number(high)}" for low, high in sorted(bounds, key=str))
    told = [f"{row['model']} step {row['step']:,} {integer(row['learned_features'])}" for row in saes]
    return Section(
        key="learned",
        title="Learned features",
        shows="An SAE of the same size is trained on each selected checkpoint, on as many activations. Learned "
        "features are those active on held-out text neither hardly ever nor nearly always. The panels at the "
        "right tell whether a rise is the model’s or the SAE’s: the count means the same only where the SAEs are "
        "about as good. Cross-entropy recovered is left out where zeros do the model no harm yet.",
        charts=[
            Chart(
                spec=learned_features(saes),
                alt="Learned features against step, with explained variance, L0 and cross-entropy recovered beside it: "
                f"{'; '.join(told)}.",
            )
        ],
        tables=[
            Table(
                caption="Learned features, and the quality of the SAEs",
                columns=[
                    Column("model", heading="series"),
                    Column("step", "integer"),
                    Column("layer", "plain"),
                    Column("dictionary_size", "integer", "features"),
                    Column("learned_features", "integer", "learned"),
                    Column("alive_features", "integer", "alive"),
                    Column("dense_features", "integer", "too dense"),
                    Column("explained_variance", "signed", digits=3),
                    Column("l0", "number", "L0"),
                    Column("ce_recovered", "signed", "CE recovered", digits=3),
                    Column("ce", "signed", "CE", digits=3),
                    Column("ce_zero", "signed", "CE with zeros", digits=3),
                ],
                rows=saes,
                note=f"Learned: active on a share of held-out tokens between {between}. CE recovered is a ratio of "
                "two numbers near zero, and says nothing, where CE with zeros is hardly above CE.",
            )
        ],
    )


def degree_section(connection: Any) -> Section:
    bins = degree_bins(connection)
    n = len({(row["model"], row["step"]) for row in bins})
    return Section(
        key="checkpoint-degree",
        title="Degree against rank, by checkpoint",
        shows="How many distinct features a token activated, against its frequency rank: medians of neighbouring "
        "ranks and bands from their 5th to their 95th percentile, over the tokens that have an edge. All panels "
        "have one scale.",
        charts=[
            Chart(
                spec=degree_by_checkpoint(bins),
                alt="One panel a series, logarithmic axes: degree against frequency rank at "
                f"{plural(n, 'checkpoint')}.",
            )
        ],
    )


def coverage_section(connection: Any) -> Section:
    graphs = graph_rows(connection)
    reached = [
        f"{percent(row['function_coverage'], 1)} ({row['model']}, step {row['step']:,})" for row in graphs
    ]
    return Section(
        key="checkpoint-coverage",
        title="Coverage, by checkpoint",
        shows="The share of a checkpoint’s activated features that are activated by any function token, by any "
        "content token, and by any of the ten most frequent tokens.",
        charts=[
            Chart(
                spec=coverage_by_checkpoint(graphs),
                alt=f"One panel a series: coverage against step. Function tokens reach {listed(reached)}.",
            )
        ],
        tables=[
            Table(
                caption="The checkpoints’ graphs",
                columns=[
                    Column("model", heading="series"),
                    Column("step", "integer"),
                    Column("layer", "plain"),
                    Column("activated_features", "integer"),
                    Column("mean_l0", "number", "mean L0"),
                    Column("function_coverage", "percent", "by function tokens", digits=1),
                    Column("content_coverage", "percent", "by content tokens", digits=1),
                    Column("top10_coverage", "percent", "by the ten most frequent", digits=1),
                ],
                rows=graphs,
                note="Shares of the activated features. A feature that both kinds activate counts for both.",
            )
        ],
    )


def _generations(connection: Any) -> Section:
    texts = continuations(connection)
    prompts = len({row["prompt"] for row in texts})
    return Section(
        key="generations",
        title="Generations",
        shows=f"How each checkpoint continues {plural(prompts, 'fixed prompt')}. Line ends are shown as \\n, spaces "
        "that could be missed as ␣. In the paper: first function tokens only, then fluent phrases, then long-range "
        "sense.",
        tables=generation_tables(texts),
    )


# What the tables say.


def bucket_losses(connection: Any) -> list[dict[str, Any]]:
    """The table `loss_buckets`: every group that has a prediction, by series, step and group.

    The ends of the intervals are `mean_loss_low`, `mean_loss_high`, `loss_share_low` and `loss_share_high`.
    """
    found = rows(
        connection,
        """
        SELECT model, step, bucket, n, mean_loss, mean_low AS mean_loss_low, mean_high AS mean_loss_high,
               loss_share, share_low AS loss_share_low, share_high AS loss_share_high
        FROM loss_buckets WHERE n > 0 ORDER BY step, list_position(?, bucket)
        """,
        [list(BUCKETS)],
    )
    return by_series(connection, found)


def last_of_each(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each series' last checkpoint."""
    last: dict[str, int] = {}
    for row in found:
        last[row["model"]] = max(row["step"], last.get(row["model"], row["step"]))
    return [row for row in found if row["step"] == last[row["model"]]]


def training_points(connection: Any) -> list[dict[str, Any]]:
    """Training losses by log-spaced bins of steps; the first ones have a bin of their own."""
    found = rows(
        connection,
        f"""
        SELECT model, CAST(quantile_disc(step, 0.5) AS BIGINT) AS step,
               CAST(quantile_disc(tokens, 0.5) AS BIGINT) AS tokens, quantile_cont(loss, 0.5) AS loss
        FROM training_losses AS t WHERE t.tokens > 0
        GROUP BY model, {rank_bin("greatest(t.step, 1)")} ORDER BY model, 2
        """,
    )
    return by_series(connection, found)


def training_rows(connection: Any) -> list[dict[str, Any]]:
    """Each training in numbers: `steps`, `tokens`, `parameters`, `epochs`, `first_loss`, `last_loss`.

    Epochs are tokens shown over the tokens of the documents that are not among those that losses are of, so
    that they come out too low where losses were limited to some of the held-out documents.
    """
    if "training_losses" not in tables_of(connection):
        return []
    seen = value(
        connection,
        """
        SELECT CAST(sum(n_tokens) AS BIGINT) FROM documents
        WHERE doc_id NOT IN (SELECT DISTINCT doc_id FROM document_losses)
        """,
    )
    found = rows(
        connection,
        """
        SELECT model, max(step) AS steps, max(tokens) AS tokens, arg_min(loss, step) AS first_loss,
               quantile_cont(loss, 0.5) FILTER (step > 0.99 * final) AS last_loss
        FROM training_losses JOIN (SELECT model, max(step) AS final FROM training_losses GROUP BY model)
        USING (model) GROUP BY model
        """,
    )
    parameters = {series.name: series.parameters for series in series_of(connection)}
    return by_series(
        connection,
        [
            row | {"parameters": parameters[row["model"]], "epochs": row["tokens"] / seen if seen else None}
            for row in found
        ],
    )


def degree_bins(connection: Any) -> list[dict[str, Any]]:
    """Percentiles of degrees by log-spaced bins of rank, over the tokens that have an edge, of each checkpoint."""
    if "checkpoint_degree" not in tables_of(connection):
        return []
    found = rows(
        connection,
        f"""
        SELECT model, step, CAST(quantile_disc(rank, 0.5) AS BIGINT) AS rank, {percentiles("degree")}
        FROM checkpoint_degree WHERE degree > 0
        GROUP BY model, step, {rank_bin(per_e_fold=DEGREE_BINS)} ORDER BY model, step, rank
        """,
    )
    return by_series(connection, found)


def continuations(connection: Any) -> list[dict[str, Any]]:
    """Every checkpoint's continuations, prompts as first met, then series, then steps.

    A row has `prompt`, `model`, `step` and a text a mode under the mode's own name.
    """
    if "generations" not in tables_of(connection):
        return []
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows(connection, "SELECT model, step, prompt, continuation, mode FROM generations"):
        of = {key: row[key] for key in ("prompt", "model", "step")}
        found.setdefault((row["prompt"], row["model"], row["step"]), of)[row["mode"]] = row["continuation"]
    prompts = list(dict.fromkeys(prompt for prompt, _, _ in found))
    by_step = by_series(connection, sorted(found.values(), key=lambda row: row["step"]))
    return sorted(by_step, key=lambda row: prompts.index(row["prompt"]))


def _models(found: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in found))


# Tables.


def series_table(series: Sequence[SeriesRow]) -> Table:
    """The series that are compared."""
    return Table(
        caption="Checkpoint series",
        columns=[
            Column("series"),
            Column("source"),
            Column("parameters", "integer"),
            Column("checkpoints", "integer"),
            Column("first_step", "integer"),
            Column("last_step", "integer"),
            Column("tokens", "integer", "tokens at the last"),
        ],
        rows=[
            {
                "series": one.name,
                "source": one.source,
                "parameters": one.parameters,
                "checkpoints": len(one.steps),
                "first_step": one.steps[0],
                "last_step": one.steps[-1],
                "tokens": one.tokens[-1],
            }
            for one in series
        ],
    )


def halfway_table(found: Sequence[Halfway]) -> Table:
    """When each group has made half of its fall."""
    return Table(
        caption="Step by which half of the fall from the first to the last checkpoint is made",
        columns=[
            Column("series"),
            *(Column(bucket, "number", bucket.replace("→", " → ")) for bucket in BUCKETS),
            Column("lead", "signed", "→function ahead of →content", shows="both"),
            Column("order", "signed", "later ahead of earlier group", shows="both"),
        ],
        rows=[
            {"series": row.series.name, **row.lead.row("lead"), **row.order.row("order")}
            | {bucket: at if math.isfinite(at) else "no fall" for bucket, at in row.steps.items()}
            for row in found
        ],
        note="Interpolated linearly in log step between checkpoints; a step 0 stands one doubling before the next, "
        "and a group that does not fall counts as the last step. "
        "The last two columns count doublings of the step: groups pooled, and the later →function group against "
        "the earlier →content group.",
    )


def gains_table(compared: Gains) -> Table:
    """How much lower the larger model's losses are."""
    return Table(
        caption=f"Loss of {visible(compared.small.name)} minus loss of {visible(compared.large.name)}",
        columns=[
            Column("group"),
            Column("gain", "signed", "gain in nats (95 %)", digits=3, shows="both"),
            Column("relative", "percent", "of the loss", digits=1),
        ],
        rows=[
            {"group": bucket, "relative": compared.relative[bucket], **gain.row("gain")}
            for bucket, gain in compared.by_bucket.items()
        ],
    )


def generation_tables(texts: Sequence[Row]) -> list[Table]:
    """A table a prompt: one row a checkpoint, one column a mode; of very many prompts the first."""
    modes = sorted({mode for row in texts for mode in row if mode not in {"prompt", "model", "step"}})
    prompts = list(dict.fromkeys(row["prompt"] for row in texts))
    left = len(prompts) - MOST_PROMPTS

    def note(place: int, prompt: str) -> str:
        whole = f"The whole prompt: {visible_text(prompt)}" if len(prompt) > LONGEST_CAPTION else ""
        is_cut = place == MOST_PROMPTS and left > 0
        more = f"{plural(left, 'more prompt')}: in the table generations." if is_cut else ""
        return f"{whole} {more}".strip()

    return [
        Table(
            caption=f"{place}. “{visible_text(prompt, LONGEST_CAPTION)}”",
            columns=[
                Column("model", heading="series"),
                Column("step", "integer"),
                *(Column(mode, "passage") for mode in modes),
            ],
            rows=[row for row in texts if row["prompt"] == prompt],
            note=note(place, prompt),
        )
        for place, prompt in enumerate(prompts[:MOST_PROMPTS], start=1)
    ]


# Charts.


def training_loss(points: Sequence[Row]) -> charts.Spec:
    """Training loss against tokens shown, one line a series."""
    named, key = _as_series(points)
    x, y = charts.log("tokens", "tokens shown"), charts.linear("loss", "training loss (nats)")
    return charts.single(charts.series(named, x, y, key, marks=None))


def losses_by_group(losses: Sequence[Row]) -> charts.Spec:
    """Mean loss of the four token groups against step, a panel a series, with 95 % bands."""
    return _by_model(
        losses,
        lambda mine, x, y: charts.series(mine, x, y, GROUPS, band=("mean_loss_low", "mean_loss_high")),
        _steps(losses),
        charts.linear("mean_loss", "mean loss (nats a prediction)"),
    )


def learned_features(saes: Sequence[Row]) -> charts.Spec:
    """Learned features against step, and the SAEs' quality in small panels beside them; one line a series."""
    named, key = _as_series(saes)
    steps = _steps(saes)

    def panel(field: str, title: str, x: charts.Axis) -> charts.Layers:
        known = [row for row in named if row[field] is not None]
        # Whole scales: a tenth of explained variance must not look like a collapse.
        ends = [row[field] for row in known]
        domain = [1.1 * min([0.0, *ends]), 1.1 * max([1.0, *ends])]
        y = charts.linear(field, title, domain=domain, nice=False).untitled()
        return charts.series(known, x, y, key).properties(title=title)

    first = panel("learned_features", "learned features", steps)
    beside = {"explained_variance": "explained variance", "l0": "L0", "recovered": "CE recovered"}
    *upper, last = beside.items()
    small = [panel(field, title, steps.untitled()) for field, title in upper] + [panel(*last, steps)]
    return charts.beside(first, small)


def degree_by_checkpoint(bins: Sequence[Row]) -> charts.Spec:
    """Degree against frequency rank, both logarithmic: a panel a series, a line a checkpoint.

    Lines are medians of neighbouring ranks; bands their 5th to 95th percentile.
    """
    named = [row | {"checkpoint": f"step {row['step']:,}"} for row in bins]
    steps = {row["checkpoint"]: row["step"] for row in named}
    key = charts.Key.graded("checkpoint", sorted(steps, key=lambda name: steps[name]))
    return _by_model(
        named,
        lambda mine, x, y: charts.series(mine, x, y, key, band=("low", "high"), opacity=0.12),
        charts.log("rank", "frequency rank"),
        charts.log("median", "degree (distinct features)"),
    )


def coverage_by_checkpoint(graphs: Sequence[Row]) -> charts.Spec:
    """Activated features that function tokens, content tokens and the ten top tokens reach, a panel a series."""
    shares = [
        {"model": row["model"], "step": row["step"], "tokens": name, "reached": row[column]}
        for row in graphs
        for column, name in REACHED.items()
    ]
    return _by_model(
        shares,
        lambda mine, x, y: charts.series(mine, x, y, REACHING),
        _steps(graphs),
        charts.share("reached", "activated features reached", emphasised=0.5),
    )


def _steps(found: Sequence[Row]) -> charts.Axis:
    return charts.steps_axis("step", "optimizer step", [row["step"] for row in found])


def _as_series(found: Sequence[Row]) -> tuple[list[Row], charts.Key]:
    """Rows with the visible name of their model as `series`, and a key of these."""
    names: Mapping[str, str] = {model: visible(model) for model in _models(found)}
    key = charts.Key.cycled("series", list(names.values()))
    return [row | {"series": names[row["model"]]} for row in found], key


def _by_model(
    found: Sequence[Row],
    draw: Callable[[Sequence[Row], charts.Axis, charts.Axis], charts.Layers],
    x: charts.Axis,
    y: charts.Axis,
) -> charts.Spec:
    """A panel a series, drawn from its rows, so that models compare by eye."""
    models = _models(found)
    return charts.panels(
        [visible(model) for model in models],
        lambda place, x, y: draw([row for row in found if row["model"] == models[place]], x, y),
        x,
        y,
    )
