"""The configuration: one TOML file, one frozen pydantic model, which is also the form in the Prefect UI.

Each section is read by named stages only; the stages' content keys pick out what they depend on, so that
changing an unrelated setting recomputes nothing. `schemas.sections` has the spine's sections,
`schemas.pretraining.section` those of PAPER 1.4, `schemas.steering.section` that of PAPER 1.3.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field, ValidationError, model_validator

from infra.addresses import refuse_secrets, root_name, short_name
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
    "explain",
    "load_config",
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
    def title(self) -> str:
        """What a run is about and where it writes, for its name: `SmolLM2-135M in demo-3f9a1c`."""
        return f"{short_name(self.subject)} in {root_name(self.storage.root, self.storage.endpoint_url)}"

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


Assignment = Annotated[str, "key.path=value"]


def load_config(
    path: str | Path, assignments: list[Assignment] | None = None, root: str | None = None
) -> Config:
    """Read a TOML file, apply `--set key.path=value` and `--root`, and validate.

    Values are parsed as TOML; what is not TOML is taken as a string. A list element is addressed by its
    index (`sae.0.path=…`).

    Raises:
        ConfigError: if the file cannot be read, is not TOML, does not fit the model, or has an address with a
            secret in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {path}: {error}", hint="give the path of a TOML file"
        ) from error
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}", hint="see configs/demo.toml") from error
    for assignment in assignments or []:
        _assign(values, assignment)
    if root is not None:
        _assign_path(values, ["storage", "root"], root)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {_explain(error)}",
            hint="schemas/sections.py, consolidation.py and steering.py say what each key means; configs/ has examples",
        ) from error
    refuse_secrets(config)
    return config


def _explain(error: ValidationError) -> str:
    items = error.errors(include_url=False, include_input=False)
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'configuration'}: {explain(item, Config)}"
        for item in items
    )


def explain(item: Any, root: type[Section]) -> str:
    """What is wrong with one value, from one of a `ValidationError`'s `errors()`.

    Args:
        item: The error: its type, its message and its place.
        root: The model that was validated, where the known keys of an unknown one's place are found.
    """
    if item["type"] != "extra_forbidden":
        return str(item["msg"]).removeprefix("Value error, ")
    section = root
    for part in item["loc"][:-1]:
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    near = difflib.get_close_matches(str(item["loc"][-1]), list(section.model_fields), n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"no such key; {meant}known: {', '.join(section.model_fields)}"


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, itself, optional or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _assign(values: dict[str, Any], assignment: Assignment) -> None:
    key, separator, raw = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"--set {assignment!r} is not of the form key.path=value",
            hint="for example --set windows.context_size=512",
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    _assign_path(values, key.strip().split("."), value)


def _assign_path(values: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = values
    for here, part in enumerate(path):
        last = here == len(path) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--set {'.'.join(path)}: {part!r} is no index of a list of {len(node)}")
            if last:
                node[int(part)] = value
            else:
                node = node[int(part)]
        elif isinstance(node, dict):
            if last:
                node[part] = value
            else:
                node = node.setdefault(part, {})
        else:
            raise ConfigError(f"--set {'.'.join(path)}: {'.'.join(path[:here])} is a value, not a section")
