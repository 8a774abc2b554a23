"""Checkpoint series: public ones in folders and by revision, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import run_of
from tiny import N_LAYERS, save_model, save_tokenizer
from transformers import AutoConfig

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, ModelError
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import make
from tasks.models import model as models
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.loading import config_of, open_checkpoint
from tasks.pretraining.public_series import step_of

SHARDS = CorpusShards(shards=(), tokenizer_key="t", vocabulary="v")


def checkpoints_of(config: Config, storage: Storage) -> list[Checkpoint]:
    """Its checkpoints, by the stage that makes what is missing of them."""
    return make(run_of(config, storage, {TOKENIZE: SHARDS}), CHECKPOINTS)


def _config(model: dict[str, Any], *series: dict[str, Any], **consolidation: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": ["a.txt"]},
            "model": model,
            "consolidation": {"series": list(series), **consolidation},
        }
    )


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pythia")
    save_model(folder / "step1000", "gpt_neox", seed=1)
    save_model(folder / "step-16", "gpt_neox", seed=0)
    (folder / "notes").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("final", ("config.json", "model.safetensors"), r"'final' does not say its step"),
        ("step-7-half", ("config.json",), "step-7-half has a config.json, but no weights"),
    ],
)
def test_no_checkpoint_of_a_folder_is_passed_over(
    tmp_path: Path, name: str, files: tuple[str, ...], message: str
) -> None:
    (tmp_path / name).mkdir()
    for file in files:
        (tmp_path / name / file).write_text("{}")
    config = _config({"tokenizer": "t"}, {"name": "a", "folder": str(tmp_path)})
    with pytest.raises(ConfigError, match=message):
        checkpoints_of(config, Storage(str(tmp_path)))


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    config = Config.model_validate(
        {
            "corpus": {"urls": ["a.txt"]},
            "model": {"tokenizer": str(tmp_path / "tokenizer")},
            "windows": {"context_size": 16},
            "consolidation": {
                "series": [{"name": "a", "shape": SHAPE}],
                "train": TRAIN,
                "generations": {"prompts": ["the", "of " * 12], "max_new_tokens": 8},
            },
        }
    )
    with pytest.raises(ModelError, match=r"the prompt 'of of .* more than the models have positions \(16\)"):
        checkpoints_of(config, Storage(str(tmp_path / "root")))


def test_a_folder_of_checkpoints_in_the_order_of_their_steps(pythia: Path, tmp_path: Path) -> None:
    growth = {"layer": 1, "train": {"d_sae": 8, "k": 2}}
    config = _config(
        {"tokenizer": str(pythia / "step-16")}, {"name": "a", "folder": str(pythia)}, growth=growth
    )
    config = Config.model_validate(config.model_dump() | {"windows": {"context_size": 16}})
    storage = Storage(str(tmp_path))
    found = checkpoints_of(config, storage)
    assert [(entry.series, entry.step, entry.layer) for entry in found] == [("a", 16, 1), ("a", 1000, 1)]
    assert found[0].key != found[1].key
    module = models.load_model(found[0].model, storage).module
    head = found[0].parameters
    assert head is not None
    assert head > sum(parameter.numel() for parameter in module.parameters())
    run = run_of(config, storage, {TOKENIZE: SHARDS})
    assert run.is_finished(CHECKPOINTS)
    assert run.result(CHECKPOINTS) == found
    spine = config_of(config, found[1])
    assert spine.model.name == str(pythia / "step1000")
    assert spine.sae == []
    assert spine.windows == config.windows


def test_checkpoints_with_weights_of_the_older_kind_are_told_apart(pythia: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for step in ("step-16", "step1000"):
        older = tmp_path / "series" / step
        shutil.copytree(pythia / step, older)
        torch.save(load_file(older / "model.safetensors"), older / "pytorch_model.bin")
        (older / "model.safetensors").unlink()
    # Weights alone tell them apart.
    shutil.copy(tmp_path / "series/step-16/config.json", tmp_path / "series/step1000/config.json")
    config = _config(
        {"tokenizer": str(pythia / "step-16")}, {"name": "a", "folder": str(tmp_path / "series")}
    )
    storage = Storage(str(tmp_path / "root"))
    found = checkpoints_of(config, storage)
    assert found[0].key != found[1].key
    states = [models.load_model(entry.model, storage).module.state_dict() for entry in found]
    assert not torch.equal(*(state["embed_in.weight"] for state in states))


def test_a_checkpoint_that_is_another_where_it_is_read_is_refused(pythia: Path, tmp_path: Path) -> None:
    series = {"name": "a", "folder": str(pythia)}
    config = _config({"tokenizer": str(pythia / "step-16")}, series)
    config = Config.model_validate(config.model_dump() | {"windows": {"context_size": 16}})
    storage = Storage(str(tmp_path))
    first, second = checkpoints_of(config, storage)
    open_checkpoint(config, storage, first)
    with pytest.raises(ModelError, match=r"step-16 is not here what it was .*same files"):
        open_checkpoint(config, storage, replace(first, key=second.key))


def test_revisions_say_their_step_or_are_told_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def from_pretrained(name: str, revision: str | None = None, **_: Any) -> Any:
        asked.append((name, revision))
        config = AutoConfig.for_model("gpt_neox", num_hidden_layers=N_LAYERS)
        config._commit_hash = f"commit-of-{revision}"
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    config = _config(
        {"name": "org/pythia"},
        {
            "name": "p",
            "revisions": [
                "stage1-step512-tokens2B",
                "stage1-step1000-tokens5B",
                {"revision": "main", "step": 143000},
            ],
        },
        {"name": "o", "model": "org/olmo", "revisions": ["step1-tokens0B"]},
    )
    found = checkpoints_of(config, Storage(str(tmp_path)))
    assert [(entry.series, entry.step, entry.model.name, entry.model.revision) for entry in found] == [
        ("p", 512, "org/pythia", "stage1-step512-tokens2B"),
        ("p", 1000, "org/pythia", "stage1-step1000-tokens5B"),
        ("p", 143000, "org/pythia", "main"),
        ("o", 1, "org/olmo", "step1-tokens0B"),
    ]
    assert {entry.model.tokenizer for entry in found} == {"org/pythia"}
    assert ("org/olmo", "step1-tokens0B") in asked
    assert len({entry.key for entry in found}) == 4


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ({"revisions": ["main"]}, "'main' does not say its step"),
        (
            {"revisions": ["step5", {"revision": "other", "step": 5}]},
            r"two checkpoints are at step 5: step5, other \(",
        ),
        ({"revisions": ["step1000ckpt"]}, "'step1000ckpt' does not say its step"),
        ({"revisions": ["step-1.5K"]}, "'step-1.5K' does not say its step"),
        ({"revisions": ["step1e4"]}, "'step1e4' does not say its step"),
        ({"revisions": ["1e4"]}, "'1e4' does not say its step"),
        (
            # OLMo 2's stages count their steps anew: allenai/OLMo-2-1124-7B has both of these.
            {"revisions": ["stage2-ingredient1-step11931-tokens50B", "stage1-step928646-tokens3896B"]},
            r"as read: stage2-ingredient1-step11931-tokens50B = step 11931, stage1-step928646-tokens3896B = "
            r"step 928646 \(give revisions = \[\{ revision = .*, step = … \}",
        ),
        (
            {"revisions": ["seed1-step5", "seed2-step7"]},
            r"as read: seed1-step5 = step 5, seed2-step7 = step 7",
        ),
        ({"revisions": ["step5-tokens8B", "step7-tokens2B"]}, "differ in more than the step"),
        ({"folder": ".", "subfolders": ["step7"]}, "step7 has no config.json"),
        ({"folder": "s3://user:secret@bucket/run"}, "s3://bucket/run is no local folder"),
        ({"folder": "/nowhere/at/all"}, "no local folder"),
        ({"folder": "."}, "no subfolder"),
    ],
)
def test_a_series_that_cannot_be_ordered_is_refused(
    series: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = _config({"name": "org/m"}, {"name": "a", **series})
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoints_of(config, Storage(str(tmp_path)))
    assert caught.value.message.startswith("series a")
    assert caught.value.hint


def test_a_checkpoint_given_as_a_series_is_told_its_folder(pythia: Path, tmp_path: Path) -> None:
    config = _config({"tokenizer": "t"}, {"name": "a", "folder": str(pythia / "step1000")})
    with pytest.raises(ConfigError, match=r"but itself has one \(give the folder above it, .*\)") as caught:
        checkpoints_of(config, Storage(str(tmp_path)))
    assert str(pythia) in caught.value.hint


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-50K", 50_000),
        ("tinyllama-step-1M", 1_000_000),
        ("checkpoint-100", 100),
        ("ckpt_20k", 20_000),
        ("global_step100", 100),
        ("step1000-tokens4B", 1_000),
        ("v2.5", None),
        ("pythia-70m", None),
        ("olmo-7", 7),
        ("step7half", None),
        ("Step1000", 1_000),
        ("TinyLlama-1.1B-intermediate-step-1431k-3T", 1_431_000),
        ("1000", 1_000),
        ("1e4", None),
        ("step1e4", None),
        ("step1,000", None),
        ("step1_000", None),
        ("2024-01-15", None),
        ("8B-1000steps-2", None),
        ("step1000-checkpoint2", None),
        ("epoch3", None),
    ],
)
def test_names_say_steps(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_subfolders_are_told_their_steps(pythia: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("warmup-final", "decay-step2"), start=1):
        shutil.copytree(pythia / "step-16", tmp_path / "series" / name)
        settings = tmp_path / "series" / name / "config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_bytes()), "told": number}))
    series = {"name": "a", "folder": str(tmp_path / "series")}
    given = [{"subfolder": "warmup-final", "step": 10}, {"subfolder": "decay-step2", "step": 12}]
    config = _config({"tokenizer": str(pythia / "step-16")}, {**series, "subfolders": given})
    found = checkpoints_of(config, Storage(str(tmp_path / "root")))
    assert [(entry.step, Path(entry.model.name).name) for entry in found] == [
        (10, "warmup-final"),
        (12, "decay-step2"),
    ]
    alone = _config({"tokenizer": str(pythia / "step-16")}, {**series, "subfolders": ["decay-step2"]})
    found = checkpoints_of(alone, Storage(str(tmp_path / "root")))
    assert [entry.step for entry in found] == [2]


def a_series(pythia: Path, folder: Path) -> tuple[Path, Config]:
    """A copy of a series' first checkpoint, to be damaged, and the configuration that reads it."""
    copied = folder / "series" / "step7"
    shutil.copytree(pythia / "step-16", copied)
    series = {"name": "a", "folder": str(folder / "series")}
    config = _config({"tokenizer": str(pythia / "step-16")}, series)
    return copied, Config.model_validate(config.model_dump() | {"windows": {"context_size": 16}})


@pytest.mark.parametrize("length", [0, 5, -5_000])
def test_a_damaged_safetensors_file_is_named(pythia: Path, tmp_path: Path, length: int) -> None:
    copied, config = a_series(pythia, tmp_path)
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    storage = Storage(str(tmp_path / "root"))
    with pytest.raises(ModelError, match=r"step7/model.safetensors is damaged or half copied.*copy it again"):
        checkpoints_of(config, storage)
    with pytest.raises(ModelError, match=r"cannot load the model .*step7: a safetensors file is damaged"):
        models.load_model(config.model.model_copy(update={"name": str(copied)}), storage)


def test_weights_that_do_not_fit_their_configuration_are_named(pythia: Path, tmp_path: Path) -> None:
    copied, config = a_series(pythia, tmp_path)
    saved = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(saved | {"intermediate_size": 48}))
    storage = Storage(str(tmp_path / "root"))
    (found,) = checkpoints_of(config, storage)
    with pytest.raises(ModelError, match=r"step7: \S+, .* have other shapes than its config.json says"):
        open_checkpoint(config, storage, found)


def test_arguments_of_a_trainer_are_no_weights(pythia: Path, tmp_path: Path) -> None:
    copied, config = a_series(pythia, tmp_path)
    (copied / "model.safetensors").rename(copied / "training_args.bin")
    with pytest.raises(ConfigError, match=r"step7 has a config\.json, but no weights"):
        checkpoints_of(config, Storage(str(tmp_path / "root")))


def test_a_revision_that_is_nowhere_is_named(tmp_path: Path) -> None:
    config = _config({"name": "org/none"}, {"name": "a", "revisions": ["step7"]})
    with pytest.raises(ModelError, match="org/none"):
        checkpoints_of(config, Storage(str(tmp_path)))


SHAPE = {"hidden_size": 16, "layers": 2, "heads": 2}
TRAIN = {"tokens": 1000}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("losses", {"resamples": 1}, "greater than or equal to 100"),
        ("graph", {"rarefaction_m": 0}, "greater than 0"),
        ("sae", [{"layer": 0, "train": {"d_sae": 8, "k": 9}}], "k can be d_sae at most"),
        ("sae", [{"layer": 0, "train": {"d_sae": 64, "samples": 10}}], "fewer than one batch of 512"),
        ("sae", [{"layer": 0, "train": {"d_sae": 64, "learning_rate": math.inf}}], "finite number"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(section: str, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"corpus": {"urls": ["a.txt"]}, "model": {"name": "m"}, section: values})


@pytest.mark.parametrize(
    ("model", "consolidation", "message"),
    [
        ({"name": "m"}, {"series": []}, "at least 1"),
        ({"name": "m"}, {"series": [{"name": "a"}]}, "exactly one of shape, revisions and folder"),
        ({"name": "m"}, {"series": [{"name": "a", "shape": SHAPE}]}, r"give \[consolidation.train\]"),
        ({"name": "m"}, {"series": [{"name": "a", "folder": "x"}] * 2}, "a name of its own"),
        ({}, {"series": [{"name": "a", "revisions": ["step1"]}], "train": TRAIN}, "model.name is missing"),
        ({}, {"series": [{"name": "a", "shape": SHAPE}], "train": TRAIN}, "model.name is missing"),
        ({"tokenizer": "t"}, {"series": [{"name": "a", "revisions": ["step1"]}]}, "revisions of which model"),
        (
            {"name": "m"},
            {"series": [{"name": "a", "shape": SHAPE}], "train": {**TRAIN, "vocabulary_size": 400}},
            "leave model.name and model.tokenizer out",
        ),
        (
            {"name": "m"},
            {"series": [{"name": "a", "shape": SHAPE}], "train": TRAIN, "heldout_share": 1},
            "leaves nothing to train on",
        ),
        (
            {"name": "m"},
            {
                "series": [{"name": "a", "shape": SHAPE}],
                "train": TRAIN,
                "growth": {"layer": 2, "train": {"d_sae": 8, "k": 2}},
            },
            "has 2 blocks, so its SAEs cannot read layer 2",
        ),
        (
            {"name": "m"},
            {"series": [{"name": "a", "folder": "x"}], "generations": {"prompts": ["a", "b", "a"]}},
            "'a' is there twice",
        ),
        ({"name": "m"}, {"series": [{"name": "a", "shape": {**SHAPE, "heads": 3}}]}, "multiple of heads"),
    ],
)
def test_contradictions_are_refused(
    model: dict[str, Any], consolidation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _config(model, *consolidation.pop("series"), **consolidation)


def test_the_gate_of_an_sae_series_is_open_unless_it_is_given() -> None:
    growth = {"layer": 0, "train": {"d_sae": 8, "k": 2}}
    config = _config({"name": "m"}, {"name": "a", "folder": "x"}, growth=growth)
    assert config.consolidation is not None
    assert config.consolidation.growth is not None
    assert config.consolidation.growth.train.gate.min_alive_share == 0
    strict = {"layer": 0, "train": {"d_sae": 8, "k": 2, "gate": {"min_alive_share": 0.5}}}
    config = _config({"name": "m"}, {"name": "a", "folder": "x"}, growth=strict)
    assert config.consolidation is not None
    assert config.consolidation.growth is not None
    assert config.consolidation.growth.train.gate.min_alive_share == 0.5
