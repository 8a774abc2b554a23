"""One plain sentence or two a figure: what was found in this run, and whether the paper's finding holds.

Every number is computed from the rows; each claim of the paper has its criterion in words beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.report.rows import CorpusSummary, DegreeFit, LayerCoverage, Rarefaction, Spread
from tasks.report.text import integer, listed, percent, plural, quoted, signed

STRAIGHT = 0.95
SMALL_SET = 0.01
SATURATED = 0.95

# arXiv 2510.08203, cumulative share of the activated features: Gemma2-9B, layers 9, 20 and 31.
PAPER_LAYERS = (9, 20, 31)
PAPER_COVERAGE: tuple[tuple[int, str, tuple[float, float, float]], ...] = (
    (1, ".", (0.2319, 0.5132, 0.3721)),
    (2, ",", (0.3201, 0.6245, 0.4978)),
    (3, "the", (0.3688, 0.6693, 0.5515)),
    (4, "\n", (0.3968, 0.7130, 0.5986)),
    (5, "and", (0.4121, 0.7197, 0.6148)),
    (6, "to", (0.4316, 0.7307, 0.6330)),
    (7, "of", (0.4600, 0.7443, 0.6516)),
    (8, " ", (0.4744, 0.7570, 0.6708)),
    (9, "a", (0.4796, 0.7612, 0.6774)),
    (10, "in", (0.4852, 0.7646, 0.6827)),
)


Verdict = Literal["holds", "differs", "undecided", "untested", "own"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found here.

    Attributes:
        text: One or two sentences.
        verdict: Whether a claim of the paper holds here: `undecided` where these numbers cannot tell, `untested`
            where there are none, `own` where the paper makes no claim.
        title: The claim in a few words, where a section has several.
    """

    text: str
    verdict: Verdict = "own"
    title: str = ""


def zipf(summary: CorpusSummary) -> Finding:
    """Function tokens are a small set: under 1 % of the distinct tokens (paper: 122 of some 128,000)."""
    share = summary.n_function / summary.n_distinct if summary.n_distinct else 0.0
    line = summary.line
    slope = f" The line through the ranks has slope {signed(line.slope)} (R² {line.r2:.3f})." if line else ""
    small = share < SMALL_SET
    return Finding(
        text=f"{plural(summary.n_function, 'function token')}, {percent(share)} of the "
        f"{summary.n_distinct:,} distinct tokens, make up {percent(summary.function_share)} of all "
        f"{summary.n_tokens:,} tokens; {quoted(summary.top_token)} alone makes up "
        f"{percent(summary.top_share)}.{slope} That they are a small set (under 1 % of the distinct tokens; the "
        f"paper has 122 with the LLaMA-3.1 tokenizer on SlimPajama) {_holds(small)} here.",
        verdict="holds" if small else "differs",
    )


def document_coverage(summary: CorpusSummary) -> Finding:
    """Most function tokens are in over half of the documents, most content tokens in under a twentieth."""
    n_content = summary.n_distinct - summary.n_function
    holds = 2 * summary.function_widespread > summary.n_function and 2 * summary.content_rare > n_content
    return Finding(
        text=f"{summary.function_widespread:,} of {plural(summary.n_function, 'function token')} are in more "
        f"than half of the documents (median: {percent(summary.function_doc_share)} of them), "
        f"{summary.content_rare:,} of {plural(n_content, 'content token')} in fewer than one in twenty "
        f"(median: {percent(summary.content_doc_share, 3)}). That function tokens are nearly everywhere and "
        f"content tokens in a few documents {_holds(holds)} for most of both kinds here.",
        verdict="holds" if holds else "differs",
    )


def token_spread(spreads: Sequence[Spread]) -> Finding:
    """The function token is in more documents than the content token, which comes in bursts."""
    function, content = spreads
    holds = function.doc_share > content.doc_share and content.top_share > function.top_share
    return Finding(
        text=f"{quoted(function.token)} is in {percent(function.doc_share, 1)} of the documents and "
        f"{quoted(content.token)} in {percent(content.doc_share, 1)}; the 1 % of the documents that use a token "
        f"most hold {percent(function.top_share, 1)} of the occurrences of the first and "
        f"{percent(content.top_share, 1)} of the second. That the function token is spread wider and more "
        f"evenly (in the paper: of against Tokyo) {_holds(holds)} here.",
        verdict="holds" if holds else "differs",
    )


def degree_rank(fits: Sequence[DegreeFit]) -> Finding:
    """Degree against rank is a straight line on log-log axes: R² of at least 0.95 at every layer."""
    lines = [
        f"layer {fit.layer} "
        + (
            "has no line"
            if fit.line is None
            else f"has slope {signed(fit.line.slope)} (R² {fit.line.r2:.3f})"
        )
        for fit in fits
    ]
    bent = [fit.layer for fit in fits if fit.line is None or fit.line.r2 < STRAIGHT]
    verdict = (
        f"does not hold at {_layers(bent)}" if bent else f"holds at {_layers([fit.layer for fit in fits])}"
    )
    return Finding(
        text=f"{_capital(listed(lines))}. That degree against rank is a straight line (R² of at least "
        f"{STRAIGHT} over log-spaced ranks) {verdict}.",
        verdict="differs" if bent else "holds",
    )


def coverage(layers: Sequence[LayerCoverage]) -> Finding:
    """The ten most frequent tokens reach over half of the features at most layers (paper: at two of three)."""
    over = [layer.layer for layer in layers if layer.top10 > 0.5]
    holds = 2 * len(over) > len(layers)
    full = [
        layer
        for layer in layers
        if layer.dictionary_size and layer.activated_features >= SATURATED * layer.dictionary_size
    ]
    caution = (
        f" Mind that {listed([percent(layer.activated_features / layer.dictionary_size) for layer in full])} of "
        f"the dictionary was activated at {_layers([layer.layer for layer in full])}: a dictionary this narrow "
        "fills up early."
        if full
        else ""
    )
    return Finding(
        text=f"The ten most frequent tokens reach {listed([percent(layer.top10) for layer in layers])} of the "
        f"activated features at {_layers([layer.layer for layer in layers])}, all function tokens "
        f"{listed([percent(layer.function) for layer in layers])}. That ten tokens reach more than half at most "
        f"layers (in the paper at two of three) {_holds(holds)} here: they do "
        f"{f'at {_layers(over)}' if over else 'at no layer'}.{caution}",
        verdict="holds" if holds else "differs",
    )


def rarefaction(layers: Sequence[Rarefaction]) -> Finding:
    """How much of a function token's degree is left at an equal number of occurrences."""
    ratios = [(row.layer, ratio) for row in layers if (ratio := row.ratio) is not None]
    medians = (
        f"{listed([f'{ratio:.2f}' for _, ratio in ratios])} times as many features as a content token at "
        f"{_layers([layer for layer, _ in ratios])} (medians)"
        if ratios
        else "a number of features that cannot be compared: no token of one of the kinds occurs often enough"
    )
    return Finding(
        text=f"At {integer(layers[0].m)} occurrences each, a function token activates {medians}. Spearman’s "
        f"correlation of frequency with degree is {listed([signed(row.raw_correlation) for row in layers])}, with "
        f"rarefied degree {listed([signed(row.rarefied_correlation) for row in layers])}: the difference is what "
        "mere sampling adds."
    )


def _holds(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {listed([str(layer) for layer in layers])}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
