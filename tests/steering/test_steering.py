"""Steering experiments against the plainest code, their controls, and what is made again."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from builders import commit_again, run_of
from plain import finished
from pydantic import ValidationError
from suite import EACH_ARCHITECTURE

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, DictionaryError, FunctokError, ModelError
from schemas.steering.work import Steered
from schemas.tables import SHARD_FILES
from schemas.work import CorpusShards
from tasks.corpus.function_tokens import function_token_ids
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.run import Run, make, plan
from tasks.models import language_model as language_models
from tasks.models.language_model import LanguageModel
from tasks.steering import prompt_features, steering
from tasks.steering import sweep as steering_sweep
from tasks.steering.conditions import moved_features, random_features
from tasks.steering.loaded_traits import TraitFeature, load_trait
from tasks.steering.measures import divergences
from tasks.steering.steering import STEERING

LAYERS = (1, 2)
PLANTED, PLANTED_TOKEN, PLANTED_LAYER = 7, 300, 2
NEW = 5
PROMPT = "river mountain was of the"
TRAITS: list[dict[str, Any]] = [
    {
        "name": "found",
        "positive": ["Tokyo of the", "Tokyo is in the", "Tokyo was to the"],
        "negative": ["Moscow of the", "Moscow is in the", "Moscow was to the"],
    },
    {"name": "given", "layer": 1, "features": [3, 11], "values": [2.0, 3.0]},
    {"name": "planted", "layer": PLANTED_LAYER, "features": [PLANTED], "values": [2.0]},
]
STEER: list[dict[str, Any]] = [
    {"traits": ["given"], "prompt": PROMPT, "target": " London"},
    {
        "traits": ["found", "given"],
        "prompt": "the quick fox jumps to the",
        "target": " dog is",
        "name": "both",
    },
]


@dataclass(frozen=True)
class World:
    """Everything before steering, in a storage that tests copy."""

    folder: Path
    shards: CorpusShards

    def config(self, root: Path, architecture: str = "llama", **sections: Any) -> Config:
        return Config.model_validate(
            {
                "corpus": {"urls": [str(self.folder / "corpus.jsonl")]},
                "model": {"name": str(self.folder / architecture), "threads": 1},
                "sae": [{"layer": layer, "path": str(self.folder / f"sae-{layer}")} for layer in LAYERS],
                "windows": {"context_size": 32},
                "storage": {"root": str(root)},
                **sections,
            }
        )


@dataclass(frozen=True)
class Here:
    """A test's own run, of which corpus and dictionaries are there."""

    run: Run

    @property
    def storage(self) -> Storage:
        return self.run.storage

    def make(self, *progress: Any) -> Steered:
        return make(self.run, STEERING, *progress)

    def find(self) -> Steered | None:
        """What is there, looked for anew; None if any of it is missing."""
        return self.run.result(STEERING) if self.status() == [] else None

    def status(self) -> list[str]:
        """What is missing, as `functok status` lists it, looked for anew."""
        return self.planned()[1]

    def planned(self) -> tuple[int, list[str]]:
        """The folders that are done, and what is missing."""
        self.run.forget(STEERING)
        (told,) = plan(self.run, [STEERING])
        return told.done, [*told.details]

    def tables(self) -> list[list[dict[str, Any]]]:
        made = self.make().experiments
        tables = [self.storage.read_parquet(f"{one.folder}/steering.parquet") for one in made]
        assert all(table.schema == SHARD_FILES["steering"] for table in tables)
        return [table.to_pylist() for table in tables]

    @property
    def function_ids(self) -> set[int]:
        shards = self.run.result(TOKENIZE)
        return set(function_token_ids(self.run.config, self.storage, shards).tolist())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("world")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    head = AutoModelForCausalLM.from_pretrained(folder / "llama").get_output_embeddings().weight
    for layer in LAYERS:
        sae = tiny.build_sae("jumprelu", seed=layer)
        if layer == PLANTED_LAYER:
            with torch.no_grad():
                direction = head[PLANTED_TOKEN] / head[PLANTED_TOKEN].norm()
                sae.W_dec[PLANTED] = direction
                sae.W_enc[:, PLANTED] = direction
        sae.save_model(str(folder / f"sae-{layer}"))
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(40, longest=60))
    world = World(folder, CorpusShards(shards=(), tokenizer_key="", vocabulary=""))
    run = finished(world.config(folder / "run"), None, DICTIONARIES)
    return World(folder, run.result(TOKENIZE))


def here_of(config: Config, shards: CorpusShards) -> Here:
    run = run_of(config, Storage(config.storage.root), {TOKENIZE: shards})
    make(run, DICTIONARIES)
    return Here(run)


def prepare(
    world: World,
    root: Path,
    architecture: str = "llama",
    steer: Sequence[dict[str, Any]] = STEER,
    trait: Sequence[dict[str, Any]] = TRAITS,
    **steering: Any,
) -> Here:
    if not root.exists() or not (root / "run").exists():
        shutil.copytree(world.folder / "run", root / "run")
    lines = []
    for kind, entries in (("trait", trait), ("steer", steer)):
        for entry in entries:
            lines.append(f"[[{kind}]]")
            lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in entry.items()]
    cases = root / "cases.toml"
    cases.write_text("\n".join(lines) + "\n")
    section = {
        "cases": str(cases),
        "features": 3,
        "strengths": [1.0, 3.0],
        "random_controls": 2,
        "max_new_tokens": NEW,
        "batch_size": 8,
        **steering,
    }
    return here_of(world.config(root / "run", architecture, steering=section), world.shards)


NAMES = ("mode", "place", "control", "draw", "strength")


def by_condition(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = {tuple(row[name] for name in NAMES): row for row in rows}
    assert len(found) == len(rows)
    return found


# The plain twin: one condition at a time, no batch, no cache, no hooks of ours


class Twin:
    """A model of transformers, one sequence a forward, whose residual stream one function changes."""

    def __init__(self, folder: Path, layer: int) -> None:
        from sae_lens import SAE
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.sae = SAE.load_from_disk(str(folder.parent / f"sae-{layer}"))
        model = self.model.gpt_neox if hasattr(self.model, "gpt_neox") else self.model.model
        self.block = model.layers[layer]

    def ids(self, text: str, bos: bool = True) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if bos else ids

    @torch.no_grad()
    def log_probs(self, ids: list[int], change: Any = None) -> torch.Tensor:
        """(n, vocabulary) float64 of the token after each."""

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden + change(hidden[0])[None]
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = None if change is None else self.block.register_forward_hook(hook)
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].double()
        if handle is not None:
            handle.remove()
        return torch.log_softmax(logits, dim=-1)

    def residual(self, ids: list[int]) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            kept.append(hidden.clone())
            return torch.zeros_like(hidden)

        self.log_probs(ids, keep)
        return kept[0]

    def greedy(self, ids: list[int], change: Any, n: int) -> list[int]:
        new: list[int] = []
        while len(new) < n:
            token = int(self.log_probs([*ids, *new], change)[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            new.append(token)
        return new

    def target(self, ids: list[int], target: list[int], change: Any) -> float:
        rows = self.log_probs([*ids, *target], change)[len(ids) - 1 : -1]
        return math.fsum(float(row[token]) for row, token in zip(rows, target, strict=True))

    def perplexity(self, ids: list[int], new: list[int]) -> float | None:
        return math.exp(-self.target(ids, new, None) / len(new)) if new else None

    def added(self, features: Sequence[int], values: Sequence[float], hidden: torch.Tensor) -> torch.Tensor:
        whole = sum(
            value * self.sae.W_dec[feature].detach() for feature, value in zip(features, values, strict=True)
        )
        return torch.zeros_like(hidden) + whole

    def clamped(self, features: Sequence[int], values: Sequence[float], hidden: torch.Tensor) -> torch.Tensor:
        encoder, decoder = (
            self.sae.W_enc[:, list(features)].detach().double(),
            self.sae.W_dec[list(features)].detach().double(),
        )
        x = hidden.double() - (self.sae.b_dec.detach().double() if self.sae.cfg.apply_b_dec_to_input else 0)
        before = x @ encoder + self.sae.b_enc[list(features)].detach().double()
        wanted = torch.tensor(list(values), dtype=torch.float64)
        rows = [torch.linalg.solve((decoder @ encoder).T, wanted - row) @ decoder for row in before]
        return torch.stack(rows).float()


def plain_change(twin: Twin, row: dict[str, Any], own: dict[str, Sequence[Any]], length: int) -> Any:
    """What a row of the table says is done to (n, d_model)."""
    if row["strength"] == 0:
        return None
    values = [row["strength"] * value for value in own[row["mode"]]]

    def change(hidden: torch.Tensor) -> torch.Tensor:
        moved = {"add": twin.added, "clamp": twin.clamped}[row["mode"]](own["features"], values, hidden)
        if row["control"] == "random":
            drawn = twin.added(row["feature_ids"], values, hidden)
            moved = drawn / drawn.norm(dim=1, keepdim=True) * moved.norm(dim=1, keepdim=True)
        if row["position"] is None:
            return moved
        only = torch.zeros_like(moved)
        only[row["position"]] = moved[row["position"]]
        return only

    return change


def check_against_twin(twin: Twin, rows: Sequence[dict[str, Any]], own: dict[str, Sequence[Any]]) -> None:
    ids = twin.ids(rows[0]["prompt"])
    target = twin.ids(rows[0]["target"], bos=False)
    baseline, text = twin.log_probs(ids)[-1], twin.greedy(ids, None, NEW)
    residual, unsteered = twin.residual(ids), twin.target(ids, target, None)
    baseline_perplexity = twin.perplexity(ids, text)
    for row in rows:
        change = plain_change(twin, row, own, len(ids))
        log_p = twin.log_probs(ids, change)[-1]
        new = twin.greedy(ids, change, NEW)
        expected = {
            "kl": math.fsum((log_p.exp() * (log_p - baseline)).tolist()),
            "target_logprob": unsteered,
            "target_logprob_delta": twin.target(ids, target, change) - unsteered,
            "baseline_perplexity": baseline_perplexity,
            "perplexity": twin.perplexity(ids, new),
            "relative_norm": 0.0,
        }
        if change is not None:
            at = slice(None) if row["position"] is None else slice(row["position"], row["position"] + 1)
            norms = change(residual)[at].norm(dim=1) / residual[at].norm(dim=1)
            expected["relative_norm"] = float(norms.mean())
        found = {name: row[name] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), row
        assert row["baseline_text"] == twin.tokenizer.decode(text, skip_special_tokens=True)
        assert row["steered_text"] == twin.tokenizer.decode(new, skip_special_tokens=True), row


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.slow
def test_a_sweeps_numbers_are_the_plain_twins(world: World, tmp_path: Path, architecture: str) -> None:
    here = prepare(world, tmp_path, architecture, random_controls=1, strengths=[2.0])
    single, both = here.tables()
    twin = Twin(world.folder / architecture, 1)
    check_against_twin(twin, single, {"features": [3, 11], "add": [2.0, 3.0], "clamp": [2.0, 3.0]})
    found, given, _ = (load_trait(here.storage, trait) for trait in here.make().traits)
    kept = [*found.features[1][:3], *given.features[1]]
    own: dict[int, tuple[float, float]] = {}
    for feature in kept:
        add, clamp = own.get(feature.feature_id, (0.0, 0.0))
        own[feature.feature_id] = (add + feature.coefficient, max(clamp, feature.clamp_value))
    values = {"add": [add for add, _ in own.values()], "clamp": [clamp for _, clamp in own.values()]}
    check_against_twin(twin, both, {"features": list(own), **values})
    trait_rows = [row for row in both if row["control"] == "trait"]
    assert all(row["feature_ids"] == list(own) for row in trait_rows)
    assert {row["traits"] for row in both} == {"found + given"}
    assert {row["case"] for row in both} == {"both"}
    assert {row["case"] for row in single} == {"given"}
    # It is no accident of numbers that do not move.
    moved = [row for row in single if row["strength"] > 0]
    assert sum(row["kl"] > 1e-3 for row in moved) > len(moved) / 2
    assert sum(row["steered_text"] != row["baseline_text"] for row in moved) > len(moved) / 4


@pytest.mark.slow
def test_the_rows_are_every_setting_once(world: World, tmp_path: Path) -> None:
    here = prepare(world, tmp_path)
    function, twin = here.function_ids, Twin(world.folder / "llama", 1)
    for rows in here.tables():
        ids = twin.ids(rows[0]["prompt"])
        last = max(i for i, token in enumerate(ids) if token in function)
        content = max(i for i in range(1, last) if ids[i] not in function)
        assert last == len(ids) - 1
        at = {"last function token": last, "all positions": None, "content token": content}
        places = [(place, "trait", 0) for place in at]
        places += [(place, "random", draw) for place in list(at)[:2] for draw in (1, 2)]
        assert list(by_condition(rows)) == [
            (mode, *place, strength)
            for mode in ("add", "clamp")
            for place in sorted(places, key=places.index)
            for strength in (0.0, 1.0, 3.0)
        ]
        assert all(row["position"] == at[row["place"]] for row in rows)
        assert {row["layer"] for row in rows} == {1}


# Strength 0


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.slow
def test_strength_0_is_the_unsteered_model_to_the_bit(
    world: World, tmp_path: Path, batch_size: int, is_chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few bytes that an unsteered batch would be cut, were it not run as a steered one.
    monkeypatch.setattr(language_models, "CHUNK_BYTES", 4 * 400 * 7)
    if not is_chunked:
        monkeypatch.setattr(LanguageModel, "_head_explains_logits", lambda _self: False)
    shapes: list[set[tuple[int, ...]]] = []
    ask, build = steering_sweep.answers, LanguageModel.__init__

    def watched(self: LanguageModel, *arguments: Any) -> None:
        build(self, *arguments)

        def saw(_module: Any, values: Any, named: Any) -> None:
            if asking:
                ids = values[0] if values else named["input_ids"]
                shapes[-1].add(tuple(ids.shape))

        self.module.get_decoder().register_forward_pre_hook(saw, with_kwargs=True)

    def asked(*arguments: Any) -> Any:
        shapes.append(set())
        asking.append(True)
        found = ask(*arguments)
        asking.clear()
        return found

    asking: list[bool] = []
    monkeypatch.setattr(LanguageModel, "__init__", watched)
    monkeypatch.setattr(steering_sweep, "answers", asked)
    here = prepare(world, tmp_path, batch_size=batch_size, steer=STEER[1:], strengths=[2.0])
    (rows,) = here.tables()
    # 2 modes x 7 variants x 2 strengths, in batches of one size; a baseline's forwards have the shapes of a batch's:
    # the prompt, the prompt with the target, and one token at a time
    assert len(rows) == 28
    n_rows = {1: 1, 3: 3, 64: 28}[batch_size]
    assert len(shapes) == 1 + -(-28 // n_rows)
    assert {n for each in shapes for n, _ in each} == {n_rows}
    assert len(shapes[0]) == 3
    assert all(each == shapes[0] for each in shapes)
    still = [row for row in rows if row["strength"] == 0]
    assert {(row["mode"], row["place"], row["control"]) for row in still} == {
        (row["mode"], row["place"], row["control"]) for row in rows
    }
    for row in still:
        assert (row["kl"], row["target_logprob_delta"], row["relative_norm"]) == (0.0, 0.0, 0.0)
        assert row["steered_text"] == row["baseline_text"] != ""
        assert row["perplexity"] == row["baseline_perplexity"]
    for row in rows:
        if row["strength"] > 0:
            assert row["kl"] > 0
            assert row["target_logprob_delta"] != 0


@pytest.mark.slow
def test_another_batch_size_gives_the_same_numbers(world: World, tmp_path: Path) -> None:
    small = {"steer": STEER[:1], "strengths": [2.0], "random_controls": 1}
    one, other = (prepare(world, tmp_path, batch_size=size, **small).tables()[0] for size in (1, 7))
    assert len(one) == 20
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            expected = right[name]
            if isinstance(value, float):
                expected = pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert value == expected


# A planted feature


@pytest.mark.slow
def test_a_planted_feature_makes_its_token_likelier_by_what_hand_computes(
    world: World, tmp_path: Path
) -> None:
    twin = Twin(world.folder / "llama", PLANTED_LAYER)
    token = twin.tokenizer.decode([PLANTED_TOKEN])
    assert twin.ids(token, bos=False) == [PLANTED_TOKEN]
    here = prepare(
        world,
        tmp_path,
        steer=[{"traits": ["planted"], "prompt": PROMPT, "target": token}],
        strengths=[1.0, 4.0, 1000.0],
    )
    (rows,) = here.tables()
    assert {row["layer"] for row in rows} == {PLANTED_LAYER}
    found = by_condition(rows)

    # After the last block there is the norm and the head; the steered position is the one that predicts.
    last = twin.residual(twin.ids(PROMPT))[-1].double()
    head = twin.model.get_output_embeddings().weight.detach().double()
    norm = twin.model.model.norm
    direction = head[PLANTED_TOKEN] / head[PLANTED_TOKEN].norm()

    def by_hand(strength: float) -> float:
        moved = last + 2.0 * strength * direction
        normed = moved / torch.sqrt((moved**2).mean() + norm.variance_epsilon) * norm.weight.detach().double()
        logits = head @ normed
        return float(logits[PLANTED_TOKEN] - torch.logsumexp(logits, dim=0))

    gains = []
    for strength in (1.0, 4.0, 1000.0):
        row = found["add", "last function token", "trait", 0, strength]
        assert row["target_logprob"] == pytest.approx(by_hand(0.0), abs=1e-4)
        assert row["target_logprob_delta"] == pytest.approx(by_hand(strength) - by_hand(0.0), abs=1e-4)
        gains.append(row["target_logprob_delta"])
    assert 0 < gains[0] < gains[1] < gains[2]
    assert found["add", "last function token", "trait", 0, 1000.0]["steered_text"].startswith(token)
    assert token not in found["add", "last function token", "trait", 0, 0.0]["steered_text"]
    # At every position it goes on: the generated tokens are steered too.
    assert found["add", "all positions", "trait", 0, 1000.0]["steered_text"] == token * NEW
    for mode in ("add", "clamp"):
        for draw in (1, 2):
            random = found[mode, "all positions", "random", draw, 1000.0]
            assert token * NEW not in random["steered_text"]
            assert random["target_logprob_delta"] < gains[2] / 2
    # The content token's own last block writes nothing into the next token's: no later block reads it.
    beside = found["add", "content token", "trait", 0, 1000.0]
    assert abs(beside["target_logprob_delta"]) < 1e-4
    assert beside["relative_norm"] > 1


# Controls


@pytest.mark.slow
def test_random_features_change_as_much_as_the_traits(world: World, tmp_path: Path) -> None:
    for rows in prepare(world, tmp_path).tables():
        found = by_condition(rows)
        draws: dict[int, set[tuple[int, ...]]] = {}
        for (mode, place, control, draw, strength), row in found.items():
            if control == "random":
                trait = found[mode, place, "trait", 0, strength]
                assert row["relative_norm"] == pytest.approx(trait["relative_norm"], rel=1e-5)
                assert row["relative_norm"] > 0 or strength == 0
                assert len(set(row["feature_ids"])) == len(trait["feature_ids"])
                assert not set(row["feature_ids"]) & set(trait["feature_ids"])
                draws.setdefault(draw, set()).add(tuple(row["feature_ids"]))
        # One draw is the same at every strength, in every mode and place; two are not the same.
        assert {draw: len(features) for draw, features in draws.items()} == {1: 1, 2: 1}
        assert draws[1] != draws[2]


def test_features_that_are_switched_off_have_controls_too(world: World, tmp_path: Path) -> None:
    off = {"name": "off", "layer": 1, "features": [*range(12)], "values": [0.0] * 12}
    steer = [{"traits": ["off"], "prompt": PROMPT, "target": " London"}]
    (rows,) = prepare(world, tmp_path, steer=steer, trait=[off], modes=["clamp"], strengths=[1.0]).tables()
    moved = {
        control: [
            row["relative_norm"]
            for row in rows
            if row["control"] == control and row["place"] == "all positions"
        ]
        for control in ("trait", "random")
    }
    assert max(moved["trait"]) > 0
    assert max(moved["random"]) == pytest.approx(max(moved["trait"]), rel=1e-4)


@pytest.mark.slow
def test_another_seed_changes_the_random_rows_alone(world: World, tmp_path: Path) -> None:
    one, other = prepare(world, tmp_path).tables(), prepare(world, tmp_path, seed=1).tables()
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            if a["control"] == "trait":
                assert a == b
            else:
                assert a["feature_ids"] != b["feature_ids"]
                assert a["strength"] == 0 or a["kl"] != b["kl"]


def test_random_features_are_a_function_of_seed_prompt_and_draw() -> None:
    assert random_features(0, "a", 1, [3, 4], 50) == random_features(0, "a", 1, (3, 4), 50)
    some = {
        random_features(seed, prompt, draw, [3, 4], 50)
        for seed in (0, 1)
        for prompt in "ab"
        for draw in (1, 2)
    }
    assert len(some) > 6
    for draw in range(20):
        assert sorted(random_features(0, "a", draw, [0, 1, 2], 6)) == [3, 4, 5]
    with pytest.raises(ConfigError, match=r"dictionary's 5 latents.*steering.features"):
        random_features(0, "a", 1, [0, 1, 2], 5)


@pytest.mark.slow
def test_a_prompt_without_a_content_token_has_no_such_control(world: World, tmp_path: Path) -> None:
    steer = [{"traits": ["given"], "prompt": " the of the", "target": " London"}]
    here = prepare(world, tmp_path, steer=steer, strengths=[1.0], random_controls=0, modes=["add"])
    assert set(Twin(world.folder / "llama", 1).ids(" the of the", bos=False)) <= here.function_ids
    (rows,) = here.tables()
    assert [(row["place"], row["strength"]) for row in rows] == [
        ("last function token", 0.0),
        ("last function token", 1.0),
        ("all positions", 0.0),
        ("all positions", 1.0),
    ]


def test_a_feature_of_two_traits_is_moved_once() -> None:
    def feature(number: int, coefficient: float, clamp: float) -> TraitFeature:
        return TraitFeature(feature_id=number, coefficient=coefficient, clamp_value=clamp)

    moved = moved_features(
        [[feature(5, 1.0, 4.0), feature(2, 2.0, 3.0)], [feature(2, 0.5, 9.0), feature(8, 4.0, 1.0)]]
    )
    assert moved.feature_ids == (5, 2, 8)
    assert moved.values == {"add": (1.0, 2.5, 4.0), "clamp": (4.0, 9.0, 1.0)}


@pytest.mark.slow
def test_a_text_that_ends_at_once_has_no_perplexity(world: World, tmp_path: Path) -> None:
    twin = Twin(world.folder / "llama", PLANTED_LAYER)
    steer = [{"traits": ["planted"], "prompt": PROMPT, "target": " London"}]
    here = prepare(world, tmp_path, steer=steer, strengths=[1000.0], random_controls=0, modes=["add"])
    # The same tokenizer, but for its end, which is now the planted token.
    twin.tokenizer.eos_token = twin.tokenizer.convert_ids_to_tokens(PLANTED_TOKEN)
    twin.tokenizer.save_pretrained(tmp_path / "ending")
    model = here.run.config.model.model_copy(update={"tokenizer": str(tmp_path / "ending")})
    config = here.run.config.model_copy(update={"model": model})
    (rows,) = here_of(config, world.shards).tables()
    found = by_condition(rows)
    for place in ("last function token", "all positions"):
        ended = found["add", place, "trait", 0, 1000.0]
        assert (ended["steered_text"], ended["perplexity"]) == ("", None)
        assert ended["baseline_perplexity"] > 1
        assert found["add", place, "trait", 0, 0.0]["steered_text"] != ""


def test_divergences_are_never_negative_and_count_only_what_is_possible() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0]])
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(2), math.inf]
    assert divergences(p.log(), q.log()) == pytest.approx(expected, abs=1e-7)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 300, generator=generator)
    near = logits + 1e-6 * torch.randn(50, 300, generator=generator)
    found = divergences(torch.log_softmax(near, 1), torch.log_softmax(logits, 1))
    assert min(found) >= 0
    assert max(found) < 1e-9
    assert divergences(logits, logits) == [0.0] * 50


# What is made again


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_it_lacks(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepare(world, tmp_path)
    assert here.find() is None
    reports: list[tuple[int, int, str]] = []

    def killing(done: int, total: int, what: str) -> None:
        reports.append((done, total, what))
        if total == 84 and done > 42:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.make(killing)
    assert here.find() is None
    assert {what for _, _, what in reports} == {"texts, steering"}
    # 6 prompts of the trait that is looked for, then 42 conditions an experiment, in batches of 7
    assert reports[:2] == [(0, 6, "texts, steering"), (6, 6, "texts, steering")]
    seen = [done for done, total, _ in reports if total == 84]
    assert list(dict.fromkeys(seen)) == list(range(0, 50, 7))
    assert {total for _, total, _ in reports} == {6, 84}
    run, swept, loaded = steering.sweep, [], []

    def counting(*arguments: Any) -> Any:
        swept.append(arguments[2].prompt)
        return run(*arguments)

    monkeypatch.setattr(steering, "sweep", counting)
    reports.clear()
    made = here.make(lambda *report: reports.append(report))
    assert swept == [STEER[1]["prompt"]]
    assert list(dict.fromkeys(reports)) == [(done, 42, "texts, steering") for done in range(0, 43, 7)]
    assert [(one.case, one.prompt) for one in made.experiments] == [
        ("given", PROMPT),
        ("both", STEER[1]["prompt"]),
    ]
    whole = prepare(world, tmp_path / "whole")
    assert [one.folder for one in whole.make().experiments] == [one.folder for one in made.experiments]
    for one in made.experiments:
        name = f"{one.folder}/steering.parquet"
        assert here.storage.read_bytes(name) == whole.storage.read_bytes(name)

    def load(*arguments: Any) -> Any:
        loaded.append(arguments)
        raise AssertionError("nothing needs weights any more")

    for module in (steering, prompt_features):
        for name in ("load_language_model", "load_model", "load_dictionary"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, load)
    reports.clear()
    assert here.make(lambda *report: reports.append(report)) == made == here.find()
    assert reports == []
    here.storage.delete(made.experiments[0].folder)
    assert here.find() is None


@pytest.mark.slow
def test_the_model_without_its_head_is_gone_before_the_one_with_it_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first experiment's trait is given, and known from the beginning; the other's is to be found.
    here = prepare(world, tmp_path, strengths=[1.0], random_controls=0, modes=["add"])
    load, load_whole = prompt_features.load_model, steering.load_language_model
    without_head: list[Any] = []
    n_loaded = []

    def loaded(*arguments: Any) -> Any:
        model = load(*arguments)
        without_head.append(weakref.ref(model.module))
        return model

    def whole(*arguments: Any) -> Any:
        n_loaded.append(len(without_head))
        assert all(model() is None for model in without_head)
        return load_whole(*arguments)

    monkeypatch.setattr(prompt_features, "load_model", loaded)
    monkeypatch.setattr(steering, "load_language_model", whole)
    here.make()
    assert n_loaded == [1]


@pytest.mark.slow
def test_what_rows_depend_on_makes_them_anew_and_nothing_else_does(world: World, tmp_path: Path) -> None:
    steer = [dict(STEER[0])]
    small = {"strengths": [1.0], "random_controls": 0, "modes": ["add"]}
    made = prepare(world, tmp_path, steer=steer, **small).make()

    def found(steer: Sequence[dict[str, Any]] = steer, **changed: Any) -> Any:
        return prepare(world, tmp_path, steer=steer, **(small | changed)).find()

    assert found() == found(resamples=200) == made
    # Other experiments' rows are their own: an entry more lacks that one alone.
    for changed in (
        {"strengths": [2.0]},
        {"random_controls": 1},
        {"modes": ["clamp"]},
        {"places": ["all positions"]},
        {"max_new_tokens": 4},
        {"seed": 1},
        {"batch_size": 3},
    ):
        assert found(**changed) is None, changed
    for changed in ({"target": " Tokyo"}, {"prompt": "mountain of the"}, {"name": "other"}):
        assert found([{**steer[0], **changed}]) is None, changed
    lines = [dict(trait) for trait in TRAITS]
    lines[1]["values"] = [2.0, 4.0]
    assert prepare(world, tmp_path, steer=steer, trait=lines, **small).find() is None
    assert found() == made


def with_saes(here: Here, saes: dict[int, Path]) -> Here:
    """The same with other dictionaries, or with one more."""
    entries = {entry.layer: entry.model_dump() for entry in here.run.config.sae}
    entries |= {layer: {"layer": layer, "path": str(path)} for layer, path in saes.items()}
    config = Config.model_validate(here.run.config.model_dump() | {"sae": [*entries.values()]})
    return here_of(config, here.run.result(TOKENIZE))


@pytest.mark.slow
def test_another_dictionary_makes_its_layer_alone_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The trait that is looked for is steered at layer 1, as the one beside it is given there.
    steer = [*STEER, {"traits": ["planted"], "prompt": PROMPT, "target": " London"}]
    here = prepare(world, tmp_path, steer=steer, strengths=[1.0], random_controls=1, modes=["add"])
    tiny.build_sae("jumprelu", seed=8).save_model(str(tmp_path / "other"))
    first = here.make()
    assert [table[0]["layer"] for table in here.tables()] == [1, 1, 2]
    found, given, planted = (trait.layers for trait in first.traits)
    swept: list[str] = []
    run = steering.sweep

    def counting(*arguments: Any) -> Any:
        swept.append(arguments[2].prompt)
        return run(*arguments)

    monkeypatch.setattr(steering, "sweep", counting)
    more = with_saes(here, {0: tmp_path / "other"})
    again = more.make()
    assert again.experiments == first.experiments
    assert swept == []
    pairs = list(zip(again.traits, (found, given, planted), strict=True))
    assert [trait.layers[-len(old) :] for trait, old in pairs] == [found, given, planted]
    assert [len(trait.layers) for trait in again.traits] == [3, 1, 1]
    other = with_saes(here, {2: tmp_path / "other"})
    before = here.storage.sizes("traits").keys()
    again = other.make()
    same = [one == two for one, two in zip(first.experiments, again.experiments, strict=True)]
    assert same == [True, True, False]
    assert swept == [PROMPT]
    pairs = list(zip(again.traits, (found, given, planted), strict=True))
    assert [trait.layers == old for trait, old in pairs] == [False, True, False]
    assert again.traits[0].layers[0] == found[0]
    new = {name.rsplit("/", 1)[0] for name in here.storage.sizes("traits").keys() - before}
    assert new == {again.traits[0].layers[1].folder, again.traits[2].layers[0].folder}


@pytest.mark.slow
def test_an_experiment_is_what_it_moves(world: World, tmp_path: Path) -> None:
    small = {"strengths": [1.0], "random_controls": 0, "modes": ["add"]}
    prepare(world, tmp_path, **small).make()
    # How many features are steered together is no matter where they are given.
    fewer = prepare(world, tmp_path, features=2, **small)
    assert fewer.planned() == (5, [f"[[steer]] 'both', '{STEER[1]['prompt']}'"])


@pytest.mark.slow
def test_experiments_are_judged_by_their_own_traits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"strengths": [1.0], "random_controls": 0, "modes": ["add"]}
    here = prepare(world, tmp_path, **small)
    made = here.make()
    monkeypatch.setattr(prompt_features, "load_model", no_model)
    for module in (steering, prompt_features):
        monkeypatch.setattr(module, "load_dictionary", no_model)

    # The trait that is found has two layers, those that are given one each.
    assert here.planned() == (6, [])
    unused = {**TRAITS[0], "name": "unused", "negative": [f"{p} the" for p in TRAITS[0]["negative"]]}
    new = prepare(world, tmp_path, trait=[unused, *TRAITS], **small)
    assert new.planned() == (6, ["[[trait]] 'unused'"])
    both, given = f"[[steer]] 'both', '{STEER[1]['prompt']}'", f"[[steer]] 'given', '{PROMPT}'"
    changed = {**TRAITS[0], "negative": unused["negative"]}
    assert prepare(world, tmp_path, trait=[changed, *TRAITS[1:]], **small).planned() == (
        3,
        ["[[trait]] 'found'", both],
    )
    # A trait whose features are given is known, found or not.
    here.storage.delete(made.traits[1].layers[0].folder)
    assert prepare(world, tmp_path, **small).planned() == (5, ["[[trait]] 'given'"])
    here.storage.delete(made.experiments[0].folder)
    assert here.planned() == (4, ["[[trait]] 'given'", given])


def no_model(*_: Any, **__: Any) -> Any:
    raise AssertionError("weights are read")


def test_cases_without_experiments_have_traits_alone(world: World, tmp_path: Path) -> None:
    here = prepare(world, tmp_path, steer=[])
    text = '[[case]]\nname = "a"\nrelation = "b"\nprompts = ["the river in the", "the river to the"]\n'
    path = tmp_path / "cases.toml"
    path.write_text(text + path.read_text())
    made = here.make()
    assert [trait.trait for trait in made.traits] == [trait["name"] for trait in TRAITS]
    assert made.experiments == ()
    assert here.find() == made


# What is refused


def test_what_goes_wrong_while_generating_names_the_conditions_of_the_batch(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepare(
        world, tmp_path, steer=STEER[:1], strengths=[2.0], random_controls=0, modes=["add"], batch_size=2
    )
    whole = LanguageModel.generate_rows

    def failing(self: LanguageModel, *arguments: Any) -> Any:
        # Once for the unsteered model, once for the first batch.
        calls.append(1)
        if len(calls) == 3:
            raise ModelError("the logits of tiny are not finite", hint="a way out")
        return whole(self, *arguments)

    calls: list[int] = []
    monkeypatch.setattr(LanguageModel, "generate_rows", failing)
    place = r"\(add, all positions\)"
    expected = (
        rf"'given', '.*': layer 1, while generating with strength 0 {place}; strength 2 {place}: .*a way out"
    )
    with pytest.raises(ModelError, match=expected):
        here.make()
    assert here.find() is None


@pytest.mark.slow
def test_what_cannot_be_steered_is_an_error_that_names_it(world: World, tmp_path: Path) -> None:
    def refused(kind: type[FunctokError], pattern: str, **changed: Any) -> None:
        here = prepare(world, tmp_path, **changed)
        with pytest.raises(kind, match=pattern) as caught:
            here.make()
        assert caught.value.stage == "steering"
        assert caught.value.hint

    given = STEER[:1]
    refused(
        DictionaryError,
        r"\[\[steer\]\] 'given', 'river.*': strength 1 \(clamp, last function token\): layer 1: feature 3 .*threshold",
        steer=given,
        trait=[{**TRAITS[1], "values": [0.01, 3.0]}],
    )
    with pytest.raises(ValidationError, match="at strength -1 a clamped feature"):
        prepare(world, tmp_path, steer=given, strengths=[-1.0])
    refused(
        ModelError,
        r"\[\[steer\]\] 'given', 'river.*': layer 1, strength 1e\+39 \(add, last function token\).*not finite",
        steer=given,
        strengths=[1e39],
        modes=["add"],
    )
    refused(
        ConfigError,
        r"feature 96 is not in the dictionary of layer 1",
        steer=given,
        trait=[{**TRAITS[1], "features": [3, 96]}],
    )
    refused(
        ConfigError,
        r"layer 0 has no dictionary",
        steer=given,
        trait=[{**TRAITS[1], "layer": 0}],
    )
    refused(
        ConfigError,
        r"\[\[steer\]\] 'given'.*(no function token|function token)",
        steer=[{**STEER[0], "prompt": "🙂"}],
    )
    refused(
        ConfigError,
        r"\[\[steer\]\] 'given', '.*': the 202 tokens of the prompt .*\(128\)",
        steer=[{**STEER[0], "prompt": "the of " * 100}],
    )
    refused(
        ConfigError,
        r"dictionary's 96 latents",
        steer=given,
        trait=[{**TRAITS[1], "features": list(range(49)), "values": [1.0] * 49}],
        modes=["add"],
    )


def test_a_dictionary_that_cannot_be_clamped_stops_before_traits_are_looked_for(
    world: World, tmp_path: Path
) -> None:
    here = prepare(world, tmp_path)
    folder = here.run.result(DICTIONARIES)[0].folder
    name = f"{folder}/cfg.json"
    saved = json.loads(here.storage.read_bytes(name))
    here.storage.write_bytes(name, json.dumps(saved | {"architecture": "topk", "k": 4}).encode())
    commit_again(here.storage, folder)
    with pytest.raises(
        ConfigError, match=r"^\[steering\] \[\[steer\]\] 'given', .* layer 1 cannot be clamped"
    ):
        here.make()
    assert not here.storage.sizes("traits")


MANY = {**TRAITS[1], "features": list(range(49)), "values": [1.0] * 49}


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"steer": [STEER[0], {**STEER[1], "prompt": "🙂"}]}, r"'both', '🙂'.* no function token"),
        ({"trait": [TRAITS[0], MANY], "steer": STEER[:1]}, r"'given', .*dictionary's 96 latents"),
        # Together with one that is still to be found it can only be more.
        ({"trait": [TRAITS[0], MANY], "steer": STEER[1:]}, r"'both', .*dictionary's 96 latents"),
    ],
)
def test_what_no_weights_are_needed_for_is_refused_before_any_and_by_status(
    world: World,
    tmp_path: Path,
    changed: dict[str, Any],
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("load_model", "load_dictionary"):
        monkeypatch.setattr(prompt_features, name, no_model)
    here = prepare(world, tmp_path, modes=["add"], **changed)
    for ask in (here.make, here.planned):
        with pytest.raises(ConfigError, match=rf"^\[steering\] \[\[steer\]\] {pattern}") as caught:
            ask()
        assert caught.value.hint
    assert not here.storage.sizes("traits")
    if changed["steer"] == STEER[:1]:
        assert prepare(world, tmp_path, modes=["add"], random_controls=0, **changed).find() is None


def test_given_values_below_a_threshold_are_refused_before_a_model_is_loaded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "load_language_model", no_model)
    low = {**TRAITS[1], "values": [0.01, 3.0]}
    expected = r"strength 1 \(clamp, last function token\): layer 1: feature 3 .*threshold"
    # With a trait that is to be found, what is moved is known when it is found.
    both = prepare(world, tmp_path, trait=[TRAITS[0], low], steer=STEER[1:])
    with pytest.raises(DictionaryError, match=rf"^\[steering\] \[\[steer\]\] 'both', .*{expected}"):
        both.make()
    for name in ("load_model", "load_dictionary"):
        monkeypatch.setattr(prompt_features, name, no_model)
    both.storage.delete("traits")
    alone = prepare(world, tmp_path, trait=[TRAITS[0], low], steer=[STEER[0], STEER[1]])
    with pytest.raises(DictionaryError, match=rf"^\[steering\] \[\[steer\]\] 'given', .*{expected}"):
        alone.make()
    assert not alone.storage.sizes("traits")
