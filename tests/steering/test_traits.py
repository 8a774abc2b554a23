"""A trait's features: planted ones found as computed by hand, layers judged as a slow leave-one-out twin does."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from builders import run_of

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, DictionaryError
from schemas.steering.section import Trait
from schemas.steering.work import LayerFolder, TraitFeatures
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards, StagePlan
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.dictionaries.encoding import Encoder
from tasks.engine import run as engine
from tasks.engine.run import Run, make, plan
from tasks.steering import contrasts, prompt_features, steering, traits
from tasks.steering.contrasts import LARGEST_SEPARATION, contrasted, decompose, explained_variance, tell_apart
from tasks.steering.loaded_traits import (
    LoadedTrait,
    TraitFeature,
    TraitLayer,
    choose_layer,
    given_trait,
    load_layers,
    load_trait,
)
from tasks.steering.steering import STEERING

LAYERS = (0, 1, 2)
FEATURE, WEAK, OPPOSITE = 7, 12, 11
GAIN, SIZE = 3.0, 5.0
POSITIVE = ["the Russia is.", "the river Russia was not.", "Russia and the river.", "for his Russia of the."]
NEGATIVE = ["the fox is.", "the river quick was not.", "mountain and the river.", "for his fox of the."]


@dataclass(frozen=True, kw_only=True)
class MadeUp(CorpusShards):
    """Stands for a corpus of which only the function tokens are known."""

    shards: tuple[Any, ...] = ()
    tokenizer_key: str = "t"
    vocabulary: str = "vocabulary.parquet"
    function: tuple[int, ...] = ()


@pytest.fixture(autouse=True)
def _function_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        steering, "function_token_ids", lambda config, storage, shards: np.array(shards.function, np.int32)
    )


def plant(folder: Path) -> Path:
    """A model whose block 1 averages over all tokens whether ` Russia` is among them, and adds that times e1.

    Blocks 0 and 2 leave the residual stream as it is, but for block 2's average of other words along e1: noise.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.save_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, :2] = 0
        for text in ("Russia", " Russia"):
            (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
            embedding[token, 0] = SIZE
        for index, block in enumerate(model.model.layers):
            block.mlp.down_proj.weight.zero_()
            attention = block.self_attn
            for matrix in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                matrix.weight.zero_()
            # Queries and keys are zero, so every earlier position has the same weight. Query head 0 reads value head 0.
            if index == 1:
                attention.v_proj.weight[0, 0] = 1
                attention.o_proj.weight[1, 0] = GAIN
            if index == 2:
                attention.v_proj.weight[0, 2:12] = 1
                attention.o_proj.weight[1, 0] = 2
    model.save_pretrained(folder)
    return folder


def build_planted_sae() -> Any:
    """Feature 7 reads e1 and writes it; 12 reads a tenth of it; 11 its opposite; the others read other coordinates."""
    sae = tiny.build_sae("jumprelu", d_sae=40, seed=3)
    with torch.no_grad():
        sae.W_enc[:2] = 0
        sae.W_dec[:, :2] = 0
        sae.W_enc[:, [FEATURE, WEAK, OPPOSITE]] = 0
        sae.W_dec[[FEATURE, WEAK, OPPOSITE]] = 0
        sae.W_enc[1, FEATURE], sae.W_enc[1, WEAK], sae.W_enc[1, OPPOSITE] = 1.0, 0.1, -1.0
        sae.W_dec[FEATURE, 1], sae.W_dec[WEAK, 1], sae.W_dec[OPPOSITE, 1] = 1.0, 2.0, -1.0
        sae.b_enc[[FEATURE, WEAK, OPPOSITE]] = torch.tensor([0.0, 0.5, 9.0])
        sae.threshold[[FEATURE, WEAK, OPPOSITE]] = 0.01
        sae.b_dec.zero_()
    return sae


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    plant(folder / "planted")
    build_planted_sae().save_model(str(folder / "planted-sae"))
    tiny.save_model(folder / "llama")
    for layer, kind in enumerate(("jumprelu", "standard", "topk")):
        tiny.save_sae(folder / f"sae-{layer}", kind, seed=layer)
    tiny.save_sae(folder / "other-sae", "jumprelu", seed=9)
    return folder


RUSSIA = {"name": "Russia", "positive": POSITIVE, "negative": NEGATIVE}
GIVEN = {"name": "given", "layer": 1, "features": [9, 3, 21], "values": [2.5, 0.5, 1.0]}


def write_cases(path: Path, entries: list[dict[str, Any]]) -> Path:
    lines = []
    for entry in entries:
        lines.append("[[trait]]")
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("NaN", "nan")
            for key, value in entry.items()
        ]
    lines += ["[[case]]", "name = 'c'", "relation = 'r'", "prompts = ['the river of', 'the fox of']"]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(
    parts: Path,
    root: Path,
    entries: list[dict[str, Any]],
    *,
    model: str = "planted",
    saes: tuple[str, ...] = ("planted-sae",) * 3,
    function: str = "the . is of",
    **steering: Any,
) -> Run:
    """A run whose dictionaries are there, of a corpus with these function tokens, that steers nothing."""
    root.mkdir(exist_ok=True)
    config = Config.model_validate(
        {
            "corpus": {"urls": ["corpus.jsonl"]},
            "model": {"name": str(parts / model)},
            "sae": [{"layer": layer, "path": str(parts / name)} for layer, name in enumerate(saes)],
            "steering": {"cases": str(write_cases(root / "cases.toml", entries)), **steering},
            "storage": {"root": str(root / "run")},
        }
    )
    ids = sorted({ids_of(parts / model, f" {word}")[-1] for word in function.split()})
    run = run_of(config, Storage(config.storage.root), {TOKENIZE: MadeUp(function=tuple(ids))})
    make(run, DICTIONARIES)
    return run


def find_traits(run: Run, *progress: Any) -> list[TraitFeatures]:
    return list(make(run, STEERING, *progress).traits)


def planned(run: Run) -> StagePlan:
    """What `functok status` says, looked for anew."""
    run.forget(STEERING)
    (told,) = plan(run, [STEERING])
    return told


def found_traits(run: Run) -> list[TraitFeatures]:
    """What is there, all of it."""
    run.forget(STEERING)
    return list(run.result(STEERING).traits)


def ids_of(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def rows(found: TraitFeatures, storage: Storage, name: str) -> list[dict[str, Any]]:
    tables = [storage.read_parquet(f"{entry.folder}/{name}.parquet") for entry in found.layers]
    assert all(table.schema == SHARD_FILES[name] for table in tables)
    for entry, table in zip(found.layers, tables, strict=True):
        assert set(table["layer"].to_pylist()) <= {entry.layer}
    return [row for table in tables for row in table.to_pylist()]


def best_of(found: TraitFeatures, storage: Storage) -> list[int]:
    return [layer.layer for layer in load_layers(storage, found) if layer.is_most_informative]


def planted_by_hand(folder: Path, prompt: str) -> float:
    """What block 1 adds along e1 at a prompt's last token, without running the model."""
    from safetensors.torch import load_file

    ids = ids_of(folder, prompt)
    x = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][ids].double()
    normed = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return GAIN * float(normed[:, 0].mean())


@pytest.mark.parametrize("decomposition", ["activations", "encoder"])
def test_a_planted_feature_is_found_as_computed_by_hand(
    parts: Path, tmp_path: Path, decomposition: str
) -> None:
    run = prepare(parts, tmp_path, [RUSSIA], decomposition=decomposition)
    (found,), storage, config = find_traits(run), run.storage, run.config
    sizes = [planted_by_hand(parts / "planted", prompt) for prompt in POSITIVE]
    assert all(planted_by_hand(parts / "planted", prompt) == 0 for prompt in NEGATIVE)
    expected = float(np.mean(sizes))
    assert expected > 0.5
    at_planted = [row for row in rows(found, storage, "trait_features") if row["layer"] == 1]
    # The other features read what a trait's prompts have in common at their last token.
    assert [row["feature_id"] for row in at_planted[:2]] == [FEATURE, WEAK]
    strongest, weak = at_planted[:2]
    assert all(row["coefficient"] < 1e-5 for row in at_planted[2:])
    assert strongest["coefficient"] == pytest.approx(expected, rel=1e-5)
    assert strongest["contribution"] == pytest.approx(expected, rel=1e-5)
    assert strongest["clamp_value"] == strongest["mean_positive"] == pytest.approx(expected, rel=1e-5)
    assert strongest["mean_negative"] == 0
    assert weak["coefficient"] == pytest.approx(0.1 * expected, rel=1e-5)
    assert weak["contribution"] == pytest.approx(2 * 0.1 * expected, rel=1e-5)
    assert weak["clamp_value"] == pytest.approx(0.5 + 0.1 * expected, rel=1e-5)
    assert weak["mean_negative"] == pytest.approx(0.5, rel=1e-5)
    assert [row["place"] for row in at_planted] == list(range(1, len(at_planted) + 1))
    layers = rows(found, storage, "trait_layers")
    assert best_of(found, storage) == [1]
    assert [row["accuracy"] for row in layers][:2] == [0, 1]
    assert layers[0]["separation"] == 0
    assert layers[1]["separation"] > layers[2]["separation"] + 1
    assert [row["n_pairs"] for row in layers] == [4, 4, 4]
    loaded = load_trait(storage, found)
    assert choose_layer(config, [loaded]) == 1
    assert [feature.feature_id for feature in loaded.strongest(1, 1)] == [FEATURE]
    assert loaded.strongest(1, 2)[1].clamp_value == weak["clamp_value"]
    assert not loaded.is_given


def test_a_layer_without_features_is_kept_and_refused_where_it_is_chosen(parts: Path, tmp_path: Path) -> None:
    run = prepare(parts, tmp_path, [RUSSIA])
    (found,), storage = find_traits(run), run.storage
    # Before block 1 a last token knows nothing of the words before it.
    assert 0 not in {row["layer"] for row in rows(found, storage, "trait_features")}
    loaded = load_trait(storage, found)
    assert loaded.features[0] == ()
    at_0 = prepare(parts, tmp_path, [RUSSIA], layer=0).config
    with pytest.raises(ConfigError, match=r"^\[steering\] \[\[trait\]\] 'Russia' .* layer 0: .* 1, 2\)"):
        choose_layer(at_0, [loaded])
    assert choose_layer(prepare(parts, tmp_path, [RUSSIA], layer=2).config, [loaded]) == 2


def slow_scores(positive: torch.Tensor, negative: torch.Tensor) -> list[tuple[float, float]]:
    """For each pair, both its scores by a direction that was made without it."""
    scores = []
    for out in range(len(positive)):
        rest = [pair for pair in range(len(positive)) if pair != out]
        mean_positive = torch.stack([positive[pair].double() for pair in rest]).mean(0)
        mean_negative = torch.stack([negative[pair].double() for pair in rest]).mean(0)
        direction = mean_positive - mean_negative
        if float(direction.norm()) > 0:
            direction = direction / direction.norm()
        middle = (mean_positive + mean_negative) / 2
        scores.append(
            (
                float(torch.dot(positive[out].double() - middle, direction)),
                float(torch.dot(negative[out].double() - middle, direction)),
            )
        )
    return scores


def slow_separation(scores: list[tuple[float, float]]) -> tuple[float, float]:
    import statistics

    high, low = [score[0] for score in scores], [score[1] for score in scores]
    pooled = ((statistics.variance(high) + statistics.variance(low)) / 2) ** 0.5
    separation = (statistics.mean(high) - statistics.mean(low)) / pooled
    return separation, sum(p > n for p, n in scores) / len(scores)


@pytest.mark.parametrize(("pairs", "shift"), [(2, 1.0), (5, 0.0), (9, 0.5), (30, 3.0)])
def test_layers_are_judged_on_pairs_that_were_left_out(pairs: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(pairs)
    common = torch.randn(17, generator=generator) * 100
    negative = torch.randn(pairs, 17, generator=generator) + common
    positive = torch.randn(pairs, 17, generator=generator) + common
    positive[:, 3] += shift
    separation, accuracy = tell_apart(positive, negative)
    expected = slow_separation(slow_scores(positive, negative))
    assert separation == pytest.approx(expected[0], rel=1e-9)
    assert accuracy == expected[1]
    swapped = tell_apart(negative, positive)
    assert swapped == pytest.approx((separation, accuracy))


def test_a_separation_without_spread_stays_a_number() -> None:
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    assert tell_apart(ones, zeros) == (LARGEST_SEPARATION, 1)
    assert tell_apart(ones, ones) == (0, 0)


def plain_residuals(folder: Path, prompts: list[str], last: str) -> dict[int, torch.Tensor]:
    """By layer, the residuals at each prompt's last `last`, by whole forwards."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    token = ids_of(folder, last)[-1]
    for prompt in prompts:
        ids = ids_of(folder, prompt)
        at = max(position for position, one in enumerate(ids) if one == token)
        handles = [
            model.model.layers[layer].register_forward_hook(
                lambda _module, _inputs, output, layer=layer, at=at: seen[layer].append(
                    (output[0] if isinstance(output, tuple) else output)[0, at]
                )
            )
            for layer in LAYERS
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    return {layer: torch.stack(found) for layer, found in seen.items()}


@pytest.mark.parametrize("decomposition", ["activations", "encoder"])
def test_a_random_model_gives_what_plain_code_gives(parts: Path, tmp_path: Path, decomposition: str) -> None:
    from sae_lens import SAE

    # The prompts go on after their last function token.
    positive, negative = ([f"{p} river fox" for p in prompts] for prompts in (POSITIVE, NEGATIVE))
    entry = {"name": "random", "positive": positive, "negative": negative}
    run = prepare(
        parts,
        tmp_path,
        [entry],
        model="llama",
        saes=("sae-0", "sae-1", "sae-2"),
        function=".",
        decomposition=decomposition,
    )
    (found,), storage, config = find_traits(run), run.storage, run.config
    residuals = plain_residuals(parts / "llama", [*positive, *negative], ".")
    layers = {row["layer"]: row for row in rows(found, storage, "trait_layers")}
    features = rows(found, storage, "trait_features")
    n_checked = 0
    for layer in LAYERS:
        sae = SAE.load_from_disk(str(parts / f"sae-{layer}"))
        pairs = residuals[layer][:4], residuals[layer][4:]
        separation, accuracy = slow_separation(slow_scores(*pairs))
        assert layers[layer]["separation"] == pytest.approx(separation, rel=1e-3)
        assert layers[layer]["accuracy"] == accuracy
        with torch.no_grad():
            on, off = (sae.encode(side).double() for side in pairs)
            decoded = sae.decode(sae.encode(residuals[layer]))
            through = (pairs[0].mean(0) - pairs[1].mean(0)) @ sae.W_enc
        error = (decoded - residuals[layer]).square().sum()
        variance = (residuals[layer] - residuals[layer].mean(0)).square().sum()
        explained = layers[layer]["explained_variance"]
        assert explained == pytest.approx(float(1 - error / variance), rel=1e-4)
        expected = {}
        for feature in range(sae.cfg.d_sae):
            difference = on[:, feature].mean() - off[:, feature].mean()
            coefficient = float(difference if decomposition == "activations" else through[feature])
            active = [value for value in on[:, feature].tolist() if value > 0]
            if active and coefficient > 0:
                expected[feature] = (
                    coefficient,
                    coefficient * float(sae.W_dec[feature].detach().norm()),
                    sum(active) / len(active),
                    sum(on[:, feature].tolist()) / 4,
                    sum(off[:, feature].tolist()) / 4,
                )
        own = [row for row in features if row["layer"] == layer]
        columns = ("coefficient", "contribution", "clamp_value", "mean_positive", "mean_negative")
        assert {row["feature_id"] for row in own} == set(expected)
        for row in own:
            values = [row[name] for name in columns]
            assert values == pytest.approx(list(expected[row["feature_id"]]), rel=1e-3, abs=1e-5)
        ranked = [row["contribution"] for row in own]
        assert ranked == sorted(ranked, reverse=True)
        n_checked += len(own)
    assert n_checked > 20
    best = max(LAYERS, key=lambda layer: layers[layer]["separation"])
    assert best_of(found, storage) == [best]
    assert choose_layer(config, [load_trait(storage, found)]) == best


def test_only_the_strongest_features_are_kept() -> None:
    sae = tiny.build_sae("standard", d_sae=300, seed=1)
    encoder = Encoder(sae, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    sides = (
        torch.randn(6, tiny.D_MODEL, generator=generator),
        torch.randn(6, tiny.D_MODEL, generator=generator),
    )
    whole, some = (decompose(encoder, *sides, "activations", most) for most in (1000, 64))
    assert len(whole.feature_id) > 100
    assert len(some.feature_id) == 64
    assert some.feature_id.tolist() == whole.feature_id[:64].tolist()
    assert (np.diff(whole.contribution) <= 0).all()
    assert (whole.coefficient > 0).all()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_dictionaries_that_scale_what_they_read_are_decomposed_as_they_read_it(normalize: str) -> None:
    sae = tiny.build_sae("standard", d_sae=64, normalize_activations=normalize)
    encoder = Encoder(sae, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(5, tiny.D_MODEL, generator=generator) * 9 for _ in range(2))
    found = decompose(encoder, positive, negative, "encoder", 64)
    # The bias is in both means, so a difference of pre-activations is the same without it.
    with torch.no_grad():
        before = [sae.run_time_activation_norm_fn_in(x) @ sae.W_enc for x in (positive, negative)]
        difference = before[0].mean(0) - before[1].mean(0)
        reconstructed = sae.decode(sae.encode(positive))
    assert found.coefficient == pytest.approx(difference[found.feature_id.tolist()].numpy(), rel=1e-4)
    variance = (positive - positive.mean(0)).square().sum()
    expected = float(1 - (reconstructed - positive).square().sum() / variance)
    assert explained_variance(encoder, positive) == pytest.approx(expected, rel=1e-4)


class Temporal:
    """Stands for an architecture that has no encoder matrix."""

    def __init__(self) -> None:
        whole = tiny.build_sae("standard", d_sae=64)
        self.encode = Encoder(whole, torch.device("cpu"))
        self.d_sae = 64
        self.sae = SimpleNamespace(
            cfg=SimpleNamespace(architecture=lambda: "temporal"), W_dec=whole.W_dec, decode=whole.decode
        )

    def __call__(self, residuals: torch.Tensor) -> Any:
        return self.encode(residuals)


def test_a_dictionary_without_encoder_weights_is_refused_where_they_are_asked_for() -> None:
    encoder: Any = Temporal()
    residuals = torch.randn(6, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DictionaryError, match=r"^layer 5: a temporal dictionary has no encoder weights"):
        contrasted(encoder, 5, residuals, "encoder", 64)
    assert len(contrasted(encoder, 5, residuals, "activations", 64)[1]) > 5


def test_given_features_pass_through_without_a_model(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import SAE

    run = prepare(parts, tmp_path, [GIVEN], saes=("sae-0", "sae-1", "sae-2"))
    monkeypatch.setattr(prompt_features, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert planned(run).missing == 1
    (found,), storage, config = find_traits(run), run.storage, run.config
    assert found_traits(run) == [found]
    (layer,) = rows(found, storage, "trait_layers")
    assert layer == {
        "trait": "given",
        "layer": 1,
        "separation": None,
        "accuracy": None,
        "explained_variance": None,
        "n_pairs": 0,
    }
    norms = SAE.load_from_disk(str(parts / "sae-1")).W_dec.detach().norm(dim=1)
    for place, row in enumerate(rows(found, storage, "trait_features"), 1):
        feature, value = GIVEN["features"][place - 1], GIVEN["values"][place - 1]
        assert (row["trait"], row["layer"], row["place"], row["feature_id"]) == ("given", 1, place, feature)
        assert row["coefficient"] == row["clamp_value"] == value
        assert row["contribution"] == pytest.approx(value * float(norms[feature]), rel=1e-6)
        assert row["mean_positive"] is row["mean_negative"] is None
    loaded = load_trait(storage, found)
    assert given_trait(Trait.model_validate(GIVEN)) == loaded
    assert given_trait(Trait.model_validate(RUSSIA)) is None
    assert loaded.is_given
    assert choose_layer(config, [loaded]) == 1
    # `steering.features` is about features that are found: of known ones all are steered.
    assert [feature.feature_id for feature in loaded.strongest(1, 2)] == GIVEN["features"]
    with pytest.raises(ConfigError, match="'given' cannot be steered at layer 2: its features are given at"):
        loaded.strongest(2, 1)


def made_up(trait: str, separations: dict[int, float | None]) -> LoadedTrait:
    return LoadedTrait(
        trait=trait,
        layers=tuple(
            TraitLayer(
                layer=layer,
                separation=separation,
                accuracy=None,
                explained_variance=None,
                n_pairs=2,
                is_most_informative=False,
            )
            for layer, separation in separations.items()
        ),
        features={
            layer: (TraitFeature(feature_id=1, coefficient=1.0, clamp_value=1.0),) for layer in separations
        },
    )


def test_several_traits_are_steered_where_their_separations_sum_highest(parts: Path, tmp_path: Path) -> None:
    config = prepare(parts, tmp_path, [RUSSIA]).config
    one, other = made_up("one", {0: 5.0, 1: 4.0, 2: -1.0}), made_up("other", {0: 1.0, 1: 3.0, 2: 3.0})
    assert choose_layer(config, [one]) == 0
    assert choose_layer(config, [other]) == 1
    assert choose_layer(config, [one, other]) == 1
    assert choose_layer(config, [one, made_up("given", {2: None})]) == 2
    assert choose_layer(prepare(parts, tmp_path, [RUSSIA], layer=2).config, [one, other]) == 2


def test_traits_are_steered_where_all_have_features(parts: Path, tmp_path: Path) -> None:
    config = prepare(parts, tmp_path, [RUSSIA]).config
    one, other = made_up("one", {0: 5.0, 1: 4.0, 2: -1.0}), made_up("other", {0: 1.0, 1: 3.0, 2: 3.0})
    lacking = replace(one, features={**one.features, 0: (), 1: ()})
    assert choose_layer(config, [replace(one, features={**one.features, 0: ()})]) == 1
    assert choose_layer(config, [lacking, other]) == 2
    with pytest.raises(ConfigError, match=r"'one' cannot be steered at layer 1: .* features: 2\)"):
        choose_layer(config, [lacking, replace(other, features={**other.features, 2: ()})])


@pytest.mark.slow
def test_a_second_call_finds_nothing_new_and_a_changed_trait_alone_is_found_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"name": "fox", "positive": NEGATIVE, "negative": POSITIVE}
    given = {**GIVEN, "layer": 2}
    entries = [RUSSIA, given, other]
    run = prepare(parts, tmp_path, entries)
    assert planned(run).details == ("[[trait]] 'Russia'", "[[trait]] 'given'", "[[trait]] 'fox'")
    reports: list[tuple[int, int, str]] = []
    made = find_traits(run, lambda *report: reports.append(report))
    assert reports == [(done, 16, "texts, steering") for done in (0, 8, 16)]
    assert [found.trait for found in made] == ["Russia", "given", "fox"]
    assert found_traits(run) == made
    written: list[str] = []
    commit = engine.commit

    def counting(storage: Storage, folder: str, *rest: Any) -> Any:
        written.append(folder)
        return commit(storage, folder, *rest)

    monkeypatch.setattr(engine, "commit", counting)
    assert find_traits(run) == made
    assert written == []
    # Content is a function of the trait alone.
    assert find_traits(prepare(parts, tmp_path, entries[::-1])) == made[::-1]
    assert written == []
    alone = prepare(parts, tmp_path / "alone", [other])
    assert find_traits(alone) == made[2:]
    for name in ("trait_layers", "trait_features"):
        for entry in made[2].layers:
            file = f"{entry.folder}/{name}.parquet"
            assert alone.storage.read_bytes(file) == run.storage.read_bytes(file)

    def remade(run: Run) -> list[str]:
        told = planned(run)
        assert told.missing
        written.clear()
        again = find_traits(run)
        assert len(written) == told.missing
        new = [found for found in again if found not in made]
        assert {entry.folder for found in new for entry in found.layers if entry not in old} == set(written)
        return [found.trait for found in new]

    old = {entry for found in made for entry in found.layers}

    changed = {**RUSSIA, "negative": ["the quick is.", *NEGATIVE[1:]]}
    assert remade(prepare(parts, tmp_path, [changed, given, other])) == ["Russia"]
    assert remade(prepare(parts, tmp_path, [RUSSIA, {**given, "values": [1.0, 1.0, 1.0]}, other])) == [
        "given"
    ]
    # A trait that is looked for reads every layer; one that is given, its own.
    saes = ("planted-sae", "other-sae", "planted-sae")
    assert remade(prepare(parts, tmp_path, entries, saes=saes)) == ["Russia", "fox"]
    assert len(written) == 2
    assert remade(prepare(parts, tmp_path, entries, decomposition="encoder")) == ["Russia", "fox"]
    assert remade(prepare(parts, tmp_path, entries, features=65)) == ["Russia", "fox"]
    # Another last function token is another trait; function tokens that no prompt ends with are not.
    assert found_traits(prepare(parts, tmp_path, entries, function="the . river")) == made
    assert remade(prepare(parts, tmp_path, entries, function="the is river of")) == ["Russia", "fox"]
    # What is steered, how and how strongly is no part of what a trait is.
    assert found_traits(prepare(parts, tmp_path, entries, strengths=[3.0], seed=4, modes=["add"])) == made


@pytest.mark.slow
def test_another_dictionary_makes_its_layer_alone_again_and_reads_each_prompt_once(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(parts, tmp_path, [RUSSIA, GIVEN])
    (made, given), storage = find_traits(run), run.storage
    asked: list[list[int]] = []
    read = traits.residuals_of

    def counting(model: Any, ids: Any, layers: Any) -> Any:
        asked.append(list(layers))
        return read(model, ids, layers)

    monkeypatch.setattr(traits, "residuals_of", counting)
    other = prepare(parts, tmp_path, [RUSSIA, GIVEN], saes=("sae-0", "planted-sae", "sae-2"))
    told = planned(other)
    assert (told.done, told.missing, told.details) == (2, 2, ("[[trait]] 'Russia', layers 0, 2",))
    again, same = find_traits(other)
    assert same == given
    assert asked == [[0, 2]] * 8
    assert [old == now for old, now in zip(made.layers, again.layers, strict=True)] == [False, True, False]
    # How well a layer tells prompts apart is no matter of its dictionary: the layer chosen is the same.
    assert best_of(made, storage) == best_of(again, storage) == [1]
    fresh = prepare(parts, tmp_path / "fresh", [RUSSIA, GIVEN], saes=("sae-0", "planted-sae", "sae-2"))
    assert find_traits(fresh) == [again, given]
    for entry in again.layers:
        for name in ("trait_layers", "trait_features"):
            file = f"{entry.folder}/{name}.parquet"
            assert storage.read_bytes(file) == fresh.storage.read_bytes(file)


def test_of_equal_layers_the_lowest_is_the_most_informative(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    separations = {1: 0.5, 3: 2.0, 4: 2.0}
    for layer, separation in separations.items():
        row = {"trait": "t", "layer": layer, "separation": separation, "accuracy": 1.0, "n_pairs": 2}
        table = pa.Table.from_pylist([row], schema=SHARD_FILES["trait_layers"])
        storage.write_parquet(f"traits/{layer}/trait_layers.parquet", table)
    layers = tuple(LayerFolder(layer=layer, folder=f"traits/{layer}") for layer in separations)
    found = TraitFeatures(trait="t", layers=layers)
    assert best_of(found, storage) == [3]
    assert [layer.separation for layer in load_layers(storage, found)] == [0.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("entry", "function", "message"),
    [
        ({**GIVEN, "features": [9, 96, 3]}, ".", r"^\[steering\] \[\[trait\]\] 'given'.* 96"),
        ({**GIVEN, "features": [9, -1, 3]}, ".", r"^\[steering\] .*'given'.* greater than or equal to 0"),
        ({**GIVEN, "values": [1.0, 2.0, float("nan")]}, ".", r"^\[steering\] .*'given'.* finite number"),
        ({**GIVEN, "layer": 7}, ".", r"^\[steering\] \[\[trait\]\] 'given'.* 7"),
        (RUSSIA, "fox", r"^\[steering\] \[\[trait\]\] 'Russia': the prompt .*no function token"),
    ],
)
def test_what_cannot_be_used_names_its_trait(
    parts: Path, tmp_path: Path, entry: dict[str, Any], function: str, message: str
) -> None:
    run = prepare(parts, tmp_path, [entry], saes=("sae-0", "sae-1", "sae-2"), function=function)
    for ask in (planned, find_traits):
        with pytest.raises(ConfigError, match=message):
            ask(run)


def test_a_dictionary_that_cannot_be_decomposed_names_the_trait(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(parts, tmp_path, [RUSSIA], decomposition="encoder")

    def refusing(*_: Any) -> Any:
        raise DictionaryError("no encoder weights", hint="way out")

    monkeypatch.setattr(contrasts, "_through_encoder", refusing)
    with pytest.raises(
        DictionaryError, match=r"^\[steering\] \[\[trait\]\] 'Russia': layer 0: no encoder weights \(way"
    ):
        find_traits(run)
    assert planned(run).missing == 3
