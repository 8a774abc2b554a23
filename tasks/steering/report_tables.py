"""The report's tables of reactivation and steering, each made from rows. What is not there is a dash."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.report.old_page import Column, Table, number_column, number_columns
from tasks.report.text import integer, number, percent, plural, signed, visible, visible_text
from tasks.report.vocabulary import Estimate, estimate
from tasks.steering.intervals import SCORES
from tasks.steering.values import EffectRow, ScoreRow, SteeredText, TraitFeature, TraitLayer

MOST_TOKENS = 40
MOST_TEXTS = 600
LONGEST_TEXT = 300

_HEADINGS = ("own", "counterfactual", "unrelated", "excess", "excess over unrelated")
_WHOLE = (
    "Per cent of own features that are active: in the prompt itself, at the same position of the case’s other prompts, "
    "and at the same token in prompts of other relations; then the differences. In parentheses 95 % intervals by case."
)


def scores_table(rows: Sequence[ScoreRow]) -> Table:
    """The scores of each kind of token, by layer."""
    return Table(
        caption="Own features active again (%), by layer and kind of token",
        columns=[
            number_column("layer"),
            Column(name="kind"),
            *number_columns("cases", "positions", *_HEADINGS),
        ],
        rows=[
            [
                str(row.layer),
                row.kind,
                integer(row.n_cases),
                integer(row.n_positions),
                *(_share(row.scores[score]) for score in SCORES),
            ]
            for row in rows
            if row.token is None
        ],
        note=_WHOLE,
    )


def token_scores_table(rows: Sequence[ScoreRow], kind: str) -> Table:
    """The scores of single tokens of a kind, the ones in most cases and positions first."""
    mine = [row for row in rows if row.token is not None and row.kind == kind]
    mine.sort(key=lambda row: (-row.n_cases, -row.n_positions, str(row.token), row.layer))
    left = len(mine) - MOST_TOKENS
    return Table(
        caption=f"Own features active again (%) at single {kind} tokens",
        columns=[
            Column(name="token", kind="token"),
            *number_columns("layer", "cases", "positions", *_HEADINGS),
        ],
        rows=[
            [
                visible(row.token),
                str(row.layer),
                integer(row.n_cases),
                integer(row.n_positions),
                *(_share(row.scores[score]) for score in SCORES),
            ]
            for row in mine[:MOST_TOKENS]
        ],
        note=f"{plural(left, 'more row')}: in the table reactivation_scores." if left > 0 else "",
    )


def trait_layers_table(rows: Sequence[TraitLayer]) -> Table:
    """How well each layer separates a trait's prompts."""
    return Table(
        caption="Traits and layers",
        columns=[
            Column(name="trait"),
            *number_columns("layer", "pairs", "separation", "accuracy", "explained variance"),
            Column(name="most informative"),
        ],
        rows=[
            [
                visible_text(row.trait),
                str(row.layer),
                integer(row.n_pairs),
                signed(row.separation),
                percent(row.accuracy, 0),
                signed(row.explained_variance, 3),
                "✓" if row.is_most_informative else "",
            ]
            for row in rows
        ],
        note="Separation: difference of the means of left-out positive and negative prompts along the direction found "
        "without them, in standard deviations. Accuracy: share of left-out pairs in the right order. Explained "
        "variance: of the dictionary, at the last function tokens of these prompts. A trait whose features are "
        "given has none of them.",
    )


def trait_features_table(rows: Sequence[TraitFeature]) -> Table:
    """Each trait's strongest features."""
    return Table(
        caption="The traits’ strongest features",
        columns=[
            Column(name="trait"),
            *number_columns(
                "layer",
                "place",
                "feature",
                "coefficient",
                "contribution",
                "clamp value",
                "mean positive",
                "mean negative",
            ),
        ],
        rows=[
            [
                visible_text(row.trait),
                str(row.layer),
                integer(row.place),
                str(row.feature_id),
                signed(row.coefficient, 3),
                signed(row.contribution, 3),
                signed(row.clamp_value, 3),
                signed(row.mean_positive, 3),
                signed(row.mean_negative, 3),
            ]
            for row in rows
        ],
        note="At the most informative layer. Contribution: coefficient times the norm of the decoder’s direction. "
        "Clamp value: mean activation over the positive prompts that activate the feature.",
    )


def effects_table(rows: Sequence[EffectRow]) -> Table:
    """The means over the experiments, a row a setting."""
    return Table(
        caption="What steering does",
        columns=[
            Column(name="mode"),
            Column(name="features and place"),
            *number_columns(
                "strength",
                "experiments",
                "target log-probability",
                "over random",
                "KL",
                "log perplexity",
                "texts changed",
                "relative norm",
            ),
        ],
        rows=[
            [
                row.mode,
                f"{row.control}, {row.place}",
                f"{row.strength:g}",
                integer(row.n),
                *(
                    _nats(row.effects[effect])
                    for effect in ("target_logprob_delta", "advantage", "kl", "log_perplexity_delta")
                ),
                percent(row.changed, 0),
                number(row.relative_norm),
            ]
            for row in rows
        ],
        note="Changes from the unsteered model in nats, means over the experiments; in parentheses 95 % intervals by "
        "experiment. Random: features drawn at random, moved by as much as the trait’s. Relative norm: of the change "
        "at the steered position, to the residual’s norm there.",
    )


def texts_table(rows: Sequence[SteeredText], caption: str, total: int) -> Table:
    """Texts before and after.

    Args:
        rows: The texts.
        caption: The table's caption.
        total: How many there are; those that are not among `rows` are pointed to.
    """
    left = total - len(rows)
    return Table(
        caption=caption,
        columns=[
            Column(name="experiment"),
            Column(name="prompt", kind="token"),
            Column(name="target", kind="token"),
            Column(name="mode"),
            Column(name="features and place"),
            number_column("strength"),
            Column(name="before", kind="token"),
            Column(name="after", kind="token"),
            *number_columns("target log-probability", "KL"),
        ],
        rows=[
            [
                visible_text(row.case),
                visible_text(row.prompt, LONGEST_TEXT),
                visible_text(row.target, LONGEST_TEXT),
                row.mode,
                f"{row.control}, {row.place}",
                f"{row.strength:g}",
                _text(row.before),
                "(as before)" if row.after == row.before else _text(row.after),
                _change(row.target_logprob_delta),
                signed(row.kl),
            ]
            for row in rows
        ],
        note=f"{plural(left, 'more row')}: in the table steering." if left > 0 else "",
    )


def _text(text: str) -> str:
    return "(ended at once)" if text == "" else visible_text(text, LONGEST_TEXT)


def _change(value: float) -> str:
    return f"+{value:.2f}" if value > 0 else signed(value)


def _share(value: Estimate) -> str:
    if value.value != value.value:
        return "–"
    whole, low, high = (signed(100 * end, 1) for end in (value.value, value.low, value.high))
    return whole if low == "–" else f"{whole} ({low} to {high})"


def _nats(value: Estimate) -> str:
    if value.value != value.value:
        return "–"
    return signed(value.value) if value.low != value.low else estimate(value, 2)
