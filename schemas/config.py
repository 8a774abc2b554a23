"""The configuration: one TOML file, one frozen pydantic model, which is also the form in the Prefect UI.

Each section is read by named stages only; the stages' content keys pick out what they depend on, so that
changing an unrelated setting recomputes nothing. `schemas.sections` has the spine's sections, `schemas.<experiment>`
those of an experiment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeVar

from pydantic import Field, create_model, model_validator

from schemas.experiments import asked_for, experiment_rooms
from schemas.sections import (
    Activations,
    Corpus,
    Dask,
    DuckDb,
    ExperimentSection,
    Features,
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

__all__ = [
    "Activations",
    "Config",
    "Corpus",
    "Dask",
    "DuckDb",
    "Features",
    "FunctionTokens",
    "Gate",
    "Graph",
    "Model",
    "Sae",
    "Section",
    "StorageSection",
    "Train",
    "Windows",
]

S = TypeVar("S", bound=ExperimentSection)


class SpineConfig(Section):
    """Everything a run depends on."""

    corpus: Corpus
    model: Model = Field(default_factory=lambda: Model(name=""), description="The model, and its tokenizer.")
    sae: list[Sae] = Field(default_factory=list, description="One entry a layer; none counts tokens only.")
    windows: Windows = Field(default_factory=Windows)
    function_tokens: FunctionTokens = Field(default_factory=FunctionTokens)
    activations: Activations = Field(default_factory=Activations)
    graph: Graph = Field(default_factory=Graph)
    features: Features = Field(default_factory=Features)
    duckdb: DuckDb = Field(default_factory=DuckDb)
    dask: Dask = Field(default_factory=Dask)
    storage: StorageSection = Field(default_factory=StorageSection)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers = [entry.layer for entry in self.sae]
        if len(set(layers)) != len(layers):
            raise ValueError(f"sae: one entry a layer, but the layers are {layers}")
        if self.sae and not self.corpus.keep_occurrences:
            raise ValueError(
                "corpus.keep_occurrences = false counts only: remove the sae entries, or keep them"
            )
        if self.features.logits and not self.sae:
            raise ValueError("features.logits needs sae entries, whose decoders it reads")
        has_tokenizer = self.model.tokenizer or self.vocabulary_size is not None
        if not self.model.name and (self.sae or not has_tokenizer):
            raise ValueError("model.name is missing: a directory, a hub id or a .gguf file")
        for section in self.experiments:
            section.check_against(self)
        return self

    @property
    def experiments(self) -> tuple[ExperimentSection, ...]:
        """The sections of the experiments that are asked for, in their order."""
        asked = asked_for(self)
        return tuple(
            section
            for room in experiment_rooms()
            if room.name in asked
            for name in room.sections
            if (section := getattr(self, name)) is not None
        )

    def section(self, kind: type[S]) -> S | None:
        """An experiment's section; None where it is left out."""
        sections = (getattr(self, name) for room in experiment_rooms() for name in room.sections)
        return next((section for section in sections if isinstance(section, kind)), None)

    @property
    def subject(self) -> str:
        """What a run is about: the model, or what an experiment has instead."""
        return self.model.name or ", ".join(filter(None, (section.subject for section in self.experiments)))

    @property
    def vocabulary_size(self) -> int | None:
        """Tokens of the tokenizer that is trained on the corpus; None where an existing one is used."""
        sizes = (section.trained_vocabulary for section in self.experiments)
        return next((size for size in sizes if size is not None), None)

    @property
    def heldout_share(self) -> float | None:
        """Share of the documents, by a hash of their tokens, that no training may see; None where none is held out."""
        shares = (section.held_out for section in self.experiments)
        return max((share for share in shares if share is not None), default=None)

    @property
    def needs_head(self) -> bool:
        """Whether the model's own predictions are asked for, not its residual stream alone."""
        return self.features.logits or any(section.needs_head for section in self.experiments)


if TYPE_CHECKING:

    class Config(SpineConfig):
        """The spine's configuration and the experiments' sections, which `section` finds."""

else:
    Config = create_model(
        "Config",
        __base__=SpineConfig,
        __module__=__name__,
        __doc__=SpineConfig.__doc__,
        **{name: field for room in experiment_rooms() for name, field in room.sections.items()},
    )
