"""The report's sections on retention (PAPER 2): claims, frontier, survival, errors, losses, speed and retrieval.

What the run has no tables for has no section. Charts that show one budget show the middle one of those that most
policies were read at; the tables have all.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.report import charts
from tasks.report.charts import KINDS, Axis, Key, Spec
from tasks.report.queries import resamples_of, rows, tables_of, value
from tasks.report.text import decimal, integer, listed, percent, plural, signed
from tasks.report.vocabulary import SAID, Chart, Column, Finding, Row, Section, Table, Verdict
from tasks.retention import claims

if TYPE_CHECKING:
    from rich.console import Console

HAS_OWN_GRAPHS = False

BUCKETS = ("function→function", "function→content", "content→function", "content→content")
ALL = "all tokens"

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

Setting = claims.Setting


def facts(connection: Any) -> list[tuple[str, str]]:
    """What was read, for the head of the report."""
    if "retention" not in tables_of(connection):
        return []
    found = rows(
        connection,
        "SELECT length, max(n_documents) AS n FROM retention GROUP BY length ORDER BY length",
    )
    policies, budgets = (
        value(connection, f"SELECT count(DISTINCT {column}) FROM retention WHERE policy <> 'full'")
        for column in ("policy", "budget")
    )
    read = listed([f"{integer(row['n'])} of {integer(row['length'])} tokens" for row in found])
    return [
        ("retention policies", integer(policies)),
        ("retention budgets", integer(budgets)),
        ("retention sequences", read),
    ]


def findings(connection: Any) -> list[Finding]:
    """The paper's five claims about each of its policies, and function against content; none where nothing was read."""
    return claims.findings(connection)


def sections(connection: Any) -> list[Callable[[], Section]]:
    """What builds each section that there are rows for; none where no table is published."""
    there = tables_of(connection)
    if "retention" not in there or not value(connection, "SELECT count(*) FROM retention"):
        return []
    built = [_claims] if claims.is_judgeable(connection) else []
    built += [_frontier]
    built += [
        build
        for table, build in (
            ("retention_survival", _survival),
            ("retention_layers", _errors),
            ("retention_margins", _losses),
            ("retention_speed", _speed),
            ("retention_retrieval", _retrieval),
        )
        if table in there and value(connection, f"SELECT count(*) FROM {table}")
    ]
    return [functools.partial(build, connection) for build in built]


def closing(connection: Any, console: Console) -> None:
    """Print the frontier: what each policy and budget costs."""
    if "retention" not in tables_of(connection):
        return
    from rich.table import Table as Printed
    from rich.text import Text

    table = frontier_table(frontier_rows(connection))
    printed = Printed(title=table.caption)
    for column in table.columns:
        printed.add_column(column.name, justify="left" if column.look == "text" else "right")
    for cells in table.cells:
        printed.add_row(*map(Text, cells))
    console.print(printed)


# Claims.


def _claims(connection: Any) -> Section:
    judged = claims.judge(connection)
    return Section(
        key="retention",
        title="Retention: the paper’s claims",
        shows="What arXiv 2502.03102 claims of structured token retention (str) and of memory paths (cmp), held "
        f"against {listed(claims.BASELINES)} at equal bytes (within {percent(claims.EQUAL_BYTES, 0)}). A difference "
        "is turned so that it is above 0 where the claim is right; in parentheses its 95 % interval: percentiles of "
        f"{integer(resamples_of(connection, 'retention'))} resamples of the sequences, the same for both sides. A "
        "claim holds where it is right at every budget against every baseline; the table shows the baseline that is "
        "hardest to beat.",
        findings=claims.findings(connection),
        tables=[claims_table(judged)] if judged else [],
    )


def claims_table(judged: Sequence[claims.Judged]) -> Table:
    """A row a claim, policy, budget and measure."""
    return Table(
        caption="Claims",
        columns=[
            Column("claim"),
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("length", "integer"),
            Column("measure"),
            Column("own", "number", digits=4),
            Column("others", "number", "the other’s", digits=4),
            Column("hardest", heading="hardest to beat"),
            Column("compared", "integer", "compared with"),
            Column("difference", "change", digits=4, shows="both"),
            Column("verdict"),
        ],
        rows=[one.row for one in judged],
        note="Each row has a verdict of its own, over all that it was compared with.",
    )


# The frontier.


def frontier_rows(connection: Any) -> list[Row]:
    """A row a policy, budget, protocol and length, policies in their order."""
    return _in_order(rows(connection, "SELECT * FROM retention ORDER BY length, protocol, budget"))


def _frontier(connection: Any) -> Section:
    found = frontier_rows(connection)
    drawn = [row for row in found if row["policy"] != "full"]
    table = frontier_table(found)
    told = [_frontier_told(drawn, setting) for setting in _settings(drawn)]
    return Section(
        key="retention-frontier",
        title="Perplexity against bytes",
        shows="How much perplexity rises over the full cache’s on the same tokens, against the bytes that are kept: "
        "all tensors of a policy, as a share of the full cache’s keys and values. A line a policy, a marker a budget; "
        "bands are 95 % intervals by sequence. Lower and further to the left is better.",
        charts=[Chart(spec=frontier_chart(drawn), alt=f"Lines falling towards 1. {' '.join(told)}")]
        if drawn
        else [],
        findings=_sinks(drawn),
        tables=[table],
    )


def _frontier_told(drawn: Sequence[Row], setting: Setting) -> str:
    mine = [row for row in drawn if _setting(row) == setting and row["perplexity_ratio"] is not None]
    told = []
    for budget in sorted({row["budget"] for row in mine}):
        ranked = sorted(
            (row for row in mine if row["budget"] == budget), key=lambda row: row["perplexity_ratio"]
        )
        told.append(
            f"at {percent(budget, 1)} from {decimal(ranked[0]['perplexity_ratio'], 3)} ({ranked[0]['policy']}) to "
            f"{decimal(ranked[-1]['perplexity_ratio'], 3)} ({ranked[-1]['policy']})"
        )
    return f"{_setting_told(setting)}: {'; '.join(told)}." if told else ""


def _sinks(drawn: Sequence[Row]) -> list[Finding]:
    """Whether perplexity explodes without sinks, and does not with them (StreamingLLM): at every budget."""
    found = {(_setting(row), row["budget"], row["policy"]): row for row in drawn}
    pairs = [
        (row, found[setting, budget, "streaming"])
        for (setting, budget, policy), row in found.items()
        if policy == "window" and (setting, budget, "streaming") in found and setting[0] == "stream"
    ]
    if not pairs:
        return []
    told = "; ".join(
        f"{decimal(without['perplexity_ratio'], 2)} without and {decimal(with_them['perplexity_ratio'], 2)} with them "
        f"at {percent(without['budget'], 1)} of {integer(without['length'])} tokens"
        for without, with_them in pairs
    )
    apart = [
        "above" if a["perplexity_ratio_low"] > b["perplexity_ratio_high"] else "unclear" for a, b in pairs
    ]
    verdict: Verdict = "holds" if set(apart) == {"above"} else "undecided"
    return [
        Finding(
            title="Sinks",
            verdict=verdict,
            text=f"Streaming, perplexity rises by the factor {told}. That perplexity suffers without sinks "
            f"(StreamingLLM) {SAID[verdict]}.",
        )
    ]


def frontier_chart(drawn: Sequence[Row]) -> Spec:
    """Perplexity ratio against share of bytes, a panel a protocol and length."""
    settings, key = _settings(drawn), policy_key(drawn)
    return charts.panels(
        [_setting_told(setting) for setting in settings],
        lambda place, x, y: charts.series(
            [row for row in drawn if _setting(row) == settings[place]],
            x,
            y,
            key,
            band=("perplexity_ratio_low", "perplexity_ratio_high"),
            opacity=0.1,
        ),
        charts.share("kv_bytes_share", "share of the full cache’s bytes", top=None),
        charts.log("perplexity_ratio", "perplexity ÷ the full cache’s"),
    )


def frontier_table(found: Sequence[Row]) -> Table:
    """All numbers of whole policies."""
    return Table(
        caption="Policies: perplexity on held-out text, and what the cache takes",
        columns=[
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("protocol"),
            Column("length", "integer"),
            Column("n_documents", "integer", "sequences"),
            Column("kv_bytes_share", "percent", "bytes", digits=1),
            Column("perplexity", "number", digits=4),
            Column("perplexity_ratio", "decimal", "÷ full", digits=3, shows="both"),
            Column("kl", "number", "KL(full ‖ policy)"),
            Column("top1_agreement", "percent", "same first choice", digits=1),
        ],
        rows=found,
        note="KL in nats a token. Bytes: the mean over chunks, as a share of the full cache’s keys and values.",
    )


# Survival.


def survival_rows(connection: Any) -> list[Row]:
    """Survival by age of each kind, layers together, and its ratio to `random`'s at the same age.

    Counts of lives and deaths are added over layers, then S(age) = Π (1 − died / at risk). A policy with tiers is
    shown by its tier `warm`: tokens that have a slot of their own, exact or not.
    """
    return _in_order(
        rows(
            connection,
            """
            WITH pooled AS (
              SELECT policy, budget, protocol, length, kind, tier, age, sum(at_risk) AS at_risk, sum(died) AS died
              FROM retention_survival
              WHERE tier = CASE
                WHEN policy IN (SELECT policy FROM retention_survival WHERE tier = 'warm') THEN 'warm' ELSE 'hot'
              END
              GROUP BY ALL
            ),
            curves AS (
              SELECT *, product(1 - died / at_risk) OVER (
                PARTITION BY policy, budget, protocol, length, kind ORDER BY age
              ) AS survival
              FROM pooled WHERE at_risk > 0
            )
            SELECT c.policy, c.budget, c.protocol, c.length, c.kind, c.age, CAST(c.at_risk AS BIGINT) AS at_risk,
                   c.survival, c.survival / nullif(r.survival, 0) AS ratio
            FROM curves AS c
            LEFT JOIN curves AS r ON r.policy = 'random'
              AND (r.budget, r.protocol, r.length, r.kind, r.age)
                  = (c.budget, c.protocol, c.length, c.kind, c.age)
            WHERE c.policy <> 'full'
            ORDER BY c.length, c.protocol, c.budget, c.kind, c.age
            """,
        )
    )


def _survival(connection: Any) -> Section:
    found = survival_rows(connection)
    setting, budget = _place(found)
    mine = [row for row in found if _setting(row) == setting and row["budget"] == budget]
    half = half_way(mine)
    told = [
        f"{policy} keeps {' and '.join(map(_kept_told, of))} tokens"
        for policy in dict.fromkeys(row["policy"] for row in half)
        if (of := [row for row in half if row["policy"] == policy])
    ]
    at = f"{_setting_told(setting)}, a budget of {percent(budget, 1)}"
    age = half[0]["age"] if half else 0
    return Section(
        key="retention-survival",
        title="Survival: which tokens stay",
        shows=f"The share of tokens that still have a slot after so many more were read (Kaplan–Meier: tokens that are "
        f"there at the end are censored; sinks left out; layers and heads together), {at}. Survival as such is fixed "
        "by the budget: what tells is the kind, and the ratio to random of the same ages.",
        charts=[
            Chart(
                spec=survival_chart(mine, "survival"),
                alt=f"A panel a policy, falling curves of function and content tokens. At an age of {integer(age)} "
                f"tokens {'; '.join(told)}.",
                caption="Survival.",
            ),
            *(
                [
                    Chart(
                        spec=survival_chart([row for row in mine if row["policy"] != "random"], "ratio"),
                        alt="A panel a policy: survival over that of random at the same age, function and content. "
                        + _ratios_told(half),
                        caption="Survival ÷ random’s at the same age and kind.",
                    )
                ]
                if any(row["ratio"] is not None for row in mine if row["policy"] != "random")
                else []
            ),
        ],
        findings=[favoured(half)] if half else [],
        tables=[survival_table(half_way(found))],
    )


def _kept_told(row: Row) -> str:
    return f"{percent(row['survival'], 1)} of {row['kind']}"


def half_way(found: Sequence[Row]) -> list[Row]:
    """Of each curve the row at the last age that is at most half of the sequence."""
    last: dict[tuple[Any, ...], Row] = {}
    for row in found:
        if row["age"] <= row["length"] / 2:
            last[_setting(row), row["budget"], row["policy"], row["kind"]] = row
    return list(last.values())


def _ratios_told(half: Sequence[Row]) -> str:
    known = [row for row in half if row["policy"] != "random" and row["ratio"] is not None]
    told = [f"{row['policy']}, {row['kind']}: {decimal(row['ratio'])}" for row in known]
    return f"At an age of {integer(known[0]['age'])} tokens: {'; '.join(told)}." if known else ""


def favoured(half: Sequence[Row]) -> Finding:
    """Which kind each policy that is not told of kinds keeps longer."""
    told = []
    for policy in dict.fromkeys(row["policy"] for row in half):
        of = {row["kind"]: row["survival"] for row in half if row["policy"] == policy}
        if (
            policy in {"function", "content", "random"}
            or set(of) != {"function", "content"}
            or not any(of.values())
        ):
            continue
        kind = max(of, key=lambda name: of[name])
        other = min(of, key=lambda name: of[name])
        if of[kind] == of[other]:
            told.append(f"{policy} neither kind")
        else:
            times = f" ({decimal(of[kind] / of[other])} times as many)" if of[other] else ""
            told.append(f"{policy} {kind} tokens{times}")
    age = integer(half[0]["age"])
    text = (
        f"After {age} more tokens, of equally many tokens of each kind more are left of: {'; '.join(told)}."
    )
    return Finding(text=text if told else f"No policy has both kinds left after {age} more tokens.")


def survival_chart(found: Sequence[Row], field: str) -> Spec:
    """Curves of both kinds, a panel a policy; `field`: `survival` or `ratio`."""
    policies = list(dict.fromkeys(row["policy"] for row in found))
    named = [row | {"kind": f"{row['kind']} tokens"} for row in found if row[field] is not None]
    marks = max(1, len(named) // max(1, 2 * len(policies)) // 6)
    y = (
        charts.share("survival", "still there")
        if field == "survival"
        else charts.linear("ratio", "÷ random", zero=True, emphasised=1)
    )
    return charts.panels(
        policies,
        lambda place, x, y: charts.series(
            [row for row in named if row["policy"] == policies[place]], x, y, KINDS, marks=marks
        ),
        charts.linear("age", "age (tokens read since)", zero=True),
        y,
    )


def survival_table(half: Sequence[Row]) -> Table:
    """How many are left half-way, a row a policy and kind."""
    return Table(
        caption="Tokens that are still there half a sequence later",
        columns=[
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("protocol"),
            Column("length", "integer"),
            Column("kind"),
            Column("age", "integer"),
            Column("at_risk", "integer", "at risk (all heads)"),
            Column("survival", "percent", digits=2),
            Column("ratio", "decimal", "÷ random"),
        ],
        rows=half,
    )


# Errors by layer.


def layer_rows(connection: Any) -> list[Row]:
    """All of `retention_layers`, policies in their order."""
    return _in_order(
        rows(connection, "SELECT * FROM retention_layers ORDER BY length, protocol, budget, layer")
    )


def _errors(connection: Any) -> Section:
    found = [row for row in layer_rows(connection) if row["policy"] != "full"]
    if not found:
        return Section(
            key="retention-layers", title="Error by layer", missing="No policy but the full cache was read."
        )
    setting, budget = _place(found)
    mine = [row for row in found if _setting(row) == setting and row["budget"] == budget]
    last = [row for row in mine if row["layer"] == max(row["layer"] for row in mine)]
    told = [
        f"{row['policy']} {decimal(row['error'], 3)} ({decimal(row['local_error'], 3)} local)" for row in last
    ]
    carried = [f"{row['policy']} {decimal(row['carried'])}" for row in last]
    return Section(
        key="retention-layers",
        title="Error by layer",
        shows="How far a block’s output is from the full run’s, ‖policy − full‖ ÷ ‖full‖, the median over tokens, BOS "
        "left out; and what the same evictions do to that layer alone, fed the full run’s inputs and keys (local). "
        f"What is carried is the one over the other. {_setting_told(setting)}, a budget of {percent(budget, 1)}.",
        charts=[
            Chart(
                spec=errors_chart(mine),
                alt="Two panels on one logarithmic scale, error and local error against layer, a line a policy. At "
                f"the last layer: {'; '.join(told)}.",
                caption="Error.",
            ),
            Chart(
                spec=carried_chart([row for row in mine if row["carried"] is not None]),
                alt=f"Carried error against layer, a line a policy; at the last layer {'; '.join(carried)}.",
                caption="Carried: error ÷ local error, 95 % intervals by sequence.",
            ),
        ],
        tables=[layers_table(found)],
    )


def errors_chart(found: Sequence[Row]) -> Spec:
    """Error and local error by layer, a panel each."""
    key = policy_key(found)
    fields = ("error", "local_error")
    drawn = [
        [row | {"shown": row[field]} for row in found if row[field] is not None and row[field] > 0]
        for field in fields
    ]
    return charts.panels(
        ["error", "local error"],
        lambda place, x, y: charts.series(drawn[place], x, y, key),
        charts.linear("layer", "layer"),
        charts.log("shown", "‖policy − full‖ ÷ ‖full‖"),
    )


def carried_chart(found: Sequence[Row]) -> Spec:
    """Carried error by layer."""
    return charts.single(
        charts.series(
            found,
            charts.linear("layer", "layer"),
            charts.log("carried", "error ÷ local error"),
            policy_key(found),
            band=("carried_low", "carried_high"),
            opacity=0.1,
        )
    )


def layers_table(found: Sequence[Row]) -> Table:
    """Means over layers, a row a policy, budget, protocol and length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["policy"], row["budget"], *_setting(row)), []).append(row)
    shown = []
    for of in groups.values():
        means = {
            name: _mean([row[name] for row in of])
            for name in (
                *(
                    "error",
                    "local_error",
                    "carried",
                    "retained_mass",
                    "attention_entropy",
                    "full_attention_entropy",
                ),
                *("key_similarity", "full_key_similarity", "function_share"),
            )
        }
        last = max(of, key=lambda row: row["layer"])
        shown.append(of[0] | means | {"last_error": last["error"]})
    return Table(
        caption="Layers: means over those that a policy governs",
        columns=[
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("protocol"),
            Column("length", "integer"),
            Column("error", "number"),
            Column("last_error", "number", "at the last layer"),
            Column("local_error", "number"),
            Column("carried", "number"),
            Column("retained_mass", "percent", "attention on survivors", digits=1),
            Column("attention_entropy", "number", "attention entropy"),
            Column("full_attention_entropy", "number", "full’s"),
            Column("key_similarity", "number", "key similarity"),
            Column("full_key_similarity", "number", "full’s"),
            Column("function_share", "percent", "function tokens among the kept", digits=1),
        ],
        rows=shown,
    )


# Losses.


def margin_rows(connection: Any) -> list[Row]:
    """Loss above the full run's, by token group over all positions, and by position over all groups."""
    return _in_order(
        rows(
            connection,
            "SELECT * FROM retention_margins ORDER BY length, protocol, budget, bucket, position_from",
        )
    )


def _losses(connection: Any) -> Section:
    found = [
        row for row in margin_rows(connection) if row["policy"] != "full" and row["delta_nll"] is not None
    ]
    if not found:
        return Section(
            key="retention-losses", title="What it costs", missing="No policy but the full cache was read."
        )
    setting, budget = _place(found)
    mine = [row for row in found if _setting(row) == setting and row["budget"] == budget]
    groups = [row | {"group": row["bucket"] or ALL} for row in mine if row["position_from"] is None]
    positions = [
        row | {"position": (row["position_from"] + row["position_to"]) / 2}
        for row in mine
        if row["bucket"] is None and row["position_from"] is not None
    ]
    told = [
        f"{policy} {listed([_group_told(row) for row in groups if row['policy'] == policy])}"
        for policy in dict.fromkeys(row["policy"] for row in groups)
    ]
    ends = [
        f"{policy} {signed(last['delta_nll'], 3)}"
        for policy in dict.fromkeys(row["policy"] for row in positions)
        if (last := [row for row in positions if row["policy"] == policy][-1])
    ]
    at = f"{_setting_told(setting)}, a budget of {percent(budget, 1)}"
    return Section(
        key="retention-losses",
        title="What forgetting costs, by token group and position",
        shows="Loss above the full run’s on the same tokens, teacher-forced, in nats a token: by the kind of the "
        f"current and of the next token, and by where in the sequence the predicted token stands. {at}. Bars and "
        "bands are 95 % intervals by sequence.",
        charts=[
            *(
                [
                    Chart(
                        spec=groups_chart(groups),
                        alt=f"Intervals of the loss above the full run’s by token group, a marker a policy: "
                        f"{'; '.join(told)}.",
                        caption="By token group, current → next.",
                    )
                ]
                if groups
                else []
            ),
            *(
                [
                    Chart(
                        spec=positions_chart(positions),
                        alt=f"Loss above the full run’s against position, a line a policy; at the "
                        f"end {'; '.join(ends)}.",
                        caption="By position.",
                    )
                ]
                if positions
                else []
            ),
        ],
        tables=[groups_table([row for row in found if row["position_from"] is None])],
    )


def _group_told(row: Row) -> str:
    return f"{row['group']} {signed(row['delta_nll'], 3)}"


def groups_chart(groups: Sequence[Row]) -> Spec:
    """Loss above the full run's by token group, policies beside each other."""
    order = [name for name in (*BUCKETS, ALL) if any(row["group"] == name for row in groups)]
    x = charts.ordinal("group", "token group")
    return charts.single(
        charts.intervals(
            sorted(groups, key=lambda row: order.index(row["group"])),
            Axis(field=x.field, title=x.title, type=x.type, scale={"domain": order}, axis=x.axis),
            charts.linear("delta_nll", "nats above the full run", emphasised=0),
            policy_key(groups),
            ("delta_nll_low", "delta_nll_high"),
        )
    )


def positions_chart(positions: Sequence[Row]) -> Spec:
    """Loss above the full run's by position, a line a policy."""
    return charts.single(
        charts.series(
            positions,
            charts.linear("position", "position of the predicted token", zero=True),
            charts.linear("delta_nll", "nats above the full run", emphasised=0),
            policy_key(positions),
            band=("delta_nll_low", "delta_nll_high"),
            opacity=0.1,
        )
    )


def groups_table(found: Sequence[Row]) -> Table:
    """A row a policy, budget, protocol and length, a column a token group."""
    groups: dict[tuple[Any, ...], Row] = {}
    for row in found:
        shown = groups.setdefault((row["policy"], row["budget"], *_setting(row)), dict(row))
        name = row["bucket"] or ALL
        shown |= {f"{name}{end}": row[f"delta_nll{end}"] for end in ("", "_low", "_high")}
    return Table(
        caption="Loss above the full run’s, nats a token",
        columns=[
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("protocol"),
            Column("length", "integer"),
            *(Column(name, "change", digits=3, shows="both") for name in (ALL, *BUCKETS)),
        ],
        rows=list(groups.values()),
    )


# Speed.


def _speed(connection: Any) -> Section:
    found = _in_order(rows(connection, "SELECT * FROM retention_speed ORDER BY length, budget"))
    budget = _middle_budget(found)
    mine = [row for row in found if row["budget"] == budget]
    told = [
        f"{row['policy']} {decimal(row['speed_ratio'])} after {integer(row['length'])} tokens" for row in mine
    ]
    where = found[0]
    device = (
        f"{where['device']}, {plural(where['threads'], 'thread')}" if where["threads"] else where["device"]
    )
    return Section(
        key="retention-speed",
        title="Speed",
        shows="Tokens a second, decoded one by one after so many others were read, over those of the full cache, "
        f"measured in alternation on {device}; a budget of {percent(budget, 1)}. Bars are 95 % intervals over the "
        "turns. Above 1 eviction pays.",
        charts=[
            Chart(
                spec=speed_chart(mine),
                alt=f"Intervals of the speed over the full cache’s by length, a marker a policy: {'; '.join(told)}.",
            )
        ],
        tables=[speed_table(found)],
    )


def speed_chart(found: Sequence[Row]) -> Spec:
    """Speed over the full cache's by length."""
    named = [row | {"tokens_before": integer(row["length"])} for row in found]
    order = list(dict.fromkeys(row["tokens_before"] for row in named))
    x = charts.ordinal("tokens_before", "tokens that came before")
    return charts.single(
        charts.intervals(
            named,
            Axis(field=x.field, title=x.title, type=x.type, scale={"domain": order}, axis=x.axis),
            charts.linear("speed_ratio", "tokens/s ÷ the full cache’s", zero=True, emphasised=1),
            policy_key(found),
            ("speed_ratio_low", "speed_ratio_high"),
        )
    )


def speed_table(found: Sequence[Row]) -> Table:
    """All turns together, a row a policy, budget and length."""
    return Table(
        caption="Decoding speed",
        columns=[
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("length", "integer", "tokens before"),
            Column("tokens_per_second", "number", "tokens/s"),
            Column("full_tokens_per_second", "number", "full’s"),
            Column("speed_ratio", "decimal", "÷ full", shows="both"),
            Column("kv_bytes", "integer", "bytes held"),
            Column("full_kv_bytes", "integer", "full’s"),
            Column("load", "decimal", "load before", digits=1),
        ],
        rows=found,
        note="In a small model and a short context an eviction costs more than it saves; the load of the machine as it "
        "began says how far its seconds can be trusted.",
    )


# Retrieval.


def _retrieval(connection: Any) -> Section:
    found = _in_order(
        rows(connection, "SELECT * FROM retention_retrieval ORDER BY task, length, budget, depth")
    )
    solved = solved_tasks(found)
    counting = [name for name, counts in solved.items() if counts]
    budget = _middle_budget([row for row in found if row["policy"] != "full"] or found)
    mine = [row for row in found if row["policy"] == "full" or row["budget"] == budget]
    exact = [row for row in mine if row["counts"]]
    return Section(
        key="retention-retrieval",
        title="Retrieval: what is still known of a context",
        shows="A context with a few sentences that matter is read under each policy, streaming; only then comes the "
        "question. Exact match: greedy decoding gives just the answer. Only tasks count that the full cache solves in "
        f"90 % or more of the prompts; the answer’s log-probability is shown for all. A "
        f"budget of {percent(budget, 1)}.",
        charts=[
            *(
                [
                    Chart(
                        spec=retrieval_chart(exact, "exact_match"),
                        alt="A panel a task and length: share of exact answers against depth, a line a policy. "
                        + _retrieval_told(exact, "exact_match"),
                        caption="Exact answers.",
                    )
                ]
                if exact
                else []
            ),
            Chart(
                spec=retrieval_chart(mine, "answer_logprob"),
                alt="A panel a task and length: log-probability of the answer against depth, a line a policy. "
                + _retrieval_told(mine, "answer_logprob"),
                caption="Log-probability of the answer.",
            ),
        ],
        findings=[_counting(solved, counting)],
        tables=[retrieval_table(found)],
    )


def solved_tasks(found: Sequence[Row]) -> dict[str, bool]:
    """Of each task and length whether the full cache solves it."""
    return {_task_told(row): row["counts"] for row in found}


def _counting(solved: dict[str, bool], counting: Sequence[str]) -> Finding:
    if not counting:
        return Finding(
            text=f"The full cache answers fewer than 90 % of the prompts of {listed(list(solved))}: no exact match "
            "counts here, and log-probabilities alone tell what is still known."
        )
    others = [name for name in solved if name not in counting]
    rest = f"; not of {listed(others)}, whose exact matches do not count" if others else ""
    return Finding(
        text=f"The full cache answers 90 % or more of the prompts of {listed(list(counting))}{rest}."
    )


def _retrieval_told(found: Sequence[Row], field: str) -> str:
    told: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        told.setdefault((_task_told(row), row["policy"]), []).append(row)
    shown = percent if field == "exact_match" else signed
    means = [
        f"{task}, {policy} {shown(_mean([row[field] for row in of]), 1)}"
        for (task, policy), of in told.items()
    ]
    return f"Means over depths: {'; '.join(means)}."


def _task_told(row: Row) -> str:
    return f"{row['task'].replace('_', ' ')}, {integer(row['length'])} tokens"


def retrieval_chart(found: Sequence[Row], field: str) -> Spec:
    """Answers by depth, a panel a task and length; `field`: `exact_match` or `answer_logprob`."""
    tasks, key = list(dict.fromkeys(map(_task_told, found))), policy_key(found)
    y = (
        charts.share("exact_match", "answered exactly")
        if field == "exact_match"
        else charts.linear("answer_logprob", "log-probability (nats)")
    )
    return charts.panels(
        tasks,
        lambda place, x, y: charts.series(
            [row for row in found if _task_told(row) == tasks[place]], x, y, key
        ),
        charts.share("depth", "depth of what is asked for"),
        y,
    )


def retrieval_table(found: Sequence[Row]) -> Table:
    """A row a policy, budget, task and length, over all depths."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["task"], row["length"], row["policy"], row["budget"]), []).append(row)
    shown = []
    for of in groups.values():
        n = sum(row["n"] for row in of)
        means = {
            name: sum(row[name] * row["n"] for row in of) / n
            for name in ("full_exact_match", "exact_match", "answer_logprob", "full_answer_logprob")
        }
        shown.append(of[0] | means | {"n": n, "task": of[0]["task"].replace("_", " ")})
    return Table(
        caption="Retrieval, all depths together",
        columns=[
            Column("task"),
            Column("length", "integer"),
            Column("policy"),
            Column("budget", "percent", digits=1),
            Column("n", "integer", "prompts"),
            Column("exact_match", "percent", "exact", digits=1),
            Column("full_exact_match", "percent", "full’s", digits=1),
            Column("counts", "met"),
            Column("answer_logprob", "signed", "log-probability"),
            Column("full_answer_logprob", "signed", "full’s"),
        ],
        rows=shown,
    )


# What all of them need.


def policy_key(found: Sequence[Row]) -> Key:
    """The look of the policies that some rows are of."""
    names = list(dict.fromkeys(row["policy"] for row in found))
    looks = []
    for place, name in enumerate(names):
        colour, shape, dash = LOOKS.get(
            claims.family(name),
            (charts.COLOURS[place % 6], charts.SHAPES[place % 7], charts.DASHES[place % 4]),
        )
        looks.append((colour if name in LOOKS else charts.GREEN, shape, dash))
    return Key(
        field="policy",
        names=names,
        colours=[look[0] for look in looks],
        shapes=[look[1] for look in looks],
        dashes=[look[2] for look in looks],
    )


def _in_order(found: list[Row]) -> list[Row]:
    order = {name: place for place, name in enumerate(LOOKS)}
    return sorted(found, key=lambda row: (order.get(claims.family(row["policy"]), len(order)), row["policy"]))


def _setting(row: Row) -> Setting:
    return row["protocol"], row["length"]


def _settings(found: Sequence[Row]) -> list[Setting]:
    return sorted({_setting(row) for row in found}, key=lambda setting: (setting[1], setting[0] != "stream"))


def _setting_told(setting: Setting) -> str:
    return f"{setting[0]}, {integer(setting[1])} tokens"


def _place(found: Sequence[Row]) -> tuple[Setting, float]:
    """The setting that most policies were read in, streamed before prefilled, long before short; its middle budget."""
    policies = Counter(setting for setting, _ in {(_setting(row), row["policy"]) for row in found})
    setting = max(policies, key=lambda of: (policies[of], of[0] == "stream", of[1]))
    return setting, _middle_budget([row for row in found if _setting(row) == setting])


def _middle_budget(found: Sequence[Row]) -> float:
    """The middle one of the budgets that most policies have."""
    policies = Counter(budget for budget, _ in {(row["budget"], row["policy"]) for row in found})
    most = max(policies.values())
    budgets = sorted(budget for budget, n in policies.items() if n == most)
    return float(budgets[len(budgets) // 2])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
