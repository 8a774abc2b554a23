"""The rows that the report's figures are drawn from: small, thinned, one value class a figure.

Ranks are frequency ranks from 1; degrees are numbers of distinct features; shares are between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FrequencyPoint:
    """One token of the frequency ranking."""

    rank: int
    count: int
    is_function: bool


@dataclass(frozen=True, kw_only=True)
class DocumentShareBin:
    """Document shares of `n` tokens of neighbouring ranks: 5th, 50th and 95th percentile."""

    rank: int
    is_function: bool
    n: int
    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one token is spread over the documents.

    Attributes:
        token: Decoded text.
        is_function: Whether it is a function token.
        rank: Frequency rank.
        count: Occurrences.
        doc_count: Documents that hold it.
        doc_share: `doc_count` over all documents.
        n_documents: Documents of the corpus.
        most: Most occurrences in one document.
        top_share: Share of the occurrences that the hundredth of the documents with the most of it hold.
        width: Neighbouring documents that one value of `means` stands for.
        means: Mean occurrences per document, along `doc_id`.
    """

    token: str
    is_function: bool
    rank: int
    count: int
    doc_count: int
    doc_share: float
    n_documents: int
    most: int
    top_share: float
    width: int
    means: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class DegreeBin:
    """Degrees of `n` tokens of neighbouring ranks in one layer: 5th, 50th and 95th percentile."""

    layer: int
    rank: int
    n: int
    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class LineFit:
    """Least squares of ln y = `intercept` + `slope` · ln x over `n` points, and its R²."""

    n: int
    slope: float
    intercept: float
    r2: float


@dataclass(frozen=True, kw_only=True)
class DegreeFit:
    """The straight line of degree against rank in one layer, and the power law of the degrees' distribution.

    Attributes:
        layer: Decoder block.
        line: ln median degree against ln rank over log-spaced bins of rank, so that every decade weighs the
            same; None where no line is defined.
        tokens: The same over single tokens, where the many rare ones decide.
        alpha: Exponent of the power law that `graph_summary` holds.
        xmin: Smallest degree that the power law covers.
        ks: Kolmogorov–Smirnov distance of the power law.
    """

    layer: int
    line: LineFit | None
    tokens: LineFit | None
    alpha: float | None
    xmin: float | None
    ks: float | None


@dataclass(frozen=True, kw_only=True)
class CoveragePoint:
    """Cumulative coverage of one layer's features by the tokens up to `rank`."""

    layer: int
    rank: int
    coverage: float
    dictionary_coverage: float


@dataclass(frozen=True, kw_only=True)
class RarefiedPoint:
    """Medians of `n` tokens of nearly equal degree that occur at least m times, in one layer."""

    layer: int
    is_function: bool
    n: int
    degree: float
    rarefied_degree: float


@dataclass(frozen=True, kw_only=True)
class Rarefaction:
    """What is left of the differences in degree at `m` occurrences of every token.

    Attributes:
        layer: Decoder block.
        m: Occurrences at which degrees are compared.
        n_function: Function tokens that occur at least m times.
        n_content: Content tokens that occur at least m times.
        function_median: Median rarefied degree of those function tokens.
        content_median: Median rarefied degree of those content tokens.
        raw_correlation: Spearman's correlation of count and degree.
        rarefied_correlation: Spearman's correlation of count and rarefied degree.
    """

    layer: int
    m: int
    n_function: int
    n_content: int
    function_median: float | None
    content_median: float | None
    raw_correlation: float | None
    rarefied_correlation: float | None

    @property
    def ratio(self) -> float | None:
        """Median rarefied degree of function over content tokens."""
        if self.function_median is None or not self.content_median:
            return None
        return self.function_median / self.content_median


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """The corpus in numbers.

    Attributes:
        n_documents: Documents.
        n_rejects: Records that were not used.
        n_tokens: Tokens.
        n_distinct: Distinct tokens.
        n_function: Function tokens.
        function_share: Share of all tokens that function tokens make up.
        top_share: Share of all tokens that the most frequent token makes up.
        top_token: The most frequent token.
        line: ln count against ln rank over log-spaced ranks.
        function_widespread: Function tokens that are in more than half of the documents.
        content_rare: Content tokens that are in fewer than one document in twenty.
        function_doc_share: Median document share of a function token.
        content_doc_share: Median document share of a content token.
    """

    n_documents: int
    n_rejects: int
    n_tokens: int
    n_distinct: int
    n_function: int
    function_share: float
    top_share: float
    top_token: str
    line: LineFit | None
    function_widespread: int
    content_rare: int
    function_doc_share: float | None
    content_doc_share: float | None


@dataclass(frozen=True, kw_only=True)
class LayerCoverage:
    """What the most frequent tokens reach in one layer.

    Attributes:
        layer: Decoder block.
        activated_features: Features activated at least once.
        dictionary_size: Features of the dictionary.
        top10: Coverage by the ten most frequent tokens.
        function: Coverage by all function tokens.
        half_rank: The rank at which coverage first exceeds one half.
    """

    layer: int
    activated_features: int
    dictionary_size: int
    top10: float
    function: float
    half_rank: int | None
