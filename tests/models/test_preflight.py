"""What is told before any work: SAEs that are missing, damaged, or another model's, and tokens that a model lacks."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from builders import run_of
from plain import there
from tiny import D_MODEL, build_sae, save_model, save_sae, save_tokenizer

from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import DictionaryError, FunctokError, ModelError
from schemas.work import CorpusShards
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run, make
from tasks.models.names import is_named, names_of
from tasks.stages import check_fit

NO_CORPUS = CorpusShards(shards=(), tokenizer_key="t", vocabulary="v")
HERE = {"hook_name": "blocks.1.hook_resid_post"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-2b")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_sae(tmp_path / "sae", metadata=HERE)


def config_of(model: Path, root: Path, **entry: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": [str(root / "none.jsonl")]},
            "model": {"name": str(model)},
            "windows": {"context_size": 64},
            "storage": {"root": str(root)},
            "sae": [{"layer": 1, **entry}],
        }
    )


def run_without_corpus(config: Config, storage: Storage) -> Run:
    return run_of(config, storage, {TOKENIZE: NO_CORPUS})


def check(model: Path, tmp_path: Path, **entry: Any) -> None:
    """What a run asks before it begins; the corpus is not even there."""
    check_fit(config_of(model, tmp_path / "root", **entry), Storage(str(tmp_path / "root")))
    assert not (tmp_path / "root" / "tokens").exists()


def rewritten(saved: Path, **values: Any) -> None:
    file = saved / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def no_weights(saved: Path) -> None:
    (saved / "sae_weights.safetensors").rename(saved / "sae.safetensors")


def cut_weights(saved: Path) -> None:
    file = saved / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_safetensors(saved: Path) -> None:
    (saved / "sae_weights.safetensors").write_bytes(b"PK\x03\x04" * 100)


def empty_weights(saved: Path) -> None:
    (saved / "sae_weights.safetensors").write_bytes(b"")


def other_weights(saved: Path) -> None:
    other = save_sae(saved.parent / "other", d_sae=32)
    shutil.copy(other / "sae_weights.safetensors", saved)


def of_sae_lens_5(saved: Path, **values: Any) -> None:
    """SAELens wrote one flat object before 6.0."""
    flat = {"d_in": D_MODEL, "d_sae": 96, "architecture": "jumprelu", "dtype": "float32", **values}
    (saved / "cfg.json").write_text(json.dumps(flat))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no folder .*sae \("),
        (no_weights, r"there is no sae_weights.safetensors in .*sae; it has cfg.json, sae.safetensors"),
        (cut_weights, "sae_weights.safetensors is damaged or half copied"),
        (no_safetensors, "sae_weights.safetensors is damaged or half copied"),
        (empty_weights, "sae_weights.safetensors is damaged or half copied"),
        (
            other_weights,
            r"W_enc of sae_weights.safetensors has the shape \[32, 32\], where cfg.json says \[32, 96\]",
        ),
        (lambda saved: (saved / "cfg.json").write_text("{"), "cfg.json that is no JSON object"),
        (lambda saved: (saved / "cfg.json").write_text("[]"), "cfg.json that is no JSON object"),
        (lambda saved: (saved / "cfg.json").write_text("{}"), "cfg.json that does not say d_in and d_sae"),
        (lambda saved: rewritten(saved, architecture="batchtopk"), "training form .*save_inference_model"),
        (lambda saved: rewritten(saved, architecture="unheard_of"), "SAELens .* does not know"),
        (lambda saved: rewritten(saved, metadata={"hook_name": "blocks.0.hook_resid_post"}), "set layer = 0"),
        (lambda saved: of_sae_lens_5(saved, hook_name="blocks.0.hook_resid_post"), "set layer = 0"),
        (lambda saved: of_sae_lens_5(saved, normalize_activations=True), "expected_average_only_in"),
        (lambda saved: of_sae_lens_5(saved, hook_name="blocks.1.attn.hook_z"), "attention heads"),
        (
            lambda saved: of_sae_lens_5(saved, model_name="gpt2-small"),
            r"trained on the model gpt2-small, not on tiny-2b .*allow_other_model = true",
        ),
    ],
)
def test_a_saved_sae_that_cannot_be_used_is_told_before_tokenization(
    damage: Any, message: str, model: Path, saved: Path, tmp_path: Path
) -> None:
    check(model, tmp_path, path=str(saved))
    damage(saved)
    with pytest.raises(DictionaryError, match=message) as caught:
        check(model, tmp_path, path=str(saved))
    assert caught.value.message.startswith(f"sae layer 1 ({saved})")
    assert caught.value.hint


def test_what_training_starts_from_is_asked_for_too(model: Path, saved: Path, tmp_path: Path) -> None:
    check(model, tmp_path, train={"d_sae": 96, "start_from": str(saved)})
    with pytest.raises(DictionaryError, match="has 96 latents"):
        check(model, tmp_path, train={"d_sae": 64, "start_from": str(saved)})
    shutil.rmtree(saved)
    with pytest.raises(DictionaryError, match="there is no folder"):
        check(model, tmp_path, train={"d_sae": 96, "start_from": str(saved)})


def test_another_models_sae_is_read_where_that_is_said(model: Path, tmp_path: Path) -> None:
    saved = save_sae(tmp_path / "sae", metadata={**HERE, "model_name": "org/tiny-2b-it"})
    entry = {"path": str(saved)}
    config, storage = config_of(model, tmp_path / "root", **entry), Storage(str(tmp_path / "root"))
    with pytest.raises(DictionaryError, match=r"trained on the model org/tiny-2b-it, not on tiny-2b"):
        make(run_without_corpus(config, storage), DICTIONARIES)
    allowed = config_of(model, tmp_path / "root", **entry, allow_other_model=True)
    check_fit(allowed, storage)
    [dictionary] = make(run_without_corpus(allowed, storage), DICTIONARIES)
    assert there(run_without_corpus(allowed, storage), DICTIONARIES) == [dictionary]
    # It is there now, and still another model's.
    assert there(run_without_corpus(config, storage), DICTIONARIES) is None


@pytest.mark.parametrize(
    ("said", "name", "same"),
    [
        ("gemma-2-2b", "google/gemma-2-2b", True),
        ("google/gemma-2-2b", "google/Gemma-2-2b", True),
        ("gpt2-small", "openai-community/gpt2", True),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "assets/SmolLM2-135M-Instruct.Q4_1.gguf", True),
        ("unknown", "google/gemma-2-2b", True),
        (None, "google/gemma-2-2b", True),
        ("gemma-2-2b", "google/gemma-2-2b-it", False),
        ("gemma-2-2b-it", "google/gemma-2-2b", False),
        ("gemma-2-2b", "google/gemma-2-9b", False),
        ("gpt2-medium", "openai-community/gpt2", False),
        ("pythia-70m", "EleutherAI/pythia-70m-deduped", False),
        ("mistral-7b", "mistralai/Mistral-7B-v0.3", False),
    ],
)
def test_names_of_one_model_and_of_others(said: str | None, name: str, same: bool) -> None:
    assert is_named(said, names_of(Model(name=name))) is same


def test_a_folder_goes_by_the_names_in_it(tmp_path: Path) -> None:
    cached = tmp_path / "models--google--gemma-2-2b" / "snapshots" / "c5ebcd40"
    cached.mkdir(parents=True)
    assert is_named("gemma-2-2b", names_of(Model(name=str(cached))))
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "config.json").write_text(json.dumps({"_name_or_path": "openai-community/gpt2"}))
    assert is_named("gpt2-small", names_of(Model(name=str(copied))))
    assert not is_named("gpt2-xl", names_of(Model(name=str(copied))))


REGISTRY = {
    "tiny-res": ({"layer_1/width_96": "layer_1"}, "tiny-2b"),
    "other-res": ({"layer_1": "1"}, "gemma-2-2b"),
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for SAELens' registry; gives the list of its downloads."""
    import sae_lens
    from sae_lens.loading import pretrained_saes_directory

    known = {
        name: type("Release", (), {"saes_map": ids, "model": model})()
        for name, (ids, model) in REGISTRY.items()
    }
    asked: list[str] = []

    def from_pretrained(release: str, sae_id: str, device: str = "cpu") -> Any:
        asked.append(release)
        return build_sae("jumprelu", metadata=HERE)

    monkeypatch.setattr(pretrained_saes_directory, "get_pretrained_saes_directory", lambda: known)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    return asked


def test_a_registered_sae_is_looked_up_before_tokenization(
    registry: list[str], model: Path, tmp_path: Path
) -> None:
    entry = {"release": "tiny-res", "sae_id": "layer_1/width_96"}
    check(model, tmp_path, **entry)
    with pytest.raises(DictionaryError, match=r"no release tiny-rez.*did you mean tiny-res"):
        check(model, tmp_path, **{**entry, "release": "tiny-rez"})
    with pytest.raises(DictionaryError, match=r"no layer_1/width_97.*did you mean layer_1/width_96"):
        check(model, tmp_path, **{**entry, "sae_id": "layer_1/width_97"})
    with pytest.raises(DictionaryError, match=r"trained on the model gemma-2-2b, not on tiny-2b"):
        check(model, tmp_path, release="other-res", sae_id="layer_1")
    assert registry == []
    config, storage = config_of(model, tmp_path / "root", **entry), Storage(str(tmp_path / "root"))
    make(run_without_corpus(config, storage), DICTIONARIES)
    # What was fetched says for which layer it is.
    with pytest.raises(DictionaryError, match="set layer = 1"):
        check(model, tmp_path, **entry, layer=0)


def test_a_tokenizer_of_another_model_is_told_before_tokenization(
    model: Path, saved: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    shutil.copytree(model, small)
    settings = json.loads((small / "config.json").read_bytes())
    (small / "config.json").write_text(json.dumps({**settings, "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"has the id 399, but .*small has an embedding of 300 tokens"):
        check(small, tmp_path, path=str(saved))


def test_errors_know_that_trying_again_is_no_help(model: Path, saved: Path, tmp_path: Path) -> None:
    (saved / "sae_weights.safetensors").write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(FunctokError) as caught:
        check(model, tmp_path, path=str(saved))
    assert not caught.value.retryable


def test_an_adapter_alone_is_named_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    save_tokenizer(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    config = Config.model_validate(
        {
            "corpus": {"urls": ["a.jsonl"]},
            "model": {"name": str(folder)},
            "sae": [{"layer": 1, "path": str(tmp_path / "sae")}],
        }
    )
    with pytest.raises(ModelError, match="holds an adapter") as caught:
        check_fit(config, Storage(str(tmp_path / "root")))
    assert "merge_and_unload" in caught.value.hint
