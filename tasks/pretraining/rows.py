"""The rows that the report's part on consolidation is made of (PAPER 1.4), one value class a table or figure.

Losses are nats a prediction, shares are between 0 and 1, steps are optimizer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from tasks.report.vocabulary import Estimate

TO_FUNCTION = ("function→function", "content→function")
TO_CONTENT = ("function→content", "content→content")
HARDEST = "function→content"
HARM = 0.05


@dataclass(frozen=True, kw_only=True)
class SeriesRow:
    """One pre-training run.

    Attributes:
        name: The column `model` of the tables.
        parameters: Numbers in its weights, where known.
        source: Where its checkpoints come from.
        steps: Steps of its checkpoints, ascending.
        tokens: Tokens shown by each of them, where known.
    """

    name: str
    parameters: int | None
    source: str
    steps: tuple[int, ...]
    tokens: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """The median training loss of neighbouring steps, around `step`."""

    model: str
    step: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """A training in numbers.

    Attributes:
        model: The series.
        steps: Optimizer steps.
        tokens: Tokens shown, repeats included.
        epochs: About how often it saw each token of the documents that are not held out.
        first_loss: Loss of the first step.
        last_loss: Median loss of the last hundredth of the steps.
    """

    model: str
    steps: int
    tokens: int
    epochs: float | None
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True, kw_only=True)
class BucketLoss:
    """A token group's loss at a checkpoint, with 95 % intervals by document; None where documents are too few."""

    model: str
    step: int
    bucket: str
    n: int
    mean_loss: float
    low: float | None
    high: float | None
    loss_share: float
    share_low: float | None
    share_high: float | None


@dataclass(frozen=True, kw_only=True)
class LearnedRow:
    """The features that a checkpoint's SAE found alive, and how good that SAE is.

    Attributes:
        model: The series.
        step: The checkpoint.
        layer: Decoder block.
        dictionary_size: Features of the SAE.
        learned: Those with a density between `min_density` and `max_density` on held-out text.
        alive: Those active at least once there.
        dense: Those above `max_density`.
        explained_variance: Of the activations, held out.
        l0: Features active on a token, mean.
        ce_recovered: 1 where the SAE's output in place of the activations leaves the loss as it is, 0 where it
            does as zeros do; None where zeros do no harm.
        ce: Loss as it is.
        ce_zero: Loss with zeros in place of the activations.
        min_density: Lower bound.
        max_density: Upper bound.
    """

    model: str
    step: int
    layer: int
    dictionary_size: int
    learned: int
    alive: int | None
    dense: int | None
    explained_variance: float | None
    l0: float | None
    ce_recovered: float | None
    ce: float | None
    ce_zero: float | None
    min_density: float | None
    max_density: float | None

    @property
    def recovered(self) -> float | None:
        """Cross-entropy recovered, where it says something.

        It is the ratio of two numbers near zero, and says nothing, where zeros in place of the activations raise
        the loss by less than `HARM` nats, as in a model that has hardly been trained.
        """
        if self.ce is None or self.ce_zero is None or self.ce_zero - self.ce < HARM:
            return None
        return self.ce_recovered


@dataclass(frozen=True, kw_only=True)
class GraphRow:
    """What tokens reach in a checkpoint's graph, as shares of the activated features."""

    model: str
    step: int
    layer: int
    activated: int
    mean_l0: float | None
    function: float
    content: float
    top10: float


@dataclass(frozen=True, kw_only=True)
class CheckpointDegreeBin:
    """Degrees of `n` tokens of neighbouring ranks at a checkpoint: 5th, 50th and 95th percentile."""

    model: str
    step: int
    rank: int
    n: int
    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A checkpoint's continuations of a prompt, by mode (`greedy`, `sampled`)."""

    model: str
    step: int
    prompt: str
    by_mode: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Hardest:
    """How far function→content is above the other three groups.

    Attributes:
        model: The series.
        step: Its last checkpoint.
        loss: Mean loss of function→content there.
        next_bucket: The highest of the other three there.
        gap: function→content minus the highest of the other three.
        highest_at: Checkpoints at which it is the highest.
        checkpoints: All checkpoints.
        since: The step from which it is the highest at every checkpoint; None if it is not at the last.
    """

    model: str
    step: int
    loss: float
    next_bucket: str
    gap: Estimate
    highest_at: int
    checkpoints: int
    since: int | None


@dataclass(frozen=True, kw_only=True)
class Halfway:
    """When each group has made half of its fall from the first to the last checkpoint.

    Attributes:
        model: The series.
        first: First checkpoint.
        last: Last checkpoint.
        steps: Step by group, interpolated linearly in log step; infinite for a group that did not fall, which
            counts as the last step in what follows.
        lead: log2 of the step of →content, pooled, minus that of →function, pooled: in doublings of the step.
        order: The earlier of the two →content groups minus the later of the two →function groups, likewise.
    """

    model: str
    first: int
    last: int
    steps: dict[str, float]
    lead: Estimate
    order: Estimate


@dataclass(frozen=True, kw_only=True)
class Gains:
    """How much lower the larger model's losses are.

    Attributes:
        small: The smaller model.
        large: The larger one.
        small_step: Its checkpoint that is compared.
        large_step: The other's.
        ground: Why these two checkpoints.
        by_bucket: Mean loss of the smaller minus that of the larger.
        relative: The same over the smaller model's loss.
        order: The lesser gain of the two →content groups minus the greater of the two →function groups.
        lead: Gain of function→content minus the greatest of the other three.
    """

    small: SeriesRow
    large: SeriesRow
    small_step: int
    large_step: int
    ground: str
    by_bucket: dict[str, Estimate]
    relative: dict[str, float]
    order: Estimate
    lead: Estimate


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the paper's findings are tested by.

    Attributes:
        series: The series, from the smallest model to the largest.
        hardest: One a series; None where a group has no prediction.
        halfway: One a series; None where there is nothing to fall.
        gains: The smallest model against the largest, or why there is none.
        learned: The SAEs, by series and step.
        graphs: The checkpoints' graphs, by series and step.
    """

    series: tuple[SeriesRow, ...]
    hardest: tuple[Hardest | None, ...]
    halfway: tuple[Halfway | None, ...]
    gains: Gains | str
    learned: tuple[LearnedRow, ...]
    graphs: tuple[GraphRow, ...]
