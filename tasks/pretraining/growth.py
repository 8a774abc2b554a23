"""A series of SAEs along pre-training: one size, one a selected checkpoint, judged, and each one's graph (PAPER 1.4).

Nothing here trains or extracts: each checkpoint is a configuration of its own under which the spine's dictionaries
and features run, so their keys, residuals and resumption are the spine's. All SAEs of a run see the same documents,
the same number of residuals and the same seed; they start fresh, or each from the one before (as SAE-Track does).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Sae
from schemas.errors import ConfigError, FunctokError, about
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.work import CorpusShards, Dictionary, FeatureShard
from tasks.dictionaries.dictionaries import find_dictionaries, prepare_dictionaries
from tasks.dictionaries.facts import check_layer
from tasks.graph.extraction import forget_loaded
from tasks.graph.features import extract_features, find_feature_shards
from tasks.models.model import model_dimensions
from tasks.pretraining.checkpoint_jobs import named
from tasks.pretraining.checkpoints import config_of
from tasks.pretraining.learned_features import find_learned, growth_of, judging_parts, write_learned


def selected(config: Config, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints that get an SAE, series in order, steps ascending.

    Of each series `growth.checkpoints`, spread evenly over those it has from the first to the last (one alone is the
    last; a series with fewer gives all), or those at exactly `growth.steps`.

    Raises:
        ConfigError: if a series has no checkpoint at a step that is asked for.
    """
    growth = growth_of(config)
    by_series: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        by_series.setdefault(checkpoint.series, []).append(checkpoint)
    chosen: list[Checkpoint] = []
    for series, found in by_series.items():
        own = sorted(found, key=lambda checkpoint: checkpoint.step)
        if growth.steps is None:
            chosen += [own[index] for index in _spread(len(own), growth.checkpoints)]
            continue
        at = {checkpoint.step: checkpoint for checkpoint in own}
        lacking = [step for step in growth.steps if step not in at]
        if lacking:
            raise ConfigError(
                f"consolidation.growth.steps: series {series} has no checkpoint at step "
                f"{', '.join(map(str, lacking))}; it has them at {', '.join(map(str, at))}",
                hint="choose among those, or give growth.checkpoints, a number, instead",
                stage="growth",
            )
        chosen += [at[step] for step in sorted(set(growth.steps))]
    return chosen


def find_growth(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: Sequence[Checkpoint]
) -> list[GrownSae] | None:
    """Every selected checkpoint's SAE, what it has learned and its graph, or None if anything is missing.

    No weights are read. The hashes that say which documents are held out are computed where nobody has yet, from
    all tokens, and kept (`tasks.corpus.heldout`).

    Raises:
        ConfigError: if a series has no checkpoint at a step that is asked for.
        CorpusError: if no document is left to judge the SAEs.
    """
    found = _find(config, storage, shards, selected(config, checkpoints))
    complete = [grown for grown in found if grown is not None]
    return complete if len(complete) == len(found) else None


def missing_growth(
    config: Config, storage: Storage, shards: CorpusShards, checkpoints: Sequence[Checkpoint]
) -> tuple[int, list[str]]:
    """How many selected checkpoints are done, and a line for each that is not."""
    chosen = selected(config, checkpoints)
    found = _find(config, storage, shards, chosen)
    lines = [
        f"SAE of {checkpoint.series} at step {checkpoint.step}"
        for checkpoint, grown in zip(chosen, found, strict=True)
        if grown is None
    ]
    return len(chosen) - len(lines), lines


def grow(
    config: Config,
    storage: Storage,
    shards: CorpusShards,
    checkpoints: Sequence[Checkpoint],
    progress: Progress = silent,
) -> list[GrownSae]:
    """Make what is missing of the SAE series: SAEs, their judgement on held-out text, and the checkpoints' graphs.

    Args:
        config: The configuration, its tokenizer resolved.
        storage: Where everything is.
        shards: The tokenized corpus.
        checkpoints: All checkpoints; `selected` chooses.
        progress: Called with the progress of each part of the work, named by checkpoint.

    Returns:
        One for each selected checkpoint, series in order, steps ascending.

    Raises:
        ConfigError: if a series has no checkpoint at a step that is asked for.
        CorpusError: if no document is left to judge the SAEs.
        DictionaryError: naming series and step, if the layer is not there or an SAE cannot be trained or falls short.
        ModelError: naming series and step, if a checkpoint cannot be read, or gives what is not finite.
    """
    chosen = selected(config, checkpoints)
    for checkpoint in chosen:
        with named(checkpoint, "growth", FunctokError):
            n_layers = model_dimensions(checkpoint.model, storage)[1]
            check_layer(_entry(config, storage, checkpoint, None), n_layers, checkpoint.model.name)
    parts = judging_parts(config, storage, shards)
    grown: list[GrownSae] = []
    for position, checkpoint in enumerate(chosen, start=1):
        is_next = bool(grown) and grown[-1].checkpoint.series == checkpoint.series
        own = _own_config(config, storage, checkpoint, grown[-1].dictionary if is_next else None)
        where = f"SAE of {checkpoint.series} at step {checkpoint.step} ({position} of {len(chosen)})"
        with named(checkpoint, "growth", FunctokError):
            dictionary, features = _spine(own, storage, shards, _within(progress, where))
            folder = write_learned(config, storage, checkpoint, dictionary, parts, _within(progress, where))
            grown.append(
                GrownSae(checkpoint=checkpoint, dictionary=dictionary, folder=folder, features=features)
            )
        # Modules know each other in circles; the next checkpoint needs their memory.
        gc.collect()
    return grown


def _spine(
    config: Config, storage: Storage, shards: CorpusShards, progress: Progress
) -> tuple[Dictionary, tuple[FeatureShard, ...]]:
    """A checkpoint's SAE and graph, by the spine's own stages."""
    try:
        [dictionary] = prepare_dictionaries(config, storage, shards, progress)
        return dictionary, tuple(extract_features(config, storage, shards, [dictionary], progress))
    finally:
        forget_loaded()


def _find(
    config: Config, storage: Storage, shards: CorpusShards, chosen: Sequence[Checkpoint]
) -> list[GrownSae | None]:
    with about(stage="growth"):
        parts = judging_parts(config, storage, shards)
    starts_fresh = growth_of(config).start == "fresh"
    found: list[GrownSae | None] = []
    before: tuple[str, Dictionary | None] | None = None
    for checkpoint in chosen:
        previous = before[1] if before is not None and before[0] == checkpoint.series else None
        is_known = starts_fresh or before is None or before[0] != checkpoint.series or previous is not None
        own = _own_config(config, storage, checkpoint, previous)
        dictionaries = find_dictionaries(own, storage, shards) if is_known else None
        dictionary = dictionaries[0] if dictionaries else None
        before = checkpoint.series, dictionary
        folder = features = None
        if dictionary is not None:
            folder = find_learned(config, storage, checkpoint, dictionary, parts)
            features = find_feature_shards(own, storage, shards, [dictionary])
        if dictionary is None or folder is None or features is None:
            found.append(None)
            continue
        found.append(
            GrownSae(checkpoint=checkpoint, dictionary=dictionary, folder=folder, features=tuple(features))
        )
    return found


def _own_config(
    config: Config, storage: Storage, checkpoint: Checkpoint, previous: Dictionary | None
) -> Config:
    """The configuration under which the spine makes a checkpoint's SAE and graph."""
    entry = _entry(config, storage, checkpoint, previous)
    return config_of(config, checkpoint).model_copy(update={"sae": [entry]})


def _entry(config: Config, storage: Storage, checkpoint: Checkpoint, previous: Dictionary | None) -> Sae:
    growth = growth_of(config)
    train = growth.train
    if growth.start == "previous" and previous is not None:
        train = train.model_copy(update={"start_from": storage.url(previous.folder)})
    return Sae(layer=growth.layer if checkpoint.layer is None else checkpoint.layer, train=train)


def _spread(n: int, wanted: int) -> list[int]:
    """Indices of `wanted` of n things in equal distances, first and last among them; one alone is the last."""
    if wanted == 1:
        return [n - 1]
    if wanted >= n:
        return list(range(n))
    return [(2 * i * (n - 1) + wanted - 1) // (2 * (wanted - 1)) for i in range(wanted)]


def _within(progress: Progress, where: str) -> Progress:
    def tell(done: int, total: int, what: str) -> None:
        progress(done, total, f"{where}: {what}")

    return tell
