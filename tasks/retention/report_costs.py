"""The report's sections on what forgetting costs (PAPER 2): perplexity against bytes, errors, losses, speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tasks.report import charts
from tasks.report.charts import Axis, Spec
from tasks.report.queries import rows
from tasks.report.text import decimal, integer, listed, percent, plural, signed
from tasks.report.vocabulary import SAID, Chart, Column, Finding, Row, Section, Table, Verdict
from tasks.retention.claims import Setting
from tasks.retention.looks import (
    Place,
    far_told,
    in_order,
    mean_of,
    middle_budget,
    place_of,
    policy_key,
    setting_of,
    setting_told,
    settings_of,
    without_far,
)

BUCKETS = ("function→function", "function→content", "content→function", "content→content")
ALL = "all tokens"

_MARGINS = """SELECT * FROM retention_margins
UNION ALL BY NAME
SELECT policy, budget, protocol, length, n_tokens AS n, ln(perplexity_ratio) AS delta_nll,
    ln(perplexity_ratio_low) AS delta_nll_low, ln(perplexity_ratio_high) AS delta_nll_high
FROM retention
ORDER BY length, protocol, budget, bucket NULLS FIRST, position_from NULLS FIRST"""
"""The margin that is over all tokens is what perplexity rises by: `retention` has it."""


def frontier_rows(connection: Any) -> list[Row]:
    """A row a policy, budget, protocol and length, policies in their order."""
    return in_order(rows(connection, "SELECT * FROM retention ORDER BY length, protocol, budget"))


def frontier(connection: Any, of: Setting | None = None) -> Section:
    """Perplexity against bytes, in every setting or in one."""
    found = [row for row in frontier_rows(connection) if of in (None, setting_of(row))]
    measured = [row for row in found if row["policy"] != "full" and row["perplexity_ratio"] is not None]
    near, far = without_far(measured, "perplexity_ratio", least=1)
    told = [_frontier_told(measured, setting) for setting in settings_of(measured)]
    return Section(
        key="retention-frontier",
        title="Perplexity against bytes",
        shows="How much perplexity rises over the full cache’s on the same tokens, against the bytes that are kept: "
        "all tensors of a policy, as a share of the full cache’s keys and values. A line a policy, a marker a budget; "
        "bands are 95 % intervals by sequence. Lower and further to the left is better.",
        charts=[
            Chart(
                spec=frontier_chart(near),
                alt=f"Perplexity over the full cache’s against share of bytes. {' '.join(told)}",
                caption=far_told(far),
            )
        ]
        if near
        else [],
        findings=_sinks(measured),
        tables=[frontier_table(found)],
    )


def _frontier_told(drawn: Sequence[Row], setting: Setting) -> str:
    mine = [row for row in drawn if setting_of(row) == setting and row["perplexity_ratio"] is not None]
    told = []
    for budget in sorted({row["budget"] for row in mine}):
        ranked = sorted(
            (row for row in mine if row["budget"] == budget), key=lambda row: row["perplexity_ratio"]
        )
        told.append(
            f"at {percent(budget, 1)} from {decimal(ranked[0]['perplexity_ratio'], 3)} ({ranked[0]['policy']}) to "
            f"{decimal(ranked[-1]['perplexity_ratio'], 3)} ({ranked[-1]['policy']})"
        )
    return f"{setting_told(setting)}: {'; '.join(told)}." if told else ""


def _sinks(drawn: Sequence[Row]) -> list[Finding]:
    """Whether perplexity explodes without sinks, and does not with them (StreamingLLM): at every budget."""
    found = {(setting_of(row), row["budget"], row["policy"]): row for row in drawn}
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
    settings, key = settings_of(drawn), policy_key(drawn)
    return charts.panels(
        [setting_told(setting) for setting in settings],
        lambda place, x, y: charts.series(
            [row for row in drawn if setting_of(row) == settings[place]],
            x,
            y,
            key,
            band=("perplexity_ratio_low", "perplexity_ratio_high"),
            opacity=0.07,
        ),
        # Nothing is said by the room between no bytes and the smallest budget.
        replace(
            charts.share("kv_bytes_share", "share of the full cache’s bytes", top=None), scale={"zero": False}
        ),
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
        note="KL in nats a token. Bytes: the mean over chunks after which something had to leave, as a share "
        "of the full cache’s at the end.",
    )


def layer_rows(connection: Any) -> list[Row]:
    """All of `retention_layers`, policies in their order."""
    return in_order(
        rows(connection, "SELECT * FROM retention_layers ORDER BY length, protocol, budget, layer")
    )


def errors(connection: Any, at: Place | None = None) -> Section:
    """Error by layer, at one place: as given, or as most policies have it."""
    found = [row for row in layer_rows(connection) if row["policy"] != "full"]
    if not found:
        return Section(
            key="retention-layers", title="Error by layer", missing="No policy but the full cache was read."
        )
    setting, budget = at or place_of(found)
    mine = [row for row in found if setting_of(row) == setting and row["budget"] == budget]
    last = [row for row in mine if row["layer"] == max(row["layer"] for row in mine)]
    told = [
        f"{row['policy']} {decimal(row['error'], 3)} ({decimal(row['local_error'], 3)} local)" for row in last
    ]
    carried = [f"{row['policy']} {decimal(row['carried'])}" for row in last]
    drawn = list[Chart]()
    # Where a budget is as large as the cache nothing is lost: a logarithmic axis has no place for errors of 0.
    if any(row["error"] for row in mine):
        drawn.append(
            Chart(
                spec=errors_chart(mine),
                alt="Two panels on a logarithmic scale, error and local error against layer, a line a policy; "
                f"at the last layer: {'; '.join(told)}.",
                caption="Error.",
            )
        )
    if known := [row for row in mine if row["carried"] is not None]:
        drawn.append(
            Chart(
                spec=carried_chart(known),
                alt=f"Carried error against layer, a line a policy; at the last layer {'; '.join(carried)}.",
                caption="Carried: error ÷ local error, 95 % intervals by sequence. The local error of cmp "
                "leaves out what it quantizes and merges, so that its line lies too high.",
            )
        )
    return Section(
        key="retention-layers",
        title="Error by layer",
        shows="How far a block’s output is from the full run’s, ‖policy − full‖ ÷ ‖full‖, and what the same evictions "
        "do to that layer alone, fed the full run’s inputs and keys (local). Medians over tokens that were read after "
        "something first had to leave: before, a reading is the full run. "
        f"What is carried is the one over the other. {setting_told(setting)}, a budget of {percent(budget, 1)}.",
        charts=drawn,
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
        _layer_axis(),
        charts.log("shown", "‖policy − full‖ ÷ ‖full‖"),
    )


def _layer_axis() -> Axis:
    axis = charts.linear("layer", "layer")
    return replace(axis, axis={**axis.axis, "tickMinStep": 1, "format": "d"})


def carried_chart(found: Sequence[Row]) -> Spec:
    """Carried error by layer."""
    return charts.single(
        charts.series(
            found,
            _layer_axis(),
            charts.log("carried", "error ÷ local error"),
            policy_key(found),
            band=("carried_low", "carried_high"),
            opacity=0.07,
        )
    )


def layers_table(found: Sequence[Row]) -> Table:
    """Means over layers, a row a policy, budget, protocol and length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["policy"], row["budget"], *setting_of(row)), []).append(row)
    shown = []
    for of in groups.values():
        means = {
            name: mean_of([row[name] for row in of])
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
        note="Errors, attention and keys are of tokens that were read after something first had to leave.",
    )


def margin_rows(connection: Any) -> list[Row]:
    """Loss above the full run's: of all tokens, by token group over all positions, and by position over all groups."""
    return in_order(rows(connection, _MARGINS))


def losses(connection: Any, at: Place | None = None) -> Section:
    """What forgetting costs, by token group and position, at one place: as given, or as most policies have it."""
    found = [
        row for row in margin_rows(connection) if row["policy"] != "full" and row["delta_nll"] is not None
    ]
    if not found:
        return Section(
            key="retention-losses", title="What it costs", missing="No policy but the full cache was read."
        )
    setting, budget = at or place_of(found)
    mine = [row for row in found if setting_of(row) == setting and row["budget"] == budget]
    groups = [row | {"group": row["bucket"] or ALL} for row in mine if row["position_from"] is None]
    near, far = without_far(groups, "delta_nll")
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
    where = f"{setting_told(setting)}, a budget of {percent(budget, 1)}"
    return Section(
        key="retention-losses",
        title="What forgetting costs, by token group and position",
        shows="Loss above the full run’s on the same tokens, teacher-forced, in nats a token: by the kind of the "
        f"current and of the next token, and by where in the sequence the predicted token stands. {where}. Bars and "
        "bands are 95 % intervals by sequence.",
        charts=[
            *(
                [
                    Chart(
                        spec=groups_chart(near),
                        alt=f"Intervals of the loss above the full run’s by token group, a marker a policy: "
                        f"{'; '.join(told)}.",
                        caption=f"By token group, current → next. {far_told(far)}",
                    )
                ]
                if groups
                else []
            ),
            *(
                [
                    Chart(
                        spec=positions_chart([row for row in positions if row["policy"] not in far]),
                        alt=f"Loss above the full run’s against position, a line a policy; at the "
                        f"end {'; '.join(ends)}.",
                        caption=f"By position. {far_told(far)}",
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
    return charts.single(
        charts.intervals(
            groups,
            charts.ordinal("group", "token group"),
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
            opacity=0.07,
        )
    )


def groups_table(found: Sequence[Row]) -> Table:
    """A row a policy, budget, protocol and length, a column a token group."""
    groups: dict[tuple[Any, ...], Row] = {}
    for row in found:
        shown = groups.setdefault((row["policy"], row["budget"], *setting_of(row)), dict(row))
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


def speed(connection: Any, budget: float | None = None) -> Section:
    """Decoding speed, at a budget: as given, or the middle one."""
    found = in_order(rows(connection, "SELECT * FROM retention_speed ORDER BY length, budget"))
    budget = budget or middle_budget(found)
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
    return charts.single(
        charts.intervals(
            found,
            charts.ordinal("length", "tokens that came before"),
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
