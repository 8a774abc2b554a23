"""Public checkpoint series: folders and hub revisions, in the order of their optimizer steps (PAPER 1.4).

A step is given, or it is the number behind `step`, `checkpoint`, `ckpt` or `iter` in a checkpoint's name, or else the
one that the name ends in. A series is one run of training: its names may differ in the step, in a count of tokens that
grows with it, and in nothing else. Where they do (several stages, runs or seeds), one step may stand for two places of
the training, and no order of the numbers is that of the training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from infra.addresses import without_credentials
from schemas.config import Config
from schemas.errors import ConfigError, ModelError, about
from schemas.pretraining.section import Revision, Series, Subfolder
from schemas.sections import Model
from tasks.models.files import is_gguf

_SHOWN_NAMES = 12
_WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")
_WORD = r"(?:global[-_]?)?(?:step|checkpoint|ckpt|iter(?:ation)?)s?"
# A unit may follow, and the tokens seen: TinyLlama's checkpoints are named step-50K-105b. What joins other digits
# separates no words: of 1e4, 1.5K, 1,000, 1_000 and 8-1000 none is read as its first number.
_STEP_BY_WORD = re.compile(
    rf"(?<![A-Za-z\d]){_WORD}[-_=]?(?P<number>\d+)(?P<unit>[KkMm]?)(?P<tokens>[-_]\d+(?:\.\d+)?[BbTt])?"
    r"(?![A-Za-z\d]|[.,_:-]\d)",
    re.IGNORECASE,
)
# Without such a word, pythia-70m is a size, v2 a version, and 2024-01-15 a day.
_LAST_NUMBER = re.compile(r"(?:^|(?<![\d][-_.,:])(?<=[-_]))(?P<number>\d+)(?P<unit>)(?P<tokens>)$")
_HAS_WORD = re.compile(rf"(?<![A-Za-z]){_WORD}(?![A-Za-z])", re.IGNORECASE)
_TOKENS = re.compile(r"tokens?[-_=]?(\d+(?:\.\d+)?[KMBT])|(\d+(?:\.\d+)?[KMBT])[-_]?tokens?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def public_checkpoints(config: Config, series: Series) -> list[tuple[int, Model]]:
    """The checkpoints of a series that others have trained: steps, ascending, and how each is loaded.

    Raises:
        ConfigError: if it has no checkpoint, two at one step, or one whose step is unknown.
    """
    with about(stage="checkpoints"):
        found = _in_folder(config, series) if series.folder is not None else _revisions(config, series)
        return _in_order(series, found)


def _in_order(series: Series, found: Sequence[tuple[int, Model]]) -> list[tuple[int, Model]]:
    steps = [step for step, _ in found]
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        names = [model.revision or model.name for step, model in found if step == twice[0]]
        raise ConfigError(
            f"series {series.name}: two checkpoints are at step {twice[0]}: {', '.join(names)}",
            hint="rename or leave out one, or give their steps: the step is the number behind 'step', or else at a "
            "name's end",
        )
    return sorted(found, key=lambda pair: pair[0])


def count_parameters(name: str) -> int | None:
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


def step_of(name: str) -> int | None:
    """The step that a name says; None where it says none, or more than one."""
    match = _match(name)
    return None if match is None else int(match["number"]) * _UNITS[match["unit"].upper()]


def differing(names: Sequence[str]) -> bool:
    """Whether names that say their steps differ in more than that, and in a count of tokens that grows with it."""
    if len({_rest(name) for name in names}) > 1:
        return True
    in_order = sorted(names, key=lambda name: step_of(name) or 0)
    tokens = [_tokens(name) for name in in_order]
    return any(after < before for before, after in pairwise(tokens))


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
    """Names of checkpoints, and their steps: as given, or else as the names say them."""
    read = [name for name, step in given if step is None]
    for name in read:
        if step_of(name) is None:
            raise ConfigError(
                f"series {series.name}: the {key} {name!r} does not say its step",
                hint=_how_to_give(name, key),
            )
    if differing(read):
        listed = sorted(read, key=lambda name: (step_of(name) or 0, name))
        shown = ", ".join(f"{name} = step {step_of(name)}" for name in listed[:_SHOWN_NAMES])
        raise ConfigError(
            f"series {series.name}: its names differ in more than the step, so their steps cannot be told from them "
            f"(several stages, runs or seeds?); as read: {shown}{' …' * (len(listed) > _SHOWN_NAMES)}",
            hint=f"{_how_to_give(listed[0], key)}, or make a series of each stage or run",
        )
    return [(name, (step_of(name) or 0) if step is None else step) for name, step in given]


def _how_to_give(name: str, key: str) -> str:
    return f'give {key}s = [{{ {key} = "{name}", step = … }}, …], steps counted from the start of training'


def _in_folder(config: Config, series: Series) -> list[tuple[int, Model]]:
    if "://" in str(series.folder):
        raise ConfigError(
            f"series {series.name}: {without_credentials(str(series.folder))} is no local folder",
            hint="copy the checkpoints to a disk, or mount it: models are read from local folders and from hubs",
        )
    folder = Path(str(series.folder))
    if not folder.is_dir():
        raise ConfigError(
            f"series {series.name}: there is no local folder {folder}",
            hint="give the folder above its checkpoints' own",
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
            )
    found = []
    for name, step in _with_steps(given, series, "subfolder"):
        child = folder / name
        if not any(_WEIGHTS.fullmatch(path.name) for path in child.iterdir()):
            raise ConfigError(
                f"series {series.name}: {child} has a config.json, but no weights",
                hint="finish copying it, or move it out of the series' folder",
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
        )
    return found


def _model(config: Config, name: str, revision: str | None) -> Model:
    own = config.model
    # The corpus' own tokenizer, so that a checkpoint without one can be read; of a GGUF or a revision, its own.
    shared = own.tokenizer or (own.name if own.name and not is_gguf(own) and not own.revision else None)
    return own.model_copy(update={"name": name, "revision": revision, "tokenizer": shared})


def _match(name: str) -> re.Match[str] | None:
    found = list(_STEP_BY_WORD.finditer(name))
    if found or _HAS_WORD.search(name):
        return found[0] if len(found) == 1 else None
    return _LAST_NUMBER.search(name)


def _rest(name: str) -> str:
    """What a name says beside its step and a count of tokens; how its words are joined is no matter."""
    match = _match(name)
    assert match is not None
    rest = f"{name[: match.start()]} {name[match.end() :]}"
    return " ".join(re.split(r"[-_=\s]+", _TOKENS.sub(" ", rest).lower())).strip()


def _tokens(name: str) -> float:
    """The tokens that a name says were seen; 0 where it says none."""
    match, step = _TOKENS.search(name), _match(name)
    assert step is not None
    said = (match[1] or match[2]) if match is not None else (step["tokens"] or "").lstrip("-_")
    return float(said[:-1]) * _UNITS[said[-1].upper()] if said else 0.0
