"""The sections of the configuration for memory consolidation (PAPER 1.4): checkpoints of pre-training.

A checkpoint series is one notion with two sources, trained here or public; nothing after
`tasks.pretraining.checkpoints` can tell which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from schemas.errors import ConfigError
from schemas.sections import ExperimentSection, Gate, Section, Train

if TYPE_CHECKING:
    from schemas.config import Config, SpineConfig

_OPEN_GATE = Gate(min_explained_variance=-1e9, max_l0_deviation=1e9, min_alive_share=0.0)


class Shape(Section):
    """A Llama-architecture model (RMSNorm, rotary positions, SwiGLU), by size."""

    hidden_size: PositiveInt = Field(description="Width of the residual stream.")
    layers: PositiveInt = Field(description="Decoder blocks.")
    heads: PositiveInt = Field(description="Attention heads; hidden_size is a multiple of them.")
    kv_heads: PositiveInt | None = Field(None, description="Key-value heads; none: as many as heads.")
    intermediate_size: PositiveInt | None = Field(
        None, description="Width of the MLP; none: 8/3 of hidden_size, rounded up to a multiple of 32."
    )
    tie_embeddings: bool = Field(True, description="One matrix for embedding and head.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary positions.")

    @model_validator(mode="after")
    def _divides(self) -> Shape:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of heads ({self.heads})"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class Revision(Section):
    """One public checkpoint whose name does not say its step."""

    revision: str = Field(min_length=1, description="Hub revision: branch, tag or commit.")
    step: NonNegativeInt = Field(description="Optimizer step that it was saved at.")


class Subfolder(Section):
    """One checkpoint in a folder whose name does not say its step."""

    subfolder: str = Field(min_length=1, description="Its name in the series' folder.")
    step: NonNegativeInt = Field(description="Optimizer step that it was saved at.")


class Series(Section):
    """Checkpoints of one pre-training run: trained here (`shape`), or public (`revisions`, or a `folder`)."""

    name: str = Field(min_length=1, description="What the tables call it in the column `model`.")
    shape: Shape | None = Field(None, description="Train a model of this shape here.")
    model: str | None = Field(None, description="Hub id that `revisions` are of; none: model.name.")
    revisions: list[str | Revision] | None = Field(
        None,
        min_length=1,
        description="Revisions, such as step1000; where names do not say their steps, or differ in more than the step "
        "(several stages, runs or seeds), they are given as {revision, step}.",
    )
    folder: str | None = Field(
        None,
        description="Local folder with one subfolder a checkpoint, whose name says its step (step-1000).",
    )
    subfolders: list[str | Subfolder] | None = Field(
        None,
        min_length=1,
        description="Those of the folder that are read, as names or as {subfolder, step}; none: all.",
    )
    layer: NonNegativeInt | None = Field(
        None, description="Block that the SAE series reads; none: consolidation.growth.layer."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Series:
        if sum(source is not None for source in (self.shape, self.revisions, self.folder)) != 1:
            raise ValueError(f"series {self.name}: give exactly one of shape, revisions and folder")
        if self.model is not None and self.revisions is None:
            raise ValueError(f"series {self.name}: model goes with revisions")
        if self.subfolders is not None and self.folder is None:
            raise ValueError(f"series {self.name}: subfolders go with folder")
        return self


class Pretraining(Section):
    """How every series with a `shape` is trained: AdamW, linear warm-up, cosine, packed rows."""

    tokens: PositiveInt = Field(description="Tokens shown to each model, repeats included.")
    batch_tokens: PositiveInt = Field(8192, description="Tokens of an optimizer step, over all devices.")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Tokens of one forward on one device; gradients add up to batch_tokens. None: all."
    )
    context_size: PositiveInt | None = Field(
        None, description="Tokens of a packed row; none: windows.context_size."
    )
    learning_rate: float = Field(3e-3, gt=0, description="Peak rate of AdamW.")
    final_rate_share: float = Field(0.1, ge=0, le=1, description="Share of the peak rate at the end.")
    warm_up_share: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising rate.")
    weight_decay: float = Field(0.1, ge=0, description="Of matrices; norms and biases have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of AdamW's second moment.")
    max_gradient_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    vocabulary_size: PositiveInt | None = Field(
        None,
        ge=300,
        description="Train a byte-level BPE tokenizer of this size on the corpus; none: an existing one.",
    )
    checkpoints: int = Field(
        8, ge=2, description="Checkpoints kept, log-spaced in steps from first_checkpoint to the last step."
    )
    first_checkpoint: PositiveInt = Field(1, description="Step of the first checkpoint kept.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where it is trained on CUDA, float32 on CPU."
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: on CUDA, with a C compiler."
    )
    state_every: PositiveInt = Field(
        100, description="Steps between saved training states; a killed run goes on from the last."
    )
    processes: int = Field(
        0, ge=0, description="Processes of `accelerate launch`; 0: one a CUDA device, one on CPU."
    )
    fsdp: bool = Field(False, description="Shard model and optimizer over several processes (FSDP).")
    seed: int = Field(0, ge=0, description="Seed of initialization and of the order of documents.")


class Growth(Section):
    """A series of SAEs of one size, one a selected checkpoint, and what they have learned."""

    layer: NonNegativeInt = Field(description="Decoder block whose output is read, counted from 0.")
    checkpoints: PositiveInt = Field(
        3, description="Checkpoints of each series, spread evenly over those it has, the last among them."
    )
    steps: list[NonNegativeInt] | None = Field(None, min_length=1, description="Exactly these steps instead.")
    start: Literal["fresh", "previous"] = Field(
        "fresh",
        description="Where each SAE's weights start: fresh, or the previous checkpoint's SAE (SAE-Track).",
    )
    train: Train = Field(
        description="The SAE; its gate is open by default: the figures stand beside the count."
    )
    min_density: float = Field(
        1e-4,
        ge=0,
        lt=1,
        description="A feature is learned if active on at least this share of held-out tokens …",
    )
    max_density: float = Field(0.1, gt=0, le=1, description="… and on at most this share.")
    max_tokens: PositiveInt = Field(100_000, description="Held-out tokens that judge an SAE, at most.")

    @model_validator(mode="before")
    @classmethod
    def _open_gate(cls, values: object) -> object:
        if (
            isinstance(values, dict)
            and isinstance(values.get("train"), dict)
            and "gate" not in values["train"]
        ):
            values = {**values, "train": {**values["train"], "gate": _OPEN_GATE.model_dump()}}
        return values

    @model_validator(mode="after")
    def _bounds(self) -> Growth:
        if self.start == "previous" and self.train.start_from is not None:
            raise ValueError(
                "growth.start = previous and growth.train.start_from are two starts: leave one out"
            )
        if self.min_density >= self.max_density:
            raise ValueError("growth.min_density must be below growth.max_density")
        return self


class Generations(Section):
    """Continuations of fixed prompts at every checkpoint: greedy, and sampled with a fixed seed."""

    prompts: list[str] = Field(min_length=1, description="Prompts, as plain text.")
    max_new_tokens: PositiveInt = Field(40, description="Tokens generated at most.")
    temperature: float = Field(0.8, gt=0, description="Of the sampled continuation.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus of the sampled continuation.")
    seed: int = Field(0, ge=0, description="Seed of the sampled continuation.")

    @model_validator(mode="after")
    def _once(self) -> Generations:
        twice = sorted({prompt for prompt in self.prompts if self.prompts.count(prompt) > 1})
        if twice:
            raise ValueError(f"generations.prompts: {twice[0]!r} is there twice")
        return self


class Losses(ExperimentSection):
    """The cross-entropy of next-token predictions on held-out documents."""

    keep_tokens: bool = Field(
        True, description="Keep every prediction's loss (the table token_losses); false: sums by document."
    )
    max_tokens: PositiveInt | None = Field(
        1_000_000, description="Held-out tokens at most: documents in file order while they fit."
    )
    resamples: int = Field(
        1000,
        ge=100,
        description="Bootstrap resamples of documents for the intervals; fewer have no 95 % to show.",
    )


class Consolidation(ExperimentSection):
    """Checkpoint series, and what is asked of them (PAPER 1.4)."""

    series: list[Series] = Field(min_length=1, description="One entry a pre-training run.")
    train: Pretraining | None = Field(None, description="How series with a shape are trained.")
    heldout_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Share of the documents, by a hash of their tokens, that no training here sees; losses are theirs.",
    )
    growth: Growth | None = Field(None, description="SAEs of selected checkpoints; none: no SAE series.")
    generations: Generations | None = Field(None, description="Sample continuations; none: none.")

    @property
    def trains_here(self) -> bool:
        """Whether any series is trained here."""
        return any(series.shape is not None for series in self.series)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the corpus' tokenizer is trained here."""
        return self.trained_vocabulary is not None

    def layer_of(self, series: Series) -> int | None:
        """The block that the SAEs of a series read; None where no SAE series is asked for."""
        return None if self.growth is None else self.growth.layer if series.layer is None else series.layer

    @model_validator(mode="after")
    def _complete(self) -> Consolidation:
        names = [series.name for series in self.series]
        if len(set(names)) != len(names):
            raise ValueError(
                f"consolidation.series: every series needs a name of its own, but they are {names}"
            )
        if self.trains_here and self.train is None:
            raise ValueError("a series with a shape is trained here: give [consolidation.train]")
        for series in self.series:
            layer = self.layer_of(series)
            if series.shape is not None and layer is not None and layer >= series.shape.layers:
                raise ValueError(
                    f"series {series.name} has {series.shape.layers} blocks, so its SAEs cannot read layer {layer}: "
                    "set its own `layer`, counted from 0"
                )
        if self.trains_here and self.heldout_share >= 1:
            raise ValueError("heldout_share = 1 leaves nothing to train on")
        return self

    def check_against(self, config: SpineConfig) -> None:
        """Whether tokens are kept, and it is clear which model and which tokenizer are meant.

        Raises:
            ValueError: if not.
        """
        model = config.model
        if not config.corpus.keep_occurrences:
            raise ValueError("consolidation needs corpus.keep_occurrences = true")
        for series in self.series:
            if series.revisions is not None and not (series.model or model.name):
                raise ValueError(
                    f"series {series.name}: revisions of which model? Give model.name or its own model"
                )
        if self.trains_tokenizer and (model.tokenizer or model.name):
            raise ValueError(
                "consolidation.train.vocabulary_size trains the tokenizer: leave model.name and model.tokenizer out"
            )
        if not self.trains_tokenizer and not (model.name or model.tokenizer):
            raise ValueError("which tokenizer? Give model.tokenizer, or consolidation.train.vocabulary_size")

    @property
    def subject(self) -> str:
        """The series' names."""
        return ", ".join(series.name for series in self.series)

    @property
    def trained_vocabulary(self) -> int | None:
        """That of `consolidation.train`."""
        return None if self.train is None else self.train.vocabulary_size

    @property
    def held_out(self) -> float:
        """Those that its losses are of."""
        return self.heldout_share


def consolidation_of(config: Config) -> Consolidation:
    """The section `consolidation`.

    Raises:
        ConfigError: if the configuration has none.
    """
    section = config.section(Consolidation)
    if section is None:
        raise ConfigError(
            "this configuration has no consolidation section", hint="configs/consolidation.toml shows one"
        )
    return section


def losses_of(config: Config) -> Losses:
    """The section `losses`, which every configuration has."""
    section = config.section(Losses)
    assert section is not None
    return section
