"""The configuration: one TOML file, one frozen pydantic model, which is also the form in the Prefect UI.

Each section is read by named stages only; the stages' content keys pick out what they depend on, so that
changing an unrelated setting recomputes nothing. `schemas.sections` has the spine's sections,
`schemas.pretraining.section` those of PAPER 1.4, `schemas.steering.section` that of PAPER 1.3.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from schemas.errors import ConfigError
from schemas.pretraining.section import (
    Consolidation,
    Generations,
    Growth,
    Losses,
    Pretraining,
    Revision,
    Series,
    Shape,
    Subfolder,
)
from schemas.sections import (
    Activations,
    Corpus,
    Dask,
    DuckDb,
    FunctionTokens,
    Gate,
    Graph,
    Model,
    Sae,
    Section,
    StorageSection,
    Train,
    Windows,
)
from schemas.steering.section import Steering

__all__ = [
    "Activations",
    "Config",
    "Consolidation",
    "Corpus",
    "Dask",
    "DuckDb",
    "FunctionTokens",
    "Gate",
    "Generations",
    "Graph",
    "Growth",
    "Losses",
    "Model",
    "Pretraining",
    "Revision",
    "Sae",
    "Section",
    "Series",
    "Shape",
    "Steering",
    "StorageSection",
    "Subfolder",
    "Train",
    "Windows",
    "consolidation_of",
    "steering_of",
]


class Config(Section):
    """Everything a run depends on."""

    corpus: Corpus
    model: Model = Field(default_factory=lambda: Model(name=""), description="The model, and its tokenizer.")
    sae: list[Sae] = Field(default_factory=list, description="One entry a layer; none counts tokens only.")
    windows: Windows = Field(default_factory=Windows)
    function_tokens: FunctionTokens = Field(default_factory=FunctionTokens)
    activations: Activations = Field(default_factory=Activations)
    graph: Graph = Field(default_factory=Graph)
    consolidation: Consolidation | None = Field(
        None, description="Checkpoints of pre-training: losses by token group, and how features grow."
    )
    losses: Losses = Field(default_factory=Losses)
    steering: Steering | None = Field(
        None, description="Reactivation of features at function tokens, and steering by them."
    )
    duckdb: DuckDb = Field(default_factory=DuckDb)
    dask: Dask = Field(default_factory=Dask)
    storage: StorageSection = Field(default_factory=StorageSection)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        layers = [entry.layer for entry in self.sae]
        if len(set(layers)) != len(layers):
            raise ValueError(f"sae: one entry a layer, but the layers are {layers}")
        if self.sae and not self.corpus.keep_occurrences:
            raise ValueError(
                "corpus.keep_occurrences = false counts only: remove the sae entries, or keep them"
            )
        if not self.model.name and (self.sae or not self._has_tokenizer()):
            raise ValueError("model.name is missing: a directory, a hub id or a .gguf file")
        if self.steering is not None:
            if not self.sae:
                raise ValueError("steering needs dictionaries: add [[sae]] entries")
            if self.steering.layer is not None and self.steering.layer not in layers:
                raise ValueError(
                    f"steering.layer = {self.steering.layer} has no sae entry; the layers are {sorted(layers)}"
                )
        if self.consolidation is not None:
            self.consolidation.check_against(self.model, keeps_occurrences=self.corpus.keep_occurrences)
        return self

    @property
    def subject(self) -> str:
        """What a run is about: the model, or the series that are trained."""
        if self.model.name or self.consolidation is None:
            return self.model.name
        return ", ".join(series.name for series in self.consolidation.series)

    def _has_tokenizer(self) -> bool:
        return bool(self.model.tokenizer) or (
            self.consolidation is not None and self.consolidation.trains_tokenizer
        )


def consolidation_of(config: Config, stage: str = "") -> Consolidation:
    """The section `consolidation`.

    Raises:
        ConfigError: in that stage, if the configuration has none.
    """
    if config.consolidation is None:
        raise ConfigError(
            "this configuration has no consolidation section, so there are no checkpoints",
            stage=stage,
            hint="configs/consolidation.toml shows one",
        )
    return config.consolidation


def steering_of(config: Config, stage: str = "") -> Steering:
    """The section `steering`.

    Raises:
        ConfigError: in that stage, if the configuration has none.
    """
    if config.steering is None:
        raise ConfigError(
            "this configuration has no steering section, so there are no cases",
            stage=stage,
            hint="configs/steering.toml shows one",
        )
    return config.steering
