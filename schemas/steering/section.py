"""The section of the configuration for reactivation and steering (PAPER 1.3), and the file of cases it names.

Cases are data: prompts that differ in one place, contrastive prompts that make a trait, and prompts to steer.
They lie in a TOML file of their own, so that other cases are another file.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from schemas.sections import ExperimentSection, Section

if TYPE_CHECKING:
    from schemas.config import Config, SpineConfig

Mode = Literal["add", "clamp"]
Place = Literal["last function token", "all positions", "content token"]
"""Where in a prompt an intervention acts; `content token` is a control."""

_SHOWN_CHARACTERS = 60


def short(text: str) -> str:
    """The beginning of a prompt, for messages."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…")


class Steering(ExperimentSection):
    """Whether function tokens carry the context's features, and whether setting one decides the answer."""

    cases: str = Field(
        min_length=1, description="TOML file (a path or any fsspec URL) of [[case]], [[trait]] and [[steer]]."
    )
    chat_template: bool = Field(
        True,
        description="Put prompts into the model's chat template, where its tokenizer has one. Templates that show "
        "today's date are given 26 July 2024, so that a prompt stays the same.",
    )
    layer: int | None = Field(
        None, ge=0, description="Layer to steer at; none: each trait's most informative one."
    )
    features: PositiveInt = Field(4, description="Strongest features of a trait that are steered together.")
    decomposition: Literal["activations", "encoder"] = Field(
        "activations",
        description="How a trait's mean difference becomes features: the difference of their mean activations, or "
        "the difference of residuals passed through the encoder's weights.",
    )
    modes: list[Mode] = Field(
        ["add", "clamp"],
        min_length=1,
        description="add: strength × coefficient × decoder direction; clamp: the feature's activation becomes "
        "strength × its mean activation over the trait's positive prompts that activate it.",
    )
    strengths: list[FiniteFloat] = Field(
        [1.0, 2.0, 4.0, 8.0],
        min_length=1,
        description="Strengths swept, 1 or more where features are clamped. 0, the unsteered model, is always added.",
    )
    places: list[Literal["last function token", "all positions"]] = Field(
        ["last function token", "all positions"],
        min_length=1,
        description="Steer at the prompt's last function token alone, or at every position, generated ones too.",
    )
    random_controls: int = Field(
        3, ge=0, description="Draws of random features, moved by as much as the trait's, for each setting."
    )
    max_new_tokens: PositiveInt = Field(20, description="Tokens generated at most, greedily.")
    batch_size: PositiveInt = Field(32, description="Rows of a forward at most.")
    resamples: int = Field(1000, ge=100, description="Resamples of the cases for 95 % intervals.")
    seed: int = Field(0, ge=0, description="Seed of the random controls.")

    @field_validator("strengths")
    @classmethod
    def _with_zero(cls, strengths: list[float]) -> list[float]:
        return sorted({0.0, *strengths})

    @model_validator(mode="after")
    def _can_clamp(self) -> Steering:
        low = [strength for strength in self.strengths if strength < 1 and strength != 0]
        if "clamp" in self.modes and low:
            raise ValueError(
                f"at strength {low[0]:g} a clamped feature may be at or below its threshold, where the encoder "
                'reads 0: leave out strengths below 1, or set modes = ["add"]'
            )
        return self

    @field_validator("modes", "places")
    @classmethod
    def _once(cls, values: list[str]) -> list[str]:
        return list(dict.fromkeys(values))

    def check_against(self, config: SpineConfig) -> None:
        """Whether there are dictionaries, and one at the layer to steer at.

        Raises:
            ValueError: if there are not.
        """
        layers = sorted(entry.layer for entry in config.sae)
        if not layers:
            raise ValueError("steering needs dictionaries: add [[sae]] entries")
        if self.layer is not None and self.layer not in layers:
            raise ValueError(f"steering.layer = {self.layer} has no sae entry; the layers are {layers}")

    @property
    def subject(self) -> str:
        """The file of cases."""
        return self.cases.rsplit("/", 1)[-1]

    @property
    def needs_head(self) -> bool:
        """True: answers are measured."""
        return True


def steering_of(config: Config) -> Steering:
    """The section `steering`, of a configuration that has one."""
    section = config.section(Steering)
    assert section is not None
    return section


class Case(Section):
    """Two or more prompts that differ in one place, so that the same later tokens can be compared."""

    name: str = Field(min_length=1)
    relation: str = Field(min_length=1, description="What kind of knowledge; other relations are controls.")
    prompts: list[str] = Field(min_length=2)
    targets: list[str] | None = Field(None, description="What each prompt should be answered with.")
    look_at: list[str] | None = Field(
        None, min_length=1, description="Texts of the later function tokens that count; none: all of them."
    )

    @model_validator(mode="after")
    def _possible(self) -> Case:
        for number, prompt in enumerate(self.prompts, 1):
            if not prompt.strip():
                raise ValueError(f"prompt {number} is empty")
        if len(set(self.prompts)) < len(self.prompts):
            raise ValueError("two of its prompts are the same")
        if self.targets is not None and len(self.targets) != len(self.prompts):
            raise ValueError(f"{len(self.prompts)} prompts have {len(self.targets)} targets")
        return self

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"[[case]] {self.name!r}"


class Trait(Section):
    """What is steered: found from contrastive prompts, or given as features of a layer."""

    name: str = Field(min_length=1)
    positive: list[str] | None = Field(None, min_length=2, description="Prompts that show the trait.")
    negative: list[str] | None = Field(
        None, min_length=2, description="The same prompts without it, in the same order."
    )
    layer: int | None = Field(None, ge=0, description="Layer of the given features.")
    features: list[NonNegativeInt] | None = Field(
        None, min_length=1, description="Feature ids, where they are known."
    )
    values: list[FiniteFloat] | None = Field(None, description="Their activations at strength 1.")

    @model_validator(mode="after")
    def _one_source(self) -> Trait:
        contrast, given = (self.positive, self.negative), (self.layer, self.features, self.values)
        found, known = all(part is not None for part in contrast), all(part is not None for part in given)
        if found == known or any(part is not None for part in (given if found else contrast)):
            raise ValueError("give either positive and negative prompts, or layer, features and values")
        if self.positive is not None and self.negative is not None:
            if len(self.positive) != len(self.negative):
                raise ValueError(
                    f"{len(self.positive)} positive prompts have {len(self.negative)} negative ones"
                )
            for prompt in (*self.positive, *self.negative):
                if not prompt.strip():
                    raise ValueError("one of its prompts is empty")
        if self.features is not None and self.values is not None:
            if len(self.features) != len(self.values):
                raise ValueError(f"{len(self.features)} features have {len(self.values)} values")
            if len(set(self.features)) < len(self.features):
                raise ValueError("a feature is named twice")
        return self

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"[[trait]] {self.name!r}"


class Steer(Section):
    """One experiment: a prompt, the traits to give it, and the text that they should make likelier."""

    traits: list[str] = Field(min_length=1, description="Names of traits; several are steered at once.")
    prompt: str
    target: str = Field(
        min_length=1,
        description="Continuation whose log-probability after the prompt is measured, with its spaces.",
    )
    name: str = Field("", description="What the table calls it; none: its traits.")

    @model_validator(mode="after")
    def _possible(self) -> Steer:
        if not self.prompt.strip():
            raise ValueError("its prompt is empty")
        if len(set(self.traits)) < len(self.traits):
            raise ValueError("a trait is named twice")
        return self

    @property
    def title(self) -> str:
        """Its name, or its traits'."""
        return self.name or " + ".join(self.traits)

    @property
    def label(self) -> str:
        """How messages name it; several experiments may have one title."""
        return f"[[steer]] {self.title!r}, {short(self.prompt)}"


class Cases(Section):
    """A file of cases."""

    case: list[Case] = Field(default_factory=list)
    trait: list[Trait] = Field(default_factory=list)
    steer: list[Steer] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> Cases:
        for kind, names in (("case", [c.name for c in self.case]), ("trait", [t.name for t in self.trait])):
            twice = sorted(name for name, n in Counter(names).items() if n > 1)
            if twice:
                raise ValueError(f"two [[{kind}]] entries have the name {twice[0]!r}")
        experiments = Counter((steer.title, steer.prompt, steer.target) for steer in self.steer)
        for experiment, n in experiments.items():
            if n > 1:
                raise ValueError(f"two [[steer]] entries are the same: {experiment[0]!r}, {experiment[1]!r}")
        known = dict.fromkeys(trait.name for trait in self.trait)
        for steer in self.steer:
            for name in steer.traits:
                if name not in known:
                    raise ValueError(
                        f"[[steer]] {steer.title!r} names the trait {name!r}; there are {', '.join(known) or 'none'}"
                    )
        if not self.case and not self.steer:
            raise ValueError("it has neither a [[case]] nor a [[steer]]")
        return self
