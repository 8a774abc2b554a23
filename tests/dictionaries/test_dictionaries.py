"""Dictionaries: every source, every refusal, and training with its gate."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from builders import run_of
from tiny import D_MODEL, N_LAYERS, build_sae, save_model, save_sae, texts, write_jsonl

from infra.manifest import MANIFEST, content_key, load
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Gate, Sae, Train
from schemas.errors import DictionaryError
from schemas.work import CorpusShards, Dictionary, GraphShard, StagePlan
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries import training as dictionary_training
from tasks.dictionaries.dictionaries import DICTIONARIES, load_dictionary
from tasks.dictionaries.encoding import Encoder
from tasks.dictionaries.facts import (
    DictionaryUnavailableError,
    Facts,
    check_facts,
    check_gate,
    check_model_name,
    facts_of,
)
from tasks.dictionaries.residuals import Residuals
from tasks.dictionaries.sample import ResidualSample
from tasks.dictionaries.sources import registered_model
from tasks.dictionaries.start import load_start, start_training_from
from tasks.engine.run import Run
from tasks.engine.run import make as make_stage
from tasks.graph import extraction
from tasks.graph.features import FEATURES
from tasks.models.names import names_of
from tasks.stages import plan_run

NO_CORPUS = CorpusShards(shards=(), tokenizer_key="t", vocabulary="v")
OURS: dict[str, Any] = {"architecture": "standard", "d_in": D_MODEL, "d_sae": 64}
ENTRY = Sae(layer=1, path="somewhere")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts(60))


def config_of(
    model: Path, root: Path, *entries: dict[str, Any], corpus: Path | None = None, **sections: Any
) -> Config:
    return Config.model_validate(
        {
            # A limit makes tokenization stay in this process.
            "corpus": {
                "urls": [str(corpus or root / "none.jsonl")],
                "shard_tokens": 1500,
                "max_documents": 1000,
            },
            "model": {"name": str(model)},
            "windows": {"context_size": 64},
            "storage": {"root": str(root)},
            "sae": list(entries),
            **sections,
        }
    )


def made(
    config: Config, storage: Storage, shards: CorpusShards = NO_CORPUS, progress: Progress = silent
) -> list[Dictionary]:
    """What the stage makes of a corpus that is given."""
    return make_stage(run_of(config, storage, {TOKENIZE: shards}), DICTIONARIES, progress)


def found(config: Config, storage: Storage, shards: CorpusShards = NO_CORPUS) -> list[Dictionary] | None:
    """What is there of it, if that is all."""
    there: list[Dictionary] | None = plain.there(run_of(config, storage, {TOKENIZE: shards}), DICTIONARIES)
    return there


def tokenized(config: Config, storage: Storage) -> CorpusShards:
    shards: CorpusShards = plain.finished(config, storage, TOKENIZE).result(TOKENIZE)
    return shards


def prepare(model: Path, root: Path, *entries: dict[str, Any]) -> list[Any]:
    return made(config_of(model, root, *entries), Storage(str(root)))


def metadata(**values: Any) -> dict[str, Any]:
    return {"metadata": values}


# From disk


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_a_saved_dictionary_encodes_as_before(architecture: str, model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae", architecture)
    config = config_of(model, tmp_path / "root", {"layer": 2, "path": str(saved)})
    storage = Storage(str(tmp_path / "root"))
    [dictionary] = made(config, storage)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1))
    expected = build_sae(architecture).encode(x)
    assert torch.equal(load_dictionary(storage, dictionary).encode(x), expected)
    assert (expected > 0).any()
    assert (dictionary.layer, dictionary.d_sae, dictionary.quality) == (2, 96, None)
    assert found(config, storage) == [dictionary]


def test_a_saved_dictionary_is_found_by_content_not_by_place(model: Path, tmp_path: Path) -> None:
    first, second = save_sae(tmp_path / "a"), tmp_path / "b"
    shutil.copytree(first, second)
    other = save_sae(tmp_path / "c", seed=1)
    [one] = prepare(model, tmp_path / "root", {"layer": 0, "path": str(first)})
    config = config_of(model, tmp_path / "root", {"layer": 0, "path": f"file://{second}/"})
    there = found(config, Storage(str(tmp_path / "root")))
    assert there is not None
    assert there[0].key == one.key
    changed = config_of(model, tmp_path / "root", {"layer": 0, "path": str(other)})
    assert found(changed, Storage(str(tmp_path / "root"))) is None


def test_a_dictionary_that_changes_on_disk_is_no_longer_found(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae")
    config = config_of(model, tmp_path / "root", {"layer": 0, "path": str(saved)})
    storage = Storage(str(tmp_path / "root"))
    [before] = made(config, storage)
    build_sae(seed=7).save_model(str(saved))
    assert found(config, storage) is None
    [after] = made(config, storage)
    assert after.key != before.key


def test_a_half_copied_dictionary_does_not_count(model: Path, tmp_path: Path) -> None:
    config = config_of(model, tmp_path / "root", {"layer": 0, "path": str(save_sae(tmp_path / "sae"))})
    storage = Storage(str(tmp_path / "root"))
    [dictionary] = made(config, storage)
    storage.delete(f"{dictionary.folder}/{MANIFEST}")
    storage.write_bytes(f"{dictionary.folder}/sae_weights.safetensors", b"half")
    assert found(config, storage) is None
    assert made(config, storage) == [dictionary]
    load_dictionary(storage, dictionary)


def test_entries_come_back_by_layer(model: Path, tmp_path: Path) -> None:
    entries = [{"layer": layer, "path": str(save_sae(tmp_path / f"{layer}", seed=layer))} for layer in (2, 0)]
    assert [dictionary.layer for dictionary in prepare(model, tmp_path / "root", *entries)] == [0, 2]


def test_missing_files_name_layer_and_path(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=rf"layer 1 \({tmp_path}/none\).*no cfg.json.*save_model"):
        prepare(model, tmp_path / "root", {"layer": 1, "path": f"{tmp_path}/none"})
    saved = save_sae(tmp_path / "sae")
    (saved / "sae_weights.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"no sae_weights\.safetensors in"):
        prepare(model, tmp_path / "root", {"layer": 1, "path": str(saved)})


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae")
    torch.save(build_sae().state_dict(), saved / "sae_weights.safetensors")
    with pytest.raises(DictionaryError, match="damaged"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})


def test_damaged_files_are_refused_and_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae")
    weights = saved / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors is damaged"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})
    save_sae(saved)
    (saved / "cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match=r"cfg\.json that is no JSON"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})
    assert not list((tmp_path / "root").rglob("*.safetensors"))


def test_weights_that_are_not_numbers_are_refused(model: Path, tmp_path: Path) -> None:
    sae = build_sae()
    sae.W_enc.data[0, 0] = float("nan")
    sae.save_model(str(tmp_path / "sae"))
    with pytest.raises(DictionaryError, match="not finite"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(tmp_path / "sae")})


@pytest.mark.parametrize(
    ("architecture", "reason"), [("batchtopk", "save_inference_model"), ("unheard_of", "does not know")]
)
def test_unknown_and_training_forms_are_refused(
    architecture: str, reason: str, model: Path, tmp_path: Path
) -> None:
    saved = save_sae(tmp_path / "sae")
    configuration = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps({**configuration, "architecture": architecture}))
    with pytest.raises(DictionaryError, match=reason):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})


def test_a_dictionary_of_another_width_is_refused(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae", d_in=16)
    with pytest.raises(DictionaryError, match=f"width 16, but the model's residual stream has {D_MODEL}"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})


def test_a_layer_the_model_does_not_have_is_refused_first(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=f"{N_LAYERS} decoder blocks.*0 to {N_LAYERS - 1}"):
        prepare(model, tmp_path / "root", {"layer": N_LAYERS, "path": "not even there"})


def test_the_right_place_is_asked_for_again_when_a_dictionary_is_already_here(
    model: Path, tmp_path: Path
) -> None:
    saved = save_sae(tmp_path / "sae", **metadata(hook_name="blocks.1.hook_resid_post"))
    prepare(model, tmp_path / "root", {"layer": 1, "path": str(saved)})
    with pytest.raises(DictionaryError, match=r"set layer = 1"):
        prepare(model, tmp_path / "root", {"layer": 2, "path": str(saved)})
    config = config_of(model, tmp_path / "root", {"layer": 2, "path": str(saved)})
    assert found(config, Storage(str(tmp_path / "root"))) is None


# What does not fit our residual stream


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"hook_name": "blocks.1.hook_resid_post"},
        {"hook_name": "blocks.2.hook_resid_pre"},
        {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1"},
        {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1.output"},
        {"hf_hook_name": "gpt_neox.layers.1"},
        {"hf_hook_name": "transformer.h.1"},
    ],
)
def test_every_name_of_our_place_is_accepted(names: dict[str, str]) -> None:
    check_facts(facts_of({**OURS, "metadata": names}), ENTRY, D_MODEL, N_LAYERS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (metadata(hook_name="blocks.0.hook_resid_post"), r"blocks\.0\.hook_resid_post.*set layer = 0"),
        (metadata(hook_name="blocks.1.hook_resid_pre"), r"blocks\.1\.hook_resid_pre.*set layer = 0"),
        (metadata(hook_name="blocks.0.hook_resid_pre"), "choose an SAE of the residual stream"),
        (metadata(hook_name="blocks.1.hook_mlp_out"), r"blocks\.1\.hook_mlp_out"),
        (metadata(hook_name="blocks.1.hook_resid_mid"), "hook_resid_mid"),
        (metadata(hf_hook_name="model.layers.2"), r"model\.layers\.2.*set layer = 2"),
        (metadata(hf_hook_name="model.layers.1.mlp"), r"model\.layers\.1\.mlp"),
        (metadata(hook_name="blocks.1.hook_resid_post", hf_hook_name="model.layers.0"), r"model\.layers\.0"),
        (metadata(hook_name="blocks.1.hook_resid_post", hook_head_index=3), "attention head 3"),
        (metadata(hook_name="blocks.1.ln2", hook_name_out="blocks.1.hook_mlp_out"), "transcoder"),
        ({"architecture": "jumprelu_skip_transcoder"}, "transcoder"),
        ({"architecture": "temporal"}, "whole sequences"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in.*fold"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening.*fold"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        (metadata(model_from_pretrained_kwargs={"center_writing_weights": True}), "center_writing_weights"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DictionaryError, match=rf"(?s)layer 1 \(somewhere\).*{reason}"):
        check_facts(facts_of({**OURS, **changes}), ENTRY, D_MODEL, N_LAYERS)


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_normalizations_that_act_when_encoding_are_accepted(normalization: str) -> None:
    check_facts(facts_of({**OURS, "normalize_activations": normalization}), ENTRY, D_MODEL, N_LAYERS)


def test_refusals_hold_for_real_saved_dictionaries(model: Path, tmp_path: Path) -> None:
    unfolded = save_sae(tmp_path / "a", "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(DictionaryError, match="expected_average_only_in"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(unfolded)})
    centred = metadata(model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.raises(DictionaryError, match="center_writing_weights"):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(save_sae(tmp_path / "b", **centred))})


def test_other_windows_only_warn(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_sae(tmp_path / "sae", **metadata(prepend_bos=False, context_size=64))
    with caplog.at_level(logging.WARNING):
        prepare(model, tmp_path / "root", {"layer": 0, "path": str(saved)})
    assert "prepend_bos = False" in caplog.text
    assert "context_size" not in caplog.text


# From the registry


class _Directory(dict[str, Any]):
    """A registry of one release with one id."""

    def __init__(self) -> None:
        super().__init__(
            {
                "tiny-res": type(
                    "Release", (), {"saes_map": {"layer_1/width_96": "layer_1"}, "model": "unknown"}
                )()
            }
        )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A stand-in for SAELens' registry that hands out tiny dictionaries; gives the list of its downloads."""
    import sae_lens
    from sae_lens.loading import pretrained_saes_directory

    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, sae_id: str, device: str = "cpu") -> Any:
        asked.append((release, sae_id))
        return build_sae("jumprelu", **metadata(hook_name="blocks.1.hook_resid_post", neuronpedia_id="a/b"))

    monkeypatch.setattr(pretrained_saes_directory, "get_pretrained_saes_directory", _Directory)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    return asked


REGISTERED = {"layer": 1, "release": "tiny-res", "sae_id": "layer_1/width_96"}


def test_a_registered_dictionary_is_downloaded_once(
    registry: list[tuple[str, str]], model: Path, tmp_path: Path
) -> None:
    config, storage = config_of(model, tmp_path / "root", REGISTERED), Storage(str(tmp_path / "root"))
    assert found(config, storage) is None
    [dictionary] = made(config, storage)
    assert made(config, storage) == [dictionary]
    assert found(config, storage) == [dictionary]
    assert registry == [("tiny-res", "layer_1/width_96")]
    assert dictionary.source == "tiny-res / layer_1/width_96"
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(2))
    assert torch.equal(load_dictionary(storage, dictionary).encode(x), build_sae("jumprelu").encode(x))


def test_another_sae_lens_version_is_another_key(
    registry: list[tuple[str, str]], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, storage = config_of(model, tmp_path / "root", REGISTERED), Storage(str(tmp_path / "root"))
    made(config, storage)
    monkeypatch.setattr("tasks.dictionaries.dictionaries.version", lambda name: "0.0.0")
    assert found(config, storage) is None


def test_unknown_releases_and_ids_suggest_known_ones(
    registry: list[tuple[str, str]], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DictionaryError, match=r"no release tiny-rez.*did you mean tiny-res"):
        prepare(model, tmp_path / "root", {**REGISTERED, "release": "tiny-rez"})
    with pytest.raises(DictionaryError, match=r"no layer_1/width_97.*did you mean layer_1/width_96"):
        prepare(model, tmp_path / "root", {**REGISTERED, "sae_id": "layer_1/width_97"})
    assert registry == []


def test_an_unreachable_hub_is_worth_another_try(
    registry: list[tuple[str, str]], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sae_lens

    def offline(*arguments: Any, **options: Any) -> Any:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", offline)
    with pytest.raises(
        DictionaryUnavailableError, match=r"layer 1 .*couldn't connect.*HF_HUB_OFFLINE"
    ) as caught:
        prepare(model, tmp_path / "root", REGISTERED)
    assert caught.value.retryable


def test_a_registered_dictionary_of_another_layer_is_refused(
    registry: list[tuple[str, str]], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DictionaryError, match="set layer = 1"):
        prepare(model, tmp_path / "root", {**REGISTERED, "layer": 0})


@pytest.mark.parametrize("name", ["paper-graph", "gemma3-270m"])
@pytest.mark.slow
def test_the_configurations_name_dictionaries_that_the_registry_has(name: str) -> None:
    from infra.config_file import load_config

    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.toml")
    assert config.sae
    for entry in config.sae:
        check_model_name(registered_model(entry), entry, names_of(config.model))
        assert f"layer_{entry.layer}" in str(entry.sae_id).replace("/", "_").split("_width")[0]


# Trained here

TRAIN: dict[str, Any] = {
    "d_sae": 48,
    "k": 6,
    "samples": 12_000,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "heldout_share": 0.25,
    "gate": {"min_explained_variance": 0.1, "max_l0_deviation": 0.5, "min_alive_share": 0.3},
}


def trained_config(
    model: Path, corpus: Path, root: Path, layers: tuple[int, ...] = (1,), **changes: Any
) -> Config:
    entries = [{"layer": layer, "train": {**TRAIN, **changes}} for layer in layers]
    return config_of(model, root, *entries, corpus=corpus)


@dataclasses.dataclass(frozen=True)
class _Trained:
    config: Config
    storage: Storage
    shards: CorpusShards
    dictionaries: list[Any]


@pytest.fixture(scope="module")
def trained(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> _Trained:
    root = tmp_path_factory.mktemp("trained")
    config, storage = trained_config(model, corpus, root, layers=(0, 2)), Storage(str(root))
    shards = tokenized(config, storage)
    assert len(shards.shards) > 1
    return _Trained(config, storage, shards, made(config, storage, shards))


def residuals_of(trained: _Trained, layer: int) -> list[Any]:
    parts = graph_shards(trained.config, trained.shards, trained.storage)
    return residuals(trained.config, trained.storage, parts, [layer])


def residuals(
    config: Config,
    storage: Storage,
    parts: Sequence[GraphShard],
    layers: Sequence[int],
    progress: Progress = silent,
) -> list[Any]:
    return list(make_stage(Run(config, storage), Residuals(parts, layers), progress).values())


def test_training_gives_a_jumprelu_of_the_raw_residual_stream(trained: _Trained) -> None:
    dictionary = trained.dictionaries[1]
    sae = load_dictionary(trained.storage, dictionary)
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert found(trained.config, trained.storage, trained.shards) == trained.dictionaries


def test_the_gates_figures_are_those_of_the_heldout_tokens(trained: _Trained) -> None:
    """Against a slow reference: all held-out residuals at once, from the files themselves."""
    dictionary = trained.dictionaries[1]
    sae = load_dictionary(trained.storage, dictionary)
    train = trained.config.sae[1].train
    assert train is not None
    sample = ResidualSample(trained.storage, residuals_of(trained, 2), train)
    x = torch.cat(list(sample.pieces(heldout=True))).double()
    with torch.no_grad():
        features = sae.encode(x.float())
        error = (sae.decode(features).double() - x).square().sum()
    quality = dictionary.quality
    assert quality["explained_variance_all"] == pytest.approx(
        1 - float(error / (x - x.mean(0)).square().sum()), abs=1e-5
    )
    assert quality["l0"] == pytest.approx(float((features > 0).sum(1).double().mean()))
    assert quality["alive_share"] == pytest.approx(float((features > 0).any(0).double().mean()))
    assert quality["heldout_tokens"] == len(x)
    assert quality["explained_variance"] > 0.3


def test_the_threshold_is_calibrated_on_training_tokens(trained: _Trained) -> None:
    train = trained.config.sae[0].train
    assert train is not None
    sample = ResidualSample(trained.storage, residuals_of(trained, 0), train)
    encoder = Encoder(load_dictionary(trained.storage, trained.dictionaries[0]), torch.device("cpu"))
    shown = torch.cat(list(sample.pieces(heldout=False)))
    assert len(encoder(shown).row) / len(shown) == pytest.approx(train.k, rel=0.02)


def test_heldout_documents_are_never_shown(trained: _Trained) -> None:
    train = trained.config.sae[0].train
    assert train is not None
    shards = residuals_of(trained, 0)
    sample = ResidualSample(trained.storage, shards, train)
    n_shown, n_heldout = sample.n_rows(heldout=False), sample.n_rows(heldout=True)
    assert n_shown + n_heldout == trained.shards.n_tokens
    assert 0.05 < n_heldout / trained.shards.n_tokens < 0.5
    heldout = {row.tobytes() for piece in sample.pieces(heldout=True) for row in piece.numpy()}
    scaling = dictionary_training._scaling(sample, 1e9)
    stream, seen = dictionary_training._endless(sample, scaling), 0
    while seen < 3 * n_shown:
        rows = next(stream) / scaling.scale + scaling.mean
        seen += len(rows)
        assert all(float((row - rows).norm(dim=1).min()) > 1e-3 for row in _sample_of(heldout))
    assert seen == 3 * n_shown


def _sample_of(rows: set[bytes]) -> list[torch.Tensor]:
    """Ten of the rows, as vectors."""
    return [torch.frombuffer(bytearray(row), dtype=torch.float32) for row in sorted(rows)[:10]]


@pytest.mark.slow
def test_training_again_gives_the_same_weights(
    trained: _Trained, model: Path, corpus: Path, tmp_path: Path
) -> None:
    config, storage = trained_config(model, corpus, tmp_path), Storage(str(tmp_path))
    shards = tokenized(config, storage)
    weights = []
    for _ in range(2):
        [dictionary] = made(config, storage, shards)
        weights.append(storage.read_bytes(f"{dictionary.folder}/sae_weights.safetensors"))
        storage.delete(dictionary.folder)
    assert weights[0] == weights[1]
    other = trained_config(model, corpus, tmp_path, seed=1)
    [dictionary] = made(other, storage, shards)
    assert storage.read_bytes(f"{dictionary.folder}/sae_weights.safetensors") != weights[0]


@pytest.mark.slow
def test_a_layer_that_is_trained_is_kept_when_the_next_fails(
    model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, storage = trained_config(model, corpus, tmp_path, layers=(0, 1)), Storage(str(tmp_path))
    shards = tokenized(config, storage)
    trained_layers: list[int] = []
    real = dictionary_training.train_dictionary

    def killed_at_the_second(
        config: Config, storage: Storage, residuals: Any, *rest: Any
    ) -> dict[str, float]:
        if trained_layers:
            raise KeyboardInterrupt
        trained_layers.append(residuals[0].layer)
        return real(config, storage, residuals, *rest)

    monkeypatch.setattr(dictionary_training, "train_dictionary", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        made(config, storage, shards)
    trained_layers.clear()
    made(config, storage, shards)
    assert trained_layers == [1]


def test_a_failed_gate_says_every_figure_and_trains_nothing_again(
    trained: _Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> dict[str, float]:
        raise AssertionError("trained again")

    monkeypatch.setattr(dictionary_training, "train_dictionary", never)
    strict = trained.config.model_copy(
        update={
            "sae": [
                entry.model_copy(
                    update={
                        "train": entry.train.model_copy(update={"gate": Gate(min_explained_variance=0.9999)})
                    }
                )
                for entry in trained.config.sae
                if entry.train is not None
            ]
        }
    )
    assert found(strict, trained.storage, trained.shards) is None
    with pytest.raises(
        DictionaryError,
        match=r"layer 0 \(trained here\) did not pass.*explained variance 0\..*L0 .*k = 6.*alive",
    ):
        made(strict, trained.storage, trained.shards)
    plan = plan_of_dictionaries(strict, trained.storage)
    assert plan.missing == len(trained.config.sae)
    assert "sae layer 0 (trained here) did not pass its gate" in plan.reason
    assert re.search(r"explained variance 0\.\d+ \(at least 1\.00, 0\.\d+ too little", plan.reason)
    assert any("train.gate" in line for line in plan.details)
    assert made(trained.config, trained.storage, trained.shards) == trained.dictionaries
    assert plan_of_dictionaries(trained.config, trained.storage).missing == 0
    others = [
        entry.model_copy(update={"train": entry.train.model_copy(update={"k": 5})})
        for entry in strict.sae
        if entry.train is not None
    ]
    changed = plan_of_dictionaries(strict.model_copy(update={"sae": others}), trained.storage)
    assert "gate" not in changed.reason


def plan_of_dictionaries(config: Config, storage: Storage) -> StagePlan:
    [plan] = [plan for plan in plan_run(config, storage) if plan.stage == "dictionaries"]
    return plan


@pytest.mark.parametrize(
    "change", [{"explained_variance": 0.74}, {"l0": 36.0}, {"l0": 28.0}, {"alive_share": 0.89}]
)
def test_the_gate_refuses_each_shortcoming(change: dict[str, float]) -> None:
    good = {
        "explained_variance": 0.8,
        "explained_variance_all": 0.7,
        "l0": 32.5,
        "k": 32.0,
        "alive_share": 0.95,
        "heldout_tokens": 1000.0,
    }
    entry = Sae(layer=3, train=Train(d_sae=8, k=2))
    check_gate(good, Gate(), entry)
    with pytest.raises(DictionaryError, match="gate") as refused:
        check_gate({**good, **change}, Gate(), entry)
    told = {
        "explained_variance": "0.010 too little",
        "l0": "off by 12%",
        "alive_share": "1.0 points too few",
    }
    [short] = change
    assert [name for name, words in told.items() if words in str(refused.value)] == [short]


def test_one_document_is_too_few(model: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "one.jsonl", texts(1))
    config, storage = trained_config(model, corpus, tmp_path / "root"), Storage(str(tmp_path / "root"))
    shards = tokenized(config, storage)
    with pytest.raises(DictionaryError, match=r"layer 1 \(trained here\) cannot be trained: only 1 document"):
        made(config, storage, shards)


def test_max_tokens_limits_what_is_sampled(trained: _Trained) -> None:
    train = Train(d_sae=8, k=2, max_tokens=500)
    sample = ResidualSample(trained.storage, residuals_of(trained, 0), train)
    assert 300 < sample.n_rows(heldout=False) + sample.n_rows(heldout=True) <= 500


@pytest.mark.slow
def test_progress_is_reported(model: Path, corpus: Path, tmp_path: Path) -> None:
    config = trained_config(model, corpus, tmp_path, samples=1280, gate={"min_explained_variance": 1.0})
    storage = Storage(str(tmp_path))
    shards = tokenized(config, storage)
    seen: list[tuple[int, int, str]] = []
    with pytest.raises(DictionaryError, match="gate"):
        made(config, storage, shards, lambda *report: seen.append(report))
    assert seen[-1] == (1280, 1280, "samples, dictionary of layer 1")


def test_facts_survive_the_manifest() -> None:
    facts = facts_of({**OURS, "metadata": {"hook_name": "blocks.1.hook_resid_post", "context_size": 128}})
    assert Facts(**json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


# From a saved one


def start_entry(start: Path | str, layer: int = 1, d_sae: int = 96, **changes: Any) -> Sae:
    return Sae(layer=layer, train=Train(d_sae=d_sae, k=6, start_from=str(start), **changes))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("jumprelu", {}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
        ("standard", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"rescale_acts_by_decoder_norm": False}),
    ],
)
def test_training_starts_as_the_saved_sae(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    saved = build_sae(architecture, **options)
    saved.save_model(str(tmp_path / "sae"))
    start = load_start(start_entry(tmp_path / "sae"), None, D_MODEL, N_LAYERS)
    generator = torch.Generator().manual_seed(3)
    x = 5 * torch.randn(40, D_MODEL, generator=generator)
    mean, scale = 2 * torch.randn(D_MODEL, generator=generator), 0.37
    sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=96, k=6))
    start_training_from(sae, start, mean, scale)
    with torch.no_grad():
        norm = saved.W_dec.norm(dim=1)
        expected = (saved.process_sae_in(x) @ saved.W_enc + saved.b_enc) * norm
        before = sae.encode_with_hidden_pre((x - mean) * scale)[1]
        assert (before / scale - expected).abs().max() < 1e-4 * expected.abs().max()
        acts = saved.encode(x)
        assert (acts > 0).any()
        rebuilt = sae.decode(before * (acts > 0)) / scale + mean
        wanted = saved.decode(acts)
        assert (rebuilt - wanted).abs().max() < 1e-4 * wanted.abs().max()
        # As SAELens initializes: neither side of a latent is longer than the other.
        assert torch.allclose(sae.W_dec.norm(dim=1), sae.W_enc.norm(dim=0), rtol=1e-4)


def test_a_latent_without_a_direction_starts_fresh(tmp_path: Path) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    saved = build_sae()
    saved.W_dec.data[5] = 0
    saved.W_enc.data[:, 9] = 0
    saved.save_model(str(tmp_path / "sae"))
    start = load_start(start_entry(tmp_path / "sae"), None, D_MODEL, N_LAYERS)
    torch.manual_seed(0)
    sae: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=96, k=6))
    fresh = sae.W_dec.detach().clone()
    start_training_from(sae, start, torch.zeros(D_MODEL), 1.0)
    same = (sae.W_dec == fresh).all(1).nonzero().flatten().tolist()
    assert same == [5, 9]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in sae.state_dict().values())


def test_a_start_is_worth_its_training(trained: _Trained) -> None:
    """On the same residuals, two steps from the finished dictionary are far better than two from nothing."""
    [entry] = [entry for entry in trained.config.sae if entry.layer == 0]
    assert entry.train is not None
    gate = Gate(min_explained_variance=-10, max_l0_deviation=10, min_alive_share=0)
    short = entry.train.model_copy(update={"samples": 128, "gate": gate})
    place = trained.storage.url(trained.dictionaries[0].folder)
    quality = []
    for train in (short, short.model_copy(update={"start_from": place})):
        config = trained.config.model_copy(update={"sae": [entry.model_copy(update={"train": train})]})
        [dictionary] = made(config, trained.storage, trained.shards)
        assert found(config, trained.storage, trained.shards) == [dictionary]
        quality.append(dictionary.quality["explained_variance"])
    finished = trained.dictionaries[0].quality["explained_variance"]
    assert quality[0] < finished - 0.2
    assert quality[1] > finished - 0.1


@pytest.mark.slow
def test_a_start_is_known_by_content_not_by_place(model: Path, corpus: Path, tmp_path: Path) -> None:
    saved, storage = save_sae(tmp_path / "a", d_sae=48), Storage(str(tmp_path / "root"))
    shutil.copytree(saved, tmp_path / "b")
    other = save_sae(tmp_path / "c", d_sae=48, seed=1)
    keys = []
    for start in (saved, tmp_path / "b", other, None):
        place = None if start is None else str(start)
        config = trained_config(
            model,
            corpus,
            tmp_path / "root",
            samples=128,
            start_from=place,
            gate={"min_explained_variance": -99},
        )
        config = config.model_copy(
            update={"sae": [entry.model_copy(update={"train": _ungated(entry)}) for entry in config.sae]}
        )
        shards = tokenized(config, storage)
        [dictionary] = made(config, storage, shards)
        keys.append(dictionary.key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    shutil.rmtree(saved)
    moved = trained_config(model, corpus, tmp_path / "root", samples=128, start_from=str(saved))
    with pytest.raises(DictionaryError, match=r"no cfg\.json in"):
        made(moved, storage, shards)


def _ungated(entry: Sae) -> Train:
    assert entry.train is not None
    gate = Gate(min_explained_variance=-99, max_l0_deviation=99, min_alive_share=0)
    return entry.train.model_copy(update={"gate": gate})


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        (
            "jumprelu",
            {"d_in": 16},
            f"reads vectors of width 16, but the model's residual stream has {D_MODEL}",
        ),
        (
            "jumprelu",
            {"d_sae": 64},
            r"has 64 latents: a dictionary of train\.d_sae = 48 cannot start from it",
        ),
        ("gated", {"d_sae": 48}, "gated.*BatchTopK dictionary can start from"),
        ("standard", {"d_sae": 48, "normalize_activations": "layer_norm"}, "layer_norm.*can start from"),
        ("jumprelu", {"d_sae": 48, "metadata": {"hook_name": "blocks.0.hook_resid_post"}}, "set layer = 0"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_any_forward(
    architecture: str, options: dict[str, Any], reason: str, model: Path, corpus: Path, tmp_path: Path
) -> None:
    saved = save_sae(tmp_path / "sae", architecture, **options)
    config = trained_config(model, corpus, tmp_path / "root", start_from=str(saved))
    storage = Storage(str(tmp_path / "root"))
    shards = tokenized(config, storage)
    with pytest.raises(DictionaryError, match=rf"sae layer 1 \({saved}\).*{reason}"):
        made(config, storage, shards)
    assert not storage.sizes("residuals")


def test_a_fresh_dictionary_has_the_key_it_always_had(trained: _Trained) -> None:
    from importlib.metadata import version

    for entry, dictionary in zip(trained.config.sae, trained.dictionaries, strict=True):
        assert entry.train is not None
        inputs = {
            "version": 1,
            "residuals": [shard.folder for shard in residuals_of(trained, entry.layer)],
            "train": {
                "d_sae": 48,
                "k": 6,
                "samples": 12_000,
                "batch_size": 64,
                "learning_rate": 3e-3,
                "max_tokens": 1_000_000,
                "heldout_share": 0.25,
                "outlier_multiple": 10.0,
                "seed": 0,
            },
            "layer": entry.layer,
        }
        assert dictionary.key == content_key(version=1, sae_lens=version("sae-lens"), trained=inputs)


# Beside consolidation


@pytest.mark.slow
def test_what_consolidation_holds_out_is_part_of_the_key(model: Path, corpus: Path, tmp_path: Path) -> None:
    storage, keys = Storage(str(tmp_path)), []
    for share in (None, 1.0, 0.25, 0.5):
        section = {"series": [{"name": "a", "folder": "none"}], "heldout_share": share}
        config = trained_config(model, corpus, tmp_path, samples=128)
        config = Config.model_validate(
            {**config.model_dump(), "consolidation": None if share is None else section}
        )
        config = config.model_copy(
            update={"sae": [entry.model_copy(update={"train": _ungated(entry)}) for entry in config.sae]}
        )
        shards = tokenized(config, storage)
        [dictionary] = made(config, storage, shards)
        keys.append(dictionary.key)
        quality = dictionary.quality
        assert (quality["heldout_tokens"] + quality["training_tokens"] == shards.n_tokens) == (
            share in (None, 1)
        )
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    manifest = load(storage, dictionary.folder)
    assert manifest is not None
    assert manifest.inputs["trained"]["left_out"]["share"] == 0.5


# Files of equal content


def equal_files(model: Path, root: Path, **sections: Any) -> tuple[Config, Storage, CorpusShards]:
    """Two files of the same nine documents; the graph ends within the second."""
    files = [write_jsonl(root / f"{name}.jsonl", texts(9, seed=2)) for name in "ab"]
    entries = sections.pop("sae", [])
    config = config_of(model, root / "run", *entries, activations={"max_documents": 14}, **sections)
    config = config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"urls": [str(file) for file in files]})}
    )
    storage = Storage(str(root / "run"))
    return config, storage, tokenized(config, storage)


@pytest.mark.slow
def test_residuals_of_a_copy_that_a_limit_cuts_are_its_own(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config, storage, shards = equal_files(model, tmp_path)
    parts = graph_shards(config, shards, storage)
    assert [part.n_documents for part in parts] == [9, 5]
    assert parts[0].shard.folder == parts[1].shard.folder
    told: list[tuple[int, int, str]] = []
    for gone in (2, 3, 0):
        dense = residuals(config, storage, parts, [0, 1], lambda *report: told.append(report))
        assert [(shard.layer, shard.part) for shard in dense] == [(i, part) for part in parts for i in (0, 1)]
        rows = [
            load_file(storage.local_folder(shard.folder) / f"layer-{shard.layer}.safetensors")
            for shard in dense
        ]
        assert [len(each["residuals"]) for each in rows] == [part.n_tokens for part in parts for _ in (0, 1)]
        assert {int(each["doc"].max()) for each in rows[2:]} == {4}
        storage.delete(dense[gone].folder)
    # Tokens are counted once, whichever layers a part lacks.
    ends = [n for n, total, _ in told if n == total]
    assert ends == [parts[0].n_tokens + parts[1].n_tokens, parts[1].n_tokens, parts[1].n_tokens]


@pytest.mark.slow
def test_features_of_a_copy_that_a_limit_cuts_are_the_same_from_disk(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae")
    rows = []
    for keep_dense in (False, True):
        config, storage, _ = equal_files(
            model, tmp_path / str(keep_dense), sae=[{"layer": 1, "path": str(saved)}]
        )
        activations = config.activations.model_copy(update={"keep_dense": keep_dense})
        config = config.model_copy(update={"activations": activations})
        extraction.forget_loaded()
        extracted = plain.finished(config, storage, FEATURES).result(FEATURES)
        assert [shard.part.n_documents for shard in extracted] == [9, 5]
        rows.append([storage.read_parquet(f"{one.folder}/activations.parquet") for one in extracted])
    assert rows[0] == rows[1]
    assert rows[0][0].num_rows > rows[0][1].num_rows > 0


def test_each_layer_is_trained_on_its_own_parts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = {"min_explained_variance": -99, "max_l0_deviation": 99, "min_alive_share": 0}
    entries = [
        {"layer": layer, "train": {**TRAIN, "samples": 128, "max_tokens": limit, "gate": gate}}
        for layer, limit in ((0, 400), (2, 10**6))
    ]
    config, storage, shards = equal_files(model, tmp_path, sae=entries)
    given: list[list[int]] = []
    real = dictionary_training.train_dictionary

    def watched(config: Config, storage: Storage, residuals: Any, *rest: Any) -> dict[str, float]:
        given.append([shard.part.n_documents for shard in residuals])
        return real(config, storage, residuals, *rest)

    monkeypatch.setattr(dictionary_training, "train_dictionary", watched)
    made(config, storage, shards)
    assert given == [[9], [9, 5]]
