"""What must hold of the answers to retrieval prompts."""

from __future__ import annotations

from schemas.expectation import Expectation, Keys, Query, Rows

RETRIEVAL: tuple[Expectation, ...] = (
    Keys(
        name="answers are unique",
        table="retrieval_answers",
        meaning="A prompt is asked once under each policy and budget.",
        columns=("task", "length", "policy", "budget", "depth", "number"),
    ),
    Rows(
        name="answers are possible",
        table="retrieval_answers",
        meaning="Log-probabilities are finite and none is above 0.",
        must="isfinite(answer_logprob) AND answer_logprob <= 0",
        show="task, length, policy, budget, depth, number, answer_logprob",
    ),
    Query(
        name="all prompts are answered",
        table="retrieval_answers",
        meaning="Every policy and budget answers as many prompts as are asked, and the full cache the same.",
        needs=("wanted",),
        offenders="SELECT w.*, coalesce(a.found, 0) AS found FROM wanted AS w LEFT JOIN (SELECT task, length, policy, "
        "budget, depth, count(*) AS found FROM retrieval_answers GROUP BY ALL) AS a "
        "USING (task, length, policy, budget, depth) WHERE w.n IS DISTINCT FROM a.found",
    ),
    Query(
        name="an exact match is the likeliest answer",
        table="retrieval_answers",
        meaning="Where every token of the answer is the model's first choice, its probability is at least that of a "
        "uniform guess among the vocabulary.",
        offenders="SELECT task, length, policy, budget, depth, number, answer_logprob FROM retrieval_answers "
        "WHERE exact_match AND answer_logprob < -15.0 * n_tokens",
    ),
)
"""Of the stage `retrieval`."""
