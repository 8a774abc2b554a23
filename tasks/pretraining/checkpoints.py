"""Checkpoint series: one notion with two sources, trained here or public (PAPER 1.4).

What this module returns names each checkpoint by series and step and says how `tasks.models.model` loads it; nothing
after it can tell the sources apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from infra.addresses import without_credentials
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ConfigError, FunctokError, ModelError
from schemas.pretraining.section import Revision, Series, Subfolder, consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards
from tasks.models.model import is_gguf, model_key
from tasks.pretraining.checkpoint_steps import differing, step_of

_SHOWN_NAMES = 12
_WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")


def find_checkpoints(config: Config, storage: Storage, shards: CorpusShards) -> list[Checkpoint] | None:
    """All checkpoints, series in the configuration's order, steps ascending; None if one is still to be trained.

    Args:
        config: The configuration, its tokenizer resolved (`tasks.corpus.tokenizer_training.with_tokenizer`).
        storage: Where trained ones are.
        shards: The tokenized corpus.

    Raises:
        ConfigError: if a series has no checkpoint, two at one step, or one whose step is unknown.
        ModelError: if a public checkpoint cannot be found.
    """
    found = find_series(config, storage, shards)
    if None in found.values():
        return None
    return [checkpoint for series in found.values() for checkpoint in series or ()]


def find_series(config: Config, storage: Storage, shards: CorpusShards) -> dict[str, list[Checkpoint] | None]:
    """The checkpoints of each series by its name, or None for one that is still to be trained; raises as above."""
    return {
        series.name: _find_series(config, storage, shards, series)
        for series in consolidation_of(config).series
    }


def prepare_checkpoints(
    config: Config, storage: Storage, shards: CorpusShards, progress: Progress = silent
) -> list[Checkpoint]:
    """Train what is missing of the series that are trained here, and find all others.

    Raises:
        ConfigError: as `find_checkpoints`.
        FunctokError: if a training fails.
        ModelError: if a public checkpoint cannot be found, does not fit tokenizer or windows, or a prompt is too long
            for what is trained.
    """
    from tasks.pretraining.checkpoint_jobs import check_checkpoint, named

    section = consolidation_of(config)
    if section.generations is not None and section.trains_here and section.train is not None:
        from tasks.pretraining.generations import check_prompts

        # Before days of training, not after them.
        check_prompts(config, storage, section.train.context_size or config.windows.context_size)
    for series in section.series:
        if _find_series(config, storage, shards, series) is None:
            from tasks.pretraining.training import train_series

            train_series(config, storage, shards, series, progress)
    found = find_checkpoints(config, storage, shards)
    if found is None:
        raise FunctokError("checkpoints vanished while they were made", stage="checkpoints", hint="run again")
    for checkpoint in found:
        # Before the forwards of those that come first; of a hub's, each would cost requests.
        if Path(checkpoint.model.name).is_dir():
            with named(checkpoint, "checkpoints"):
                check_checkpoint(config, storage, checkpoint)
    return found


def config_of(config: Config, checkpoint: Checkpoint) -> Config:
    """The configuration under which the spine's functions read a checkpoint: its model, and no dictionary."""
    return config.model_copy(update={"model": checkpoint.model, "sae": []})


def _find_series(
    config: Config, storage: Storage, shards: CorpusShards, series: Series
) -> list[Checkpoint] | None:
    if series.shape is not None:
        from tasks.pretraining.training import find_trained

        return find_trained(config, storage, shards, series)
    found = _in_folder(config, series) if series.folder is not None else _revisions(config, series)
    steps = [step for step, _ in found]
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        names = [model.revision or model.name for step, model in found if step == twice[0]]
        raise ConfigError(
            f"series {series.name}: two checkpoints are at step {twice[0]}: {', '.join(names)}",
            hint="rename or leave out one, or give their steps: the step is the number behind 'step', or else at a "
            "name's end",
            stage="checkpoints",
        )
    return [
        Checkpoint(
            series=series.name,
            step=step,
            model=model,
            key=model_key(model, storage),
            layer=layer_of(config, series),
            parameters=_count_parameters(model.name),
        )
        for step, model in sorted(found, key=lambda pair: pair[0])
    ]


def layer_of(config: Config, series: Series) -> int | None:
    """The block that the SAEs of a series read; None where no SAE series is asked for."""
    growth = consolidation_of(config).growth
    if growth is None:
        return None
    return growth.layer if series.layer is None else series.layer


def _revisions(config: Config, series: Series) -> list[tuple[int, Model]]:
    name = series.model or config.model.name
    given = [
        (entry.revision, entry.step) if isinstance(entry, Revision) else (entry, None)
        for entry in series.revisions or ()
    ]
    return [
        (step, _model(config, name, revision)) for revision, step in _with_steps(given, series, "revision")
    ]


def _with_steps(
    given: Sequence[tuple[str, int | None]], series: Series, key: Literal["revision", "subfolder"]
) -> list[tuple[str, int]]:
    """Names of checkpoints, and their steps: as given, or else as the names say them.

    Raises:
        ConfigError: if a name does not say its step, or several differ in more than it.
    """
    read = [name for name, step in given if step is None]
    for name in read:
        if step_of(name) is None:
            raise ConfigError(
                f"series {series.name}: the {key} {name!r} does not say its step",
                hint=_how_to_give(name, key),
                stage="checkpoints",
            )
    if differing(read):
        listed = sorted(read, key=lambda name: (step_of(name) or 0, name))
        shown = ", ".join(f"{name} = step {step_of(name)}" for name in listed[:_SHOWN_NAMES])
        raise ConfigError(
            f"series {series.name}: its names differ in more than the step, so their steps cannot be told from them "
            f"(several stages, runs or seeds?); as read: {shown}{' …' * (len(listed) > _SHOWN_NAMES)}",
            hint=f"{_how_to_give(listed[0], key)}, or make a series of each stage or run",
            stage="checkpoints",
        )
    return [(name, (step_of(name) or 0) if step is None else step) for name, step in given]


def _how_to_give(name: str, key: str) -> str:
    return f'give {key}s = [{{ {key} = "{name}", step = … }}, …], steps counted from the start of training'


def _in_folder(config: Config, series: Series) -> list[tuple[int, Model]]:
    if "://" in str(series.folder):
        raise ConfigError(
            f"series {series.name}: {without_credentials(str(series.folder))} is no local folder",
            hint="copy the checkpoints to a disk, or mount it: models are read from local folders and from hubs",
            stage="checkpoints",
        )
    folder = Path(str(series.folder))
    if not folder.is_dir():
        raise ConfigError(
            f"series {series.name}: there is no local folder {folder}",
            hint="give the folder above its checkpoints' own",
            stage="checkpoints",
        )
    children = [child for child in sorted(folder.iterdir()) if (child / "config.json").is_file()]
    given: list[tuple[str, int | None]] = [(child.name, None) for child in children]
    if series.subfolders is not None:
        given = [
            (entry.subfolder, entry.step) if isinstance(entry, Subfolder) else (entry, None)
            for entry in series.subfolders
        ]
        if missing := sorted({name for name, _ in given} - {child.name for child in children}):
            raise ConfigError(
                f"series {series.name}: {folder / missing[0]} has no config.json",
                hint=f"the subfolders that have one: {', '.join(child.name for child in children) or 'none'}",
                stage="checkpoints",
            )
    found = []
    for name, step in _with_steps(given, series, "subfolder"):
        child = folder / name
        if not any(_WEIGHTS.fullmatch(path.name) for path in child.iterdir()):
            raise ConfigError(
                f"series {series.name}: {child} has a config.json, but no weights",
                hint="finish copying it, or move it out of the series' folder",
                stage="checkpoints",
            )
        found.append((step, _model(config, str(child), None)))
    if not found:
        is_one = (folder / "config.json").is_file()
        raise ConfigError(
            f"series {series.name}: no subfolder of {folder} has a config.json"
            + (", but itself has one" if is_one else ""),
            hint=f"give the folder above it, {folder.parent}"
            if is_one
            else "for example step-1000/config.json and step-1000/model.safetensors",
            stage="checkpoints",
        )
    return found


def _model(config: Config, name: str, revision: str | None) -> Model:
    own = config.model
    # The corpus' own tokenizer, so that a checkpoint without one can be read; of a GGUF or a revision, its own.
    shared = own.tokenizer or (own.name if own.name and not is_gguf(own) and not own.revision else None)
    return own.model_copy(update={"name": name, "revision": revision, "tokenizer": shared})


def _count_parameters(name: str) -> int | None:
    """Numbers in the safetensors of a local folder, from their headers alone; None of any other place."""
    from safetensors import SafetensorError, safe_open

    files: Sequence[Path] = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open has no iterator
                    total += math.prod(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged or half copied: {error}",
                hint="copy it again, or move its folder out of the series'",
                stage="checkpoints",
            ) from error
    return total or None
