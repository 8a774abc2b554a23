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
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from infra import verified
from infra.manifest import Manifest, content_key, load, load_all
from infra.storage import Storage
from schemas.config import Config, Sae, Train
from schemas.errors import ConfigError, DictionaryError, FunctokError, whole_message
from schemas.work import CorpusShards, Dictionary, GraphShard
from tasks.corpus import heldout
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries import training
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
from tasks.dictionaries.residuals import Residuals, ResidualShard, forward_key, place_of
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
from tasks.engine.run import Run, make
from tasks.engine.stage import Made, Question, Shown, Stage, Unit
from tasks.models.devices import choose_device
from tasks.models.model import model_dimensions, model_key
from tasks.models.names import names_of

VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryUnit(Unit):
    """The dictionary of one layer.

    Attributes:
        entry: Its entry of the configuration.
        parts: What it is trained on; empty where it is not trained here.
    """

    entry: Sae
    parts: tuple[GraphShard, ...] = ()


U = TypeVar("U", bound=Unit)
R = TypeVar("R")


class LayersStage(Stage[U, R]):
    """A stage of the layers that a configuration has `sae` entries for."""

    def applies(self, config: Config) -> bool:
        """Where there is a graph to make."""
        return bool(config.sae)

    def refuse(self, config: Config) -> FunctokError:
        """No layer is asked for."""
        return ConfigError(
            "this configuration has no sae entry, so it counts tokens only",
            stage=self.name,
            hint="add [[sae]] entries, or run the stages tokenize, tables and report",
        )

    def subject(self, config: Config) -> str:
        """The layers."""
        return f"layer {', '.join(str(entry.layer) for entry in config.sae)}"


class Dictionaries(LayersStage[DictionaryUnit, list[Dictionary]]):
    """Every dictionary of the configuration: fetched, copied or trained, and checked."""

    name = "dictionaries"
    needs = (TOKENIZE,)
    measure = ""
    things = "dictionaries"
    changed = "a layer's is new, or what makes it changed"
    libraries = ("torch", "sae_lens")
    tops = ("dictionaries", "residuals")

    def units(self, run: Run) -> Sequence[DictionaryUnit]:
        """One for each `sae` entry, by layer. Reads no weights, but the content of saved ones is hashed.

        Raises:
            DictionaryError: if the model does not have a layer, or the files of a saved one are missing.
        """
        shards, n_layers = run.result(TOKENIZE), model_dimensions(run.config.model, run.storage)[1]
        for entry in run.config.sae:
            check_layer(entry, n_layers, run.config.model.name)
        units = []
        for entry in sorted(run.config.sae, key=lambda entry: entry.layer):
            train = entry.train
            parts = () if train is None else training_parts(run.config, run.storage, shards, train)
            units.append(
                DictionaryUnit(
                    top="dictionaries",
                    inputs=_key_inputs(run.config, run.storage, entry, parts),
                    about=f"the dictionary of layer {entry.layer} ({source_of(entry)})",
                    # One forward gives the residuals of all layers that are trained.
                    together="brought" if train is None else "trained",
                    entry=entry,
                    parts=parts,
                )
            )
        return units

    def refused(
        self, run: Run, units: Sequence[DictionaryUnit], done: Mapping[str, Manifest]
    ) -> Sequence[FunctokError]:
        """Dictionaries that did not pass their gate, or do not fit, by layer.

        Their figures stand in their manifests, so that a run which ended at a gate can be asked about later.
        """
        dimensions = model_dimensions(run.config.model, run.storage)
        refused: list[FunctokError] = []
        for unit in units:
            if unit.folder in done:
                try:
                    _checked(run.config, unit, done[unit.folder], dimensions)
                except DictionaryError as error:
                    refused.append(error)
        return refused

    def prepare(self, run: Run, missing: Sequence[DictionaryUnit]) -> Sequence[DictionaryUnit]:
        """Those that others have made come first: what is wrong with one is told before hours of training."""
        return sorted(missing, key=lambda unit: unit.entry.train is not None)

    def make(self, run: Run, group: Sequence[DictionaryUnit]) -> Iterator[Made]:
        """Those that others have made, or all that are trained here.

        Raises:
            DictionaryError: naming layer and source, if one cannot be had, or does not fit the model's residual stream.
        """
        dimensions = model_dimensions(run.config.model, run.storage)
        if group[0].entry.train is None:
            for place, unit in enumerate(group, 1):
                yield _brought(run, unit, dimensions)
                run.tell(place, len(group), "dictionaries fetched")
            return
        yield from _trained(run, group, dimensions)

    def result(
        self, run: Run, units: Sequence[DictionaryUnit], done: Mapping[str, Manifest]
    ) -> list[Dictionary]:
        """One for each `sae` entry, by layer."""
        dimensions = model_dimensions(run.config.model, run.storage)
        for unit in units:
            warn_of_differences(_facts(done[unit.folder]), unit.entry, run.config)
        return [_checked(run.config, unit, done[unit.folder], dimensions) for unit in units]

    def question(self, run: Run, result: list[Dictionary]) -> Question:
        """Every configured layer has one whole dictionary, and those trained here pass their gate."""
        gates = {entry.layer: entry.train.gate for entry in run.config.sae if entry.train is not None}
        committed = load_all(run.storage, [dictionary.folder for dictionary in result])
        rows = []
        for dictionary in result:
            quality, gate = dictionary.quality or {}, gates.get(dictionary.layer)
            rows.append(
                {
                    **{
                        name: getattr(dictionary, name)
                        for name in ("layer", "folder", "key", "d_sae", "source")
                    },
                    **{name: _number(quality.get(name)) for name in _FIGURES},
                    **{name: _number(getattr(gate, name, None)) for name in _LIMITS},
                    "trained": gate is not None,
                    "committed": dictionary.folder in committed,
                }
            )
        wanted = [
            {"layer": entry.layer, "source": entry.path or entry.release or "trained here"}
            for entry in run.config.sae
        ]
        return Question(
            of={"rows": rows, "wanted": wanted},
            views=lambda: {
                "dictionaries": pa.Table.from_pylist(rows, schema=_DICTIONARIES),
                "wanted": pa.Table.from_pylist(wanted),
            },
        )

    def shown(self, run: Run, result: list[Dictionary]) -> Iterable[Shown]:
        """The dictionaries, with the gate's figures where they were trained here."""
        rows = [
            {"layer": entry.layer, "latents": entry.d_sae, "source": entry.source, **(entry.quality or {})}
            for entry in result
        ]
        yield Shown(name="dictionaries", description="The dictionary of each layer", rows=rows)


DICTIONARIES = Dictionaries()

_FIGURES = ("explained_variance", "explained_variance_all", "l0", "k", "alive_share", "heldout_tokens")
_LIMITS = ("min_explained_variance", "max_l0_deviation", "min_alive_share")
_DICTIONARIES = pa.schema(
    [
        *[("layer", pa.int32()), ("folder", pa.string()), ("key", pa.string()), ("d_sae", pa.int64())],
        *[("source", pa.string()), ("trained", pa.bool_()), ("committed", pa.bool_())],
        *[(name, pa.float64()) for name in _FIGURES + _LIMITS],
    ]
)


def known_facts(config: Config, storage: Storage, entry: Sae) -> Facts | None:
    """What can be known of a dictionary, or of the one that its training starts from, before there is a corpus.

    Reads a few kilobytes of a saved one, and nothing from a network of one of the registry.

    Returns:
        None where nothing is known yet: a fresh training, or one of the registry that was never fetched.

    Raises:
        DictionaryError: if its files are missing or damaged, the registry does not have it, or it names another model.
    """
    if entry.train is not None:
        return None if entry.train.start_from is None else start_facts(entry, storage.endpoint_url)
    if entry.path is not None:
        facts: Facts | None = saved_facts(entry, storage.endpoint_url)
    else:
        manifest = load(storage, f"dictionaries/{content_key(**_key_inputs(config, storage, entry, ()))}")
        facts = None if manifest is None else _facts(manifest)
    model_name = registered_model(entry) if facts is None else facts.model_name
    check_model_name(model_name, entry, names_of(config.model))
    return facts


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


def _key_inputs(
    config: Config, storage: Storage, entry: Sae, parts: tuple[GraphShard, ...]
) -> dict[str, Any]:
    if entry.release is not None:
        source: dict[str, Any] = {"release": entry.release, "sae_id": entry.sae_id}
        return {"version": VERSION, "sae_lens": version("sae-lens"), "registry": source}
    if entry.path is not None:
        return {"version": VERSION, "disk": saved_content(entry, storage.endpoint_url)}
    return {
        "version": VERSION,
        "sae_lens": version("sae-lens"),
        "trained": _training_inputs(config, storage, entry, parts),
    }


def _brought(run: Run, unit: DictionaryUnit, dimensions: tuple[int, int]) -> Made:
    """A dictionary that others have made, checked before it is kept."""
    entry, endpoint_url = unit.entry, run.storage.endpoint_url
    with tempfile.TemporaryDirectory() as aside:
        if entry.path is None:
            facts = fetch_registered(entry, Path(aside), *dimensions)
        else:
            facts = copy_saved(entry, endpoint_url, Path(aside), *dimensions)
        check_model_name(facts.model_name, entry, names_of(run.config.model))
        return _kept(run, unit, Path(aside), facts)


def training_parts(
    config: Config, storage: Storage, shards: CorpusShards, train: Train
) -> tuple[GraphShard, ...]:
    """The graph's first parts that reach `train.max_tokens`, whole: the features stage reads them too."""
    taken: list[GraphShard] = []
    n_tokens = 0
    for part in graph_shards(config, shards, storage):
        if n_tokens >= train.max_tokens:
            break
        taken.append(part)
        n_tokens += part.n_tokens
    return tuple(taken)


def _training_inputs(
    config: Config, storage: Storage, entry: Sae, parts: tuple[GraphShard, ...]
) -> dict[str, Any]:
    assert entry.train is not None
    forward = forward_key(config, model_key(config.model, storage))
    section = entry.train.model_dump(exclude={"gate", "start_from"})
    if entry.train.start_from is not None:
        section["start_from"] = start_content(entry, storage.endpoint_url)
    inputs: dict[str, Any] = {
        "version": training.VERSION,
        "residuals": [ResidualShard.of(part, entry.layer, forward).folder for part in parts],
        "train": section,
        "layer": entry.layer,
    }
    if leaves_out(config):
        inputs["left_out"] = {"version": heldout.VERSION, "share": config.heldout_share}
    return inputs


def _trained(run: Run, units: Sequence[DictionaryUnit], dimensions: tuple[int, int]) -> Iterator[Made]:
    """Train dictionaries on residuals of one forward; each layer's is kept as soon as it is done."""
    config, storage = run.config, run.storage
    starts = {
        unit.entry.layer: load_start(unit.entry, storage.endpoint_url, *dimensions)
        for unit in units
        if unit.entry.train is not None and unit.entry.train.start_from is not None
    }
    longest = max((unit.parts for unit in units), key=len)
    residuals = make(run, Residuals(longest, [unit.entry.layer for unit in units]), run.tell)
    device = choose_device(config.model.device)
    for unit in units:
        entry = unit.entry
        assert entry.train is not None
        own = [residuals[place_of(part, entry.layer)] for part in unit.parts]
        with tempfile.TemporaryDirectory() as aside:
            try:
                quality = training.train_dictionary(
                    config, storage, own, entry.train, Path(aside), device, run.tell, starts.get(entry.layer)
                )
            except DictionaryError as error:
                raise refusal(entry, f"cannot be trained: {error.message}", error.hint) from error
            facts = facts_of(json.loads((Path(aside) / FILES[0]).read_bytes()))
            yield _kept(run, unit, Path(aside), facts, quality)


def _kept(
    run: Run, unit: DictionaryUnit, aside: Path, facts: Facts, quality: dict[str, float] | None = None
) -> Made:
    written = run.storage.upload(aside, unit.folder)
    return Made.of(unit, lambda: written, {"facts": asdict(facts), "quality": quality})


def _facts(manifest: Manifest) -> Facts:
    return Facts(**manifest.stats["facts"])


def _checked(
    config: Config, unit: DictionaryUnit, manifest: Manifest, dimensions: tuple[int, int]
) -> Dictionary:
    facts, entry = _facts(manifest), unit.entry
    check_facts(facts, entry, *dimensions)
    check_model_name(facts.model_name, entry, names_of(config.model))
    quality = manifest.stats.get("quality")
    if entry.train is not None and quality is not None:
        check_gate(quality, entry.train.gate, entry)
    return Dictionary(
        layer=entry.layer,
        folder=unit.folder,
        key=unit.folder.removeprefix("dictionaries/"),
        d_sae=facts.d_sae,
        source=source_of(entry),
        quality=quality,
    )


def _number(value: Any) -> float | None:
    # NaN would compare as greater than every gate.
    return None if value is None or math.isnan(value) else float(value)
