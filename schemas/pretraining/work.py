"""The values that the stages of pre-training hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.sections import Model
from schemas.work import Dictionary, FeatureShard, HeldoutPart


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a pre-training run, wherever it comes from.

    Attributes:
        series: Name of the run; the column `model` of the tables.
        step: Optimizer step that it was saved at.
        model: How `tasks.models.model` finds it: a folder of the storage, a local one, or a hub revision.
        key: Content key of its weights (`tasks.models.model.model_key`).
        layer: Block that the series' SAEs read; None where no SAE series is asked for.
        tokens: Tokens that it was shown, where that is known.
        parameters: Numbers in its weights, tied ones once, where that is known.
    """

    series: str
    step: int
    model: Model
    key: str
    layer: int | None = None
    tokens: int | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class LossShard:
    """One checkpoint's losses over one held-out part.

    Its folder holds `document_losses.parquet` and, where kept, `token_losses.parquet`.
    """

    checkpoint: Checkpoint
    part: HeldoutPart
    folder: str
    n_predictions: int


@dataclass(frozen=True, kw_only=True)
class GrownSae:
    """One checkpoint's SAE, judged on held-out text, and its graph.

    Attributes:
        checkpoint: The checkpoint.
        dictionary: Its SAE.
        folder: Folder of `learned.parquet`, one row of the table `learned_features` without model and step.
        features: The checkpoint's graph, by the spine's own features stage.
    """

    checkpoint: Checkpoint
    dictionary: Dictionary
    folder: str
    features: tuple[FeatureShard, ...]


@dataclass(frozen=True, kw_only=True)
class GeneratedTexts:
    """One checkpoint's continuations; its folder holds `generations.parquet`."""

    checkpoint: Checkpoint
    folder: str
