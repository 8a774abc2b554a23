"""The dictionaries of a run: from the SAELens registry, from disk, or trained here.

Each ends as what SAELens saves (`cfg.json`, `sae_weights.safetensors`) in a folder of the storage named by
content, so that workers load from one place, the network is asked once, and a change is a new key:

- registry: (release, sae_id, SAELens version); SAELens downloads and converts, `save_model` writes;
- disk: the content of both files, copied byte for byte; nothing pickled is ever opened;
- trained here: (residual shards, training section but its gate, content of the SAE that it starts from, what
  an experiment holds out, layer, SAELens version, code version). The gate is asked at every use, so that another
  gate trains nothing again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from infra import verified
from infra.manifest import Manifest, commit, content_key, load, load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Sae, Train
from schemas.errors import DictionaryError, whole_message
from schemas.work import CorpusShards, Dictionary, GraphShard
from tasks.corpus import heldout
from tasks.corpus.graph_documents import graph_shards
from tasks.dictionaries import training as dictionary_training
from tasks.dictionaries.facts import (
    Facts,
    check_facts,
    check_gate,
    check_layer,
    check_model_name,
    facts_of,
    refusal,
    source_of,
    warn_of_differences,
)
from tasks.dictionaries.residuals import forward_key, residual_folder, write_residuals
from tasks.dictionaries.sample import leaves_out
from tasks.dictionaries.sources import (
    FILES,
    copy_saved,
    fetch_registered,
    quiet,
    registered_model,
    saved_content,
    saved_facts,
)
from tasks.dictionaries.start import load_start, start_content, start_facts
from tasks.models.devices import choose_device
from tasks.models.model import model_dimensions, model_key
from tasks.models.names import names_of

VERSION = 1


def prepare_dictionaries(
    config: Config, storage: Storage, shards: CorpusShards, progress: Progress = silent
) -> list[Dictionary]:
    """Make every dictionary of the configuration ready: fetched, copied or trained, and checked.

    Work is kept per layer: what a killed run has finished is not made again.

    Returns:
        One for each `sae` entry, by layer.

    Raises:
        DictionaryError: naming layer and source, if one cannot be had, does not fit the model's residual
            stream, or did not pass its gate.
    """
    d_model, n_layers = model_dimensions(config.model, storage)
    entries = sorted(config.sae, key=lambda entry: entry.layer)
    for entry in entries:
        check_layer(entry, n_layers, config.model.name)
    parts = _training_parts(config, storage, shards, entries)
    keys = {entry.layer: _key(config, storage, entry, parts) for entry in entries}
    done = load_all(storage, [_folder(key) for key in keys.values()])
    missing = [entry for entry in entries if _folder(keys[entry.layer]) not in done]
    made_elsewhere = [entry for entry in missing if entry.train is None]
    for position, entry in enumerate(made_elsewhere):
        _bring(config, storage, entry, keys[entry.layer], d_model, n_layers)
        progress(position + 1, len(made_elsewhere), "dictionaries fetched")
    to_train = [entry for entry in missing if entry.train is not None]
    _train(config, storage, to_train, parts, keys, (d_model, n_layers), progress)
    done = load_all(storage, [_folder(key) for key in keys.values()])
    dictionaries = [
        _checked(config, entry, keys[entry.layer], done[_folder(keys[entry.layer])], (d_model, n_layers))
        for entry in entries
    ]
    for entry, dictionary in zip(entries, dictionaries, strict=True):
        warn_of_differences(_facts(done[dictionary.folder]), entry, config)
    return dictionaries


def known_facts(config: Config, storage: Storage, entry: Sae) -> Facts | None:
    """What can be known of a dictionary, or of the one that its training starts from, before there is a corpus.

    Reads a few kilobytes of a saved one, and nothing from a network of one of the registry.

    Returns:
        None where nothing is known yet: a fresh training, or one of the registry that was never fetched.

    Raises:
        DictionaryError: if its files are missing or damaged, the registry does not have it, or it names another model.
    """
    names = names_of(config.model)
    if entry.train is not None:
        return None if entry.train.start_from is None else start_facts(entry, storage.endpoint_url)
    if entry.path is not None:
        facts = saved_facts(entry, storage.endpoint_url)
        check_model_name(facts.model_name, entry, names)
        return facts
    manifest = load(storage, _folder(_key(config, storage, entry, {})))
    if manifest is None:
        check_model_name(registered_model(entry), entry, names)
        return None
    facts = _facts(manifest)
    check_model_name(facts.model_name, entry, names)
    return facts


def find_dictionaries(config: Config, storage: Storage, shards: CorpusShards) -> list[Dictionary] | None:
    """The dictionaries that are ready and fit, by layer; None if any is missing, changed or refused.

    Reads manifests only: no model, no weights.
    """
    entries = sorted(config.sae, key=lambda entry: entry.layer)
    try:
        parts = _training_parts(config, storage, shards, entries)
        keys = {entry.layer: _key(config, storage, entry, parts) for entry in entries}
        done = load_all(storage, [_folder(key) for key in keys.values()])
        if any(_folder(key) not in done for key in keys.values()):
            return None
        dimensions = model_dimensions(config.model, storage)
        for entry in entries:
            check_layer(entry, dimensions[1], config.model.name)
        return [
            _checked(config, entry, keys[entry.layer], done[_folder(keys[entry.layer])], dimensions)
            for entry in entries
        ]
    except DictionaryError:
        return None


def refused_dictionaries(config: Config, storage: Storage, shards: CorpusShards) -> list[DictionaryError]:
    """Why dictionaries that are there are not used, by layer: they did not pass their gate, or do not fit.

    Their figures stand in their manifests, so that a run which ended at a gate can be asked about later. Manifests are
    found by content: a configuration that asks for other dictionaries finds no old failures.
    """
    entries = sorted(config.sae, key=lambda entry: entry.layer)
    parts = _training_parts(config, storage, shards, entries)
    folders = {entry.layer: _folder(_key(config, storage, entry, parts)) for entry in entries}
    done = load_all(storage, list(folders.values()))
    dimensions = model_dimensions(config.model, storage)
    refused: list[DictionaryError] = []
    for entry in entries:
        folder = folders[entry.layer]
        if folder in done:
            try:
                _checked(config, entry, folder.removeprefix("dictionaries/"), done[folder], dimensions)
            except DictionaryError as error:
                refused.append(error)
    return refused


def load_dictionary(storage: Storage, dictionary: Dictionary, device: str | torch.device = "cpu") -> Any:
    """The SAELens SAE of a dictionary, in float32, on a device.

    Raises:
        DictionaryError: if its files no longer load.
    """
    from sae_lens import SAE

    folder = verified.local_folder(storage, dictionary.folder)
    try:
        with quiet():
            return SAE.load_from_disk(folder, device=str(device), dtype="float32")
    except Exception as error:
        raise DictionaryError(
            f"dictionary of layer {dictionary.layer} in {folder} does not load: {whole_message(error, with_type=True)}",
            hint="delete that folder and run again",
        ) from error


def _folder(key: str) -> str:
    return f"dictionaries/{key}"


def _key(config: Config, storage: Storage, entry: Sae, parts: dict[int, tuple[GraphShard, ...]]) -> str:
    if entry.release is not None:
        source: dict[str, Any] = {"release": entry.release, "sae_id": entry.sae_id}
        return content_key(version=VERSION, sae_lens=version("sae-lens"), registry=source)
    if entry.path is not None:
        return content_key(version=VERSION, disk=saved_content(entry, storage.endpoint_url))
    return content_key(
        version=VERSION, sae_lens=version("sae-lens"), trained=_training_inputs(config, storage, entry, parts)
    )


def _bring(config: Config, storage: Storage, entry: Sae, key: str, d_model: int, n_layers: int) -> None:
    """Fetch or copy a dictionary that others have made, check it, and keep it."""
    with tempfile.TemporaryDirectory() as aside:
        if entry.path is None:
            facts = fetch_registered(entry, Path(aside), d_model, n_layers)
            inputs: dict[str, Any] = {"release": entry.release, "sae_id": entry.sae_id}
        else:
            facts = copy_saved(entry, storage.endpoint_url, Path(aside), d_model, n_layers)
            inputs = {"content": saved_content(entry, storage.endpoint_url)}
        check_model_name(facts.model_name, entry, names_of(config.model))
        inputs["sae_lens"] = version("sae-lens")
        _save(storage, Path(aside), key, inputs, facts)


def _training_parts(
    config: Config, storage: Storage, shards: CorpusShards, entries: Sequence[Sae]
) -> dict[int, tuple[GraphShard, ...]]:
    return {
        entry.layer: training_parts(config, storage, shards, entry.train)
        for entry in entries
        if entry.train is not None
    }


def training_parts(
    config: Config, storage: Storage, shards: CorpusShards, train: Train
) -> tuple[GraphShard, ...]:
    """The graph's first parts that reach `train.max_tokens`, whole: the features stage reads them too."""
    taken: list[GraphShard] = []
    for part in graph_shards(config, shards, storage):
        if sum(before.n_tokens for before in taken) >= train.max_tokens:
            break
        taken.append(part)
    return tuple(taken)


def _training_inputs(
    config: Config, storage: Storage, entry: Sae, parts: dict[int, tuple[GraphShard, ...]]
) -> dict[str, Any]:
    assert entry.train is not None
    forward = forward_key(config, model_key(config.model, storage))
    section = entry.train.model_dump(exclude={"gate", "start_from"})
    if entry.train.start_from is not None:
        section["start_from"] = start_content(entry, storage.endpoint_url)
    inputs: dict[str, Any] = {
        "version": dictionary_training.VERSION,
        "residuals": [residual_folder(part, entry.layer, forward) for part in parts[entry.layer]],
        "train": section,
        "layer": entry.layer,
    }
    if leaves_out(config):
        inputs["left_out"] = {"version": heldout.VERSION, "share": config.heldout_share}
    return inputs


def _train(
    config: Config,
    storage: Storage,
    entries: Sequence[Sae],
    parts: dict[int, tuple[GraphShard, ...]],
    keys: dict[int, str],
    dimensions: tuple[int, int],
    progress: Progress,
) -> None:
    """Train what is missing on residuals of one forward, and keep each layer's result when it is done."""
    if not entries:
        return
    starts = {
        entry.layer: load_start(entry, storage.endpoint_url, *dimensions)
        for entry in entries
        if entry.train is not None and entry.train.start_from is not None
    }
    longest = max((parts[entry.layer] for entry in entries), key=len)
    residuals = write_residuals(config, storage, longest, [entry.layer for entry in entries], progress)
    device = choose_device(config.model.device)
    for entry in entries:
        assert entry.train is not None
        n_parts = len(parts[entry.layer])
        own = [shard for shard in residuals if shard.layer == entry.layer][:n_parts]
        with tempfile.TemporaryDirectory() as aside:
            try:
                quality = dictionary_training.train_dictionary(
                    config, storage, own, entry.train, Path(aside), device, progress, starts.get(entry.layer)
                )
            except DictionaryError as error:
                raise refusal(entry, f"cannot be trained: {error.message}", error.hint) from error
            facts = facts_of(json.loads((Path(aside) / FILES[0]).read_bytes()))
            inputs = _training_inputs(config, storage, entry, parts)
            _save(storage, Path(aside), keys[entry.layer], inputs, facts, quality)


def _save(
    storage: Storage,
    aside: Path,
    key: str,
    inputs: dict[str, Any],
    facts: Facts,
    quality: dict[str, float] | None = None,
) -> None:
    folder = _folder(key)
    written = storage.upload(aside, folder)
    stats = {"facts": facts.as_json(), "quality": quality}
    commit(storage, folder, Manifest(stage="dictionaries", inputs=inputs, stats=stats), written)


def _facts(manifest: Manifest) -> Facts:
    return Facts(**manifest.stats["facts"])


def _checked(
    config: Config, entry: Sae, key: str, manifest: Manifest, dimensions: tuple[int, int]
) -> Dictionary:
    facts = _facts(manifest)
    check_facts(facts, entry, *dimensions)
    check_model_name(facts.model_name, entry, names_of(config.model))
    quality = manifest.stats.get("quality")
    if entry.train is not None and quality is not None:
        check_gate(quality, entry.train.gate, entry)
    return Dictionary(
        layer=entry.layer,
        folder=_folder(key),
        key=key,
        d_sae=facts.d_sae,
        source=source_of(entry),
        quality=quality,
    )
