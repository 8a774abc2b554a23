"""The report's sections on what is left (PAPER 2): which tokens stay, and what is still known of a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.explore.vocabulary import Query
from tasks.report import charts
from tasks.report.charts import KINDS, Spec
from tasks.report.queries import rows
from tasks.report.text import decimal, integer, listed, percent, signed
from tasks.report.vocabulary import Chart, Column, Finding, Row, Section, Table
from tasks.retention.looks import (
    Place,
    in_order,
    mean_of,
    middle_budget,
    place_of,
    policy_key,
    setting_of,
    setting_told,
)


def survival_rows(connection: Any) -> list[Row]:
    """Survival by age of each kind, layers together, and its ratio to `random`'s at the same age.

    A policy with tiers is shown by its tier `warm`: tokens that have a slot of their own, exact or not.
    """
    query = Query.of("retention/explore_survival", length=None, protocol=None, budget=None)
    return in_order(rows(connection, query.sql, query.values))


def survival(connection: Any, at: Place | None = None) -> Section:
    """Which tokens stay, at one place: as given, or as most policies have it."""
    found = survival_rows(connection)
    setting, budget = at or place_of(found)
    mine = [row for row in found if setting_of(row) == setting and row["budget"] == budget]
    half = half_way(mine)
    told = [
        f"{policy} keeps {' and '.join(map(_kept_told, of))} tokens"
        for policy in dict.fromkeys(row["policy"] for row in half)
        if (of := [row for row in half if row["policy"] == policy])
    ]
    where = f"{setting_told(setting)}, a budget of {percent(budget, 1)}"
    # A curve ends where nobody is left.
    age = max((row["age"] for row in half), default=0)
    return Section(
        key="retention-survival",
        title="Survival: which tokens stay",
        shows=f"The share of tokens that still have a slot after so many more were read (Kaplan–Meier: tokens that are "
        f"there at the end are censored; sinks left out; layers and heads together), {where}. Survival as such is "
        "fixed by the budget: what tells is the kind, and the ratio to random of the same ages. Bands are 95 % "
        "intervals by sequence.",
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
            last[setting_of(row), row["budget"], row["policy"], row["kind"]] = row
    return list(last.values())


def _ratios_told(half: Sequence[Row]) -> str:
    known = [row for row in half if row["policy"] != "random" and row["ratio"] is not None]
    told = [f"{row['policy']}, {row['kind']}: {decimal(row['ratio'])}" for row in known]
    return (
        f"At an age of {integer(max(row['age'] for row in known))} tokens: {'; '.join(told)}."
        if known
        else ""
    )


def favoured(half: Sequence[Row]) -> Finding:
    """Which kind each policy that is not told of kinds keeps longer."""
    told = []
    for policy in dict.fromkeys(row["policy"] for row in half):
        of = [row for row in half if row["policy"] == policy and row["survival"]]
        if policy in {"function", "content", "random"} or len(of) != 2:
            continue
        less, more = sorted(of, key=lambda row: row["survival"])
        if less["survival_high"] is None or less["survival_high"] >= more["survival_low"]:
            told.append(f"{policy} neither kind clearly")
        else:
            told.append(
                f"{policy} {more['kind']} tokens ({decimal(more['survival'] / less['survival'])} times as many)"
            )
    age = integer(max(row["age"] for row in half))
    text = (
        f"After {age} more tokens, of equally many tokens of each kind more are left of: {'; '.join(told)}. (Clearly: "
        "intervals apart.)"
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
            [row for row in named if row["policy"] == policies[place]],
            x,
            y,
            KINDS,
            marks=marks,
            band=(f"{field}_low", f"{field}_high"),
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
            Column("survival", "percent", digits=2, shows="both"),
            Column("ratio", "decimal", "÷ random", shows="both"),
        ],
        rows=half,
    )


def retrieval(connection: Any, budget: float | None = None) -> Section:
    """What is still known of a context, at a budget: as given, or the middle one."""
    found = in_order(
        rows(connection, "SELECT * FROM retention_retrieval ORDER BY task, length, budget, depth")
    )
    solved = solved_tasks(found)
    counting = [name for name, counts in solved.items() if counts]
    budget = budget or middle_budget([row for row in found if row["policy"] != "full"] or found)
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
        f"{task}, {policy} {shown(mean_of([row[field] for row in of]), 1)}"
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
