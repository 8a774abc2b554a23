"""The explorer's pages on consolidation (PAPER 1.4): series, one checkpoint after the other, texts side by side."""

from __future__ import annotations

from tasks.explore.not_run import not_run
from tasks.explore.sections import figures, grid
from tasks.explore.vocabulary import (
    Asked,
    Change,
    Controls,
    DensityBounds,
    Facts,
    Figure,
    Findings,
    Grid,
    Link,
    Missing,
    Page,
    PageAt,
    Panel,
    Query,
    Slider,
    TokenValues,
    address,
)
from tasks.pretraining import report
from tasks.pretraining.findings import (
    SeriesRow,
    findings_of,
    graph_rows,
    has_losses,
    learned_rows,
    measure,
    series_of,
)
from tasks.report.text import DASH, integer, number, passage, percent, signed, visible_text
from tasks.report.vocabulary import Chart, Column, Row, Table

LONGEST_NAME = 80
TITLE, ADDRESS = "Checkpoints", "/pretraining"
TOP = [("Experiments", "/experiments")]
TRAIL = [*TOP, (TITLE, ADDRESS)]
NEIGHBOURS = [("One checkpoint", "/pretraining/checkpoint"), ("Generations", "/pretraining/generations")]


def overview(asked: Asked) -> Page:
    """All series: findings, losses, learned features, coverage."""
    if not has_losses(asked.connection):
        return Page(title=TITLE, trail=TOP, panels=[not_run("pretraining")])
    connection, measured = asked.connection, measure(asked.connection)
    every = {"model": None, "step": None}
    losses = report.losses_section(connection)
    panels: list[Panel] = [
        Findings(findings=findings_of(measured)),
        grid(
            "series",
            report.series_table(measured.series),
            Query.of("pretraining/explore_series"),
            order="parameters",
            links={"series": lambda row: address("pretraining", "checkpoint", series=row["series"])},
        ),
        *figures(losses, query := Query.of("pretraining/explore_losses", **every)),
        _losses(query, links=True),
    ]
    if report.training_rows(connection):
        panels += figures(report.training_section(connection), Query.of("pretraining/explore_training"))
    if measured.learned:
        query = Query(sql="SELECT * FROM learned_features ORDER BY model, step")
        section = report.learned_section(connection)
        panels += [
            *figures(section, query),
            grid("learned", section.tables[0], query, order="step", filters=["model", "step"], links=_LINKS),
        ]
    if measured.graphs:
        query = Query(sql="SELECT * FROM checkpoint_graph ORDER BY model, step")
        section = report.coverage_section(connection)
        panels += [
            *figures(section, query),
            grid("graphs", section.tables[0], query, order="step", filters=["model", "step"], links=_LINKS),
        ]
        if report.degree_bins(connection):
            panels += figures(report.degree_section(connection), Query(sql="SELECT * FROM checkpoint_degree"))
    return Page(
        title=TITLE,
        trail=TOP,
        lead="How pre-training makes function tokens the keys of memory: every checkpoint’s losses by token group on "
        "held-out documents, the features that its SAE learned, its graph, and how it writes.",
        panels=panels,
        beside=NEIGHBOURS,
    )


def checkpoint(asked: Asked) -> Page:
    """One checkpoint of a series, chosen by a slider."""
    if not has_losses(asked.connection):
        return Page(title="One checkpoint", trail=TRAIL, panels=[not_run("pretraining")])
    found = {series.name: series for series in series_of(asked.connection)}
    chosen = asked.choice("series", "Series", [(name, visible_text(name, LONGEST_NAME)) for name in found])
    series = found[chosen.value]
    n = len(series.steps)
    steps = [str(step) for step in series.steps]
    place = steps.index(asked.chosen("step", steps, default=steps[-1])) + 1
    # As far as the slider of any series goes: the form sends it along to another series.
    at = min(n, asked.number("at", place, 1, max(len(one.steps) for one in found.values())))
    step = series.steps[at - 1]
    one = {"model": series.name, "step": step}
    panels: list[Panel] = [
        Controls(
            controls=[chosen, Slider(key="at", label=f"Checkpoint of {n}", low=1, high=n, value=at)],
        ),
        _facts(asked, series, at),
        _losses(Query.of("pretraining/explore_losses", **one)),
    ]
    if asked.has("checkpoint_degree"):
        panels += _degree(asked, series, step)
    if asked.has("generations"):
        query = Query.of("pretraining/explore_generations", prompt=None, **one)
        panels.append(_texts(query, ["prompt", "mode"], "Generations of this checkpoint"))
    return Page(
        title=f"{visible_text(series.name, LONGEST_NAME)}, step {step:,}",
        lead="Move the slider from the first checkpoint to the last.",
        trail=TRAIL,
        beside=[
            (
                f"step {series.steps[other - 1]:,}",
                address("pretraining", "checkpoint", series=series.name, at=other),
            )
            for other in (at - 1, at + 1)
            if 1 <= other <= n
        ],
        panels=panels,
    )


def generations(asked: Asked) -> Page:
    """How checkpoints continue one prompt: two as a difference, and all below."""
    title = "Generations"
    if not asked.has("generations"):
        way = '[consolidation.generations]\nprompts = ["The president of the United States"]'
        return Page(title=title, trail=TRAIL, panels=[Missing(what="This run has no generations.", way=way)])
    texts = report.continuations(asked.connection)
    prompts = list(dict.fromkeys(row["prompt"] for row in texts))
    prompt = asked.choice(
        "prompt",
        "Prompt",
        [(str(n), visible_text(text, LONGEST_NAME)) for n, text in enumerate(prompts, start=1)],
    )
    mine = [row for row in texts if row["prompt"] == prompts[int(prompt.value) - 1]]

    def modes(of: list[Row]) -> list[str]:
        return sorted({mode for row in of for mode in row} - {"prompt", "model", "step"})

    named = [(name, name) for name in modes(mine)]
    mode = asked.choice("mode", "Decoded", named, elsewhere=modes(texts))
    places = [
        (str(n), f"{visible_text(row['model'], LONGEST_NAME)}, step {row['step']:,}")
        for n, row in enumerate(mine, start=1)
    ]
    anywhere = range(1, len(texts) + 1)
    pair = [
        asked.choice("first", "First", places, 1, elsewhere=anywhere),
        asked.choice("second", "Second", places, len(places), elsewhere=anywhere),
    ]
    before, after = (mine[int(one.value) - 1] for one in pair)
    told = dict(places)
    return Page(
        title=title,
        lead="Line ends are shown as \\n, spaces that could be missed as ␣.",
        trail=TRAIL,
        panels=[
            Controls(controls=[prompt, mode, *pair]),
            Change(
                title=f"{told[pair[0].value]} → {told[pair[1].value]}",
                before=passage(before.get(mode.value)),
                after=passage(after.get(mode.value)),
                note=passage(before["prompt"]),
            ),
            _texts(
                Query.of("pretraining/explore_generations", prompt=before["prompt"], model=None, step=None),
                ["model", "step", "mode"],
                "All continuations of this prompt",
            ),
        ],
    )


def _checkpoint(row: Row) -> str:
    return address("pretraining", "checkpoint", series=row["model"], step=row["step"])


_LINKS = {"step": _checkpoint}


def _losses(query: Query, *, links: bool = False) -> Grid:
    of = [Column("model", heading="series", digits=LONGEST_NAME), Column("step", "integer")]
    return grid(
        "losses",
        Table(
            caption="Losses of the token groups",
            columns=[
                *(of if links else []),
                Column("bucket", heading="group"),
                Column("n", "integer", "predictions"),
                Column("mean_loss", "signed", digits=3, shows="both"),
                Column("since_first", "change", "since the first checkpoint", digits=3),
                Column("loss_share", "percent", "share of the loss", digits=1, shows="both"),
            ],
            rows=[],
            note="Nats a prediction on held-out documents, current → next token; 95 % intervals by document.",
        ),
        query,
        order="-step" if links else "-mean_loss",
        filters=["model", "step", "bucket"] if links else [],
        links=_LINKS,
    )


def _texts(query: Query, of: list[str], caption: str) -> Grid:
    kinds: dict[str, Column | Link] = {
        "model": Column("model", heading="series", digits=LONGEST_NAME),
        "step": Link(column=Column("step", "integer"), to=_checkpoint),
        "prompt": Column("prompt", "passage"),
        "mode": Column("mode"),
    }
    return Grid(
        key="texts",
        caption=caption,
        query=query,
        columns=[*(kinds[name] for name in of), Column("continuation", "passage")],
        order=of[0],
        filters=[*of, "continuation"],
    )


def _facts(asked: Asked, series: SeriesRow, at: int) -> Facts:
    step, tokens = series.steps[at - 1], series.tokens[at - 1]
    facts = [
        ("source", visible_text(series.source), ""),
        ("parameters", integer(series.parameters), ""),
        ("tokens shown", integer(tokens), ""),
    ]
    for row in learned_rows(asked.connection):
        if (row["model"], row["step"]) == (series.name, step):
            facts += [
                (
                    "learned features",
                    f"{integer(row['learned_features'])} of {integer(row['dictionary_size'])} at layer {row['layer']}",
                    "",
                ),
                (
                    "its SAE",
                    f"explained variance {signed(row['explained_variance'], 3)}, L0 {number(row['l0'])}, CE recovered "
                    f"{signed(row['recovered'], 3)}",
                    "",
                ),
            ]
    for row in graph_rows(asked.connection):
        if (row["model"], row["step"]) == (series.name, step):
            shares = [
                f"{name} {percent(row[column], 1)}"
                for column, name in report.REACHED.items()
                if row[column] is not None
            ]
            facts.append(("activated features reached by", "; ".join(shares) or DASH, ""))
    return Facts(
        title=f"Step {step:,}",
        facts=facts,
        query=Query(
            sql="SELECT * FROM checkpoints WHERE model = $model AND step = $step",
            values={"model": series.name, "step": step},
        ),
    )


def _degree(asked: Asked, series: SeriesRow, step: int) -> list[Panel]:
    """Degree against rank at this checkpoint and the last that has a graph, and its tokens."""
    bins = [row for row in report.degree_bins(asked.connection) if row["model"] == series.name]
    steps = sorted({row["step"] for row in bins})
    if step not in steps:
        told = ", ".join(f"{there:,}" for there in steps) or "none"
        way = "[consolidation.growth]\ncheckpoints = 3  # spread over each series"
        return [
            Missing(
                what=f"This checkpoint has no SAE and no graph; of this series these have: {told}.", way=way
            )
        ]
    query = Query.of("pretraining/explore_degree", model=series.name, step=step)
    shown = [row for row in bins if row["step"] in {step, steps[-1]}]
    return [
        Figure(
            title="Degree against rank",
            chart=Chart(
                spec=report.degree_by_checkpoint(shown),
                alt=f"Degree against frequency rank, both logarithmic, at step {step:,} and at the last that has a "
                f"graph, step {steps[-1]:,}: medians of neighbouring ranks, bands from their 5th to 95th percentile.",
            ),
            query=query,
        ),
        Grid(
            key="tokens",
            caption="Tokens at this checkpoint",
            query=query,
            columns=[
                Column("rank", "integer"),
                Link(column=Column("token", "token"), to=lambda row: address("token", row["token_id"])),
                Column("is_function", "mark", "function token"),
                Column("count", "integer"),
                Column("degree", "integer"),
                Column("rarefied_degree", "number"),
                Column("last_degree", "integer", f"degree at step {steps[-1]:,}"),
            ],
            order="-degree",
            filters=["rank", "token", "is_function", "degree"],
            bars=["degree", "last_degree"],
        ),
    ]


PAGES = (
    PageAt(path=ADDRESS, title=TITLE, build=overview),
    PageAt(path="/pretraining/checkpoint", title="One checkpoint", build=checkpoint),
    PageAt(path="/pretraining/generations", title="Generations", build=generations),
)

BRINGS = (
    TokenValues(
        name="loss",
        shown="the loss of its prediction, in nats",
        needs=("token_losses", "loss_buckets"),
        series=Query.of("pretraining/explore_loss_checkpoints"),
        told=lambda row: f"{row['model']} at step {row['step']}",
        values="pretraining/explore_token_losses",
        kind="loss",
    ),
    DensityBounds(
        name="learned",
        needs=("learned_features",),
        bounds=Query(sql="SELECT min(min_density) AS low, max(max_density) AS high FROM learned_features"),
    ),
)
"""What texts and features show of a pre-training."""
