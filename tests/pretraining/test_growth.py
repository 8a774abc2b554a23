"""The SAE series: which checkpoints, what an SAE has learned against plain code, and what is made again."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import reference
import torch
from builders import run_of
from tiny import D_MODEL, N_LAYERS, build_sae, save_model, texts, write_jsonl

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, DictionaryError
from schemas.pretraining.section import consolidation_of
from schemas.pretraining.work import Checkpoint, GrownSae
from schemas.sections import Model, Sae
from schemas.work import CorpusShards, Dictionary
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.heldout import heldout_documents
from tasks.corpus.tokenization import TOKENIZE
from tasks.corpus.windows import read_heldout_tokens
from tasks.dictionaries import training as dictionary_training
from tasks.dictionaries.dictionaries import DICTIONARIES, load_dictionary
from tasks.dictionaries.residuals import Residuals
from tasks.dictionaries.sample import ResidualSample, left_out_documents
from tasks.engine.run import Run, make
from tasks.graph import features
from tasks.graph.features import FEATURES
from tasks.models.model import model_key
from tasks.pretraining import growth, judgement
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.growth import GROWTH, growth_of, judging_parts
from tasks.pretraining.judgement import Judging, learned_row

TRAIN: dict[str, Any] = {
    "d_sae": 16,
    "k": 2,
    "samples": 1280,
    "batch_size": 64,
    "max_tokens": 1500,
    "learning_rate": 0.02,
    "gate": {"min_explained_variance": -10, "max_l0_deviation": 10, "min_alive_share": 0},
}
SHARE = 0.3
CONTEXT = 24


@dataclass(frozen=True)
class Place:
    config: Config
    storage: Storage
    shards: CorpusShards
    checkpoints: list[Checkpoint]
    documents: list[str]

    def run(self, **changes: Any) -> Run:
        """A new look at the run, its SAE series changed."""
        given = {TOKENIZE: self.shards, CHECKPOINTS: self.checkpoints}
        return run_of(with_growth(self.config, **changes), self.storage, given)

    def own_run(self, checkpoint: Checkpoint, **sections: Any) -> Run:
        """The spine on a checkpoint."""
        config = self.config.model_copy(update={"model": checkpoint.model, **sections})
        return run_of(config, self.storage, {TOKENIZE: self.shards})

    def missing(self) -> tuple[int, list[str]]:
        """How many SAEs are done, and a line for each that is not."""
        found = self.run().find(GROWTH)
        return len(found.units) - len(found.missing), list(GROWTH.lines(found.missing))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"step-{seed}", seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [
        *texts(36, longest=60),
        *(f"the <eos> river {text} <bos> x" for text in texts(6, seed=4, longest=40)),
    ]


def place(
    models: list[Path], documents: list[str], root: Path, share: float = SHARE, **changes: Any
) -> Place:
    train = {**TRAIN, **changes.pop("train", {})}
    config = Config.model_validate(
        {
            "corpus": {"urls": [str(write_jsonl(root / "corpus.jsonl", documents))], "shard_tokens": 1000},
            "model": {"tokenizer": str(models[0])},
            "windows": {"context_size": CONTEXT, "prepend_bos": changes.pop("prepend_bos", True)},
            "activations": {"batch_tokens": 256},
            "consolidation": {
                "series": [{"name": "a", "folder": "nowhere"}],
                "heldout_share": share,
                "growth": {"layer": 1, "train": train, "min_density": 0.02, "max_density": 0.2, **changes},
            },
            "storage": {"root": str(root / "run")},
        }
    )
    storage = Storage(config.storage.root)
    shards = plain.finished(config, storage, TOKENIZE).result(TOKENIZE)
    checkpoints = [checkpoint_of(folder, step, storage) for step, folder in enumerate(models, start=1)]
    return Place(config, storage, shards, checkpoints, documents)


def checkpoint_of(folder: Path, step: int, storage: Storage, series: str = "a") -> Checkpoint:
    model = Model(name=str(folder), tokenizer=str(folder), threads=1)
    return Checkpoint(series=series, step=step, model=model, key=model_key(model, storage))


def with_growth(config: Config, **changes: Any) -> Config:
    section = consolidation_of(config)
    changed = growth_of(config).model_copy(update=changes)
    return config.model_copy(update={"consolidation": section.model_copy(update={"growth": changed})})


def grow(here: Place, progress: Progress = silent, **changes: Any) -> list[GrownSae]:
    return make(here.run(**changes), GROWTH, progress)


@pytest.fixture(scope="module")
def grown(
    models: list[Path], documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, list[GrownSae]]:
    here = place(models[:2], documents, tmp_path_factory.mktemp("grown"))
    return here, grow(here)


# Which checkpoints


def some(series: str, steps: range) -> list[Checkpoint]:
    return [Checkpoint(series=series, step=step, model=Model(), key="k") for step in steps]


@pytest.mark.parametrize(
    ("n", "wanted", "expected"),
    [
        (8, 3, [0, 4, 7]),
        (5, 3, [0, 2, 4]),
        (8, 1, [7]),
        (8, 2, [0, 7]),
        (2, 3, [0, 1]),
        (1, 1, [0]),
        (1, 4, [0]),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 3, 4]),
    ],
)
def test_checkpoints_are_spread_evenly_and_the_last_is_among_them(
    grown: tuple[Place, list[GrownSae]], n: int, wanted: int, expected: list[int]
) -> None:
    config = with_growth(grown[0].config, checkpoints=wanted)
    found = growth.selected(config, some("a", range(10, 10 * n + 1, 10)))
    assert [checkpoint.step for checkpoint in found] == [10 * index + 10 for index in expected]


def test_every_series_has_its_own_selection(grown: tuple[Place, list[GrownSae]]) -> None:
    both = [*some("b", range(5)), *some("a", range(3))]
    found = growth.selected(with_growth(grown[0].config, checkpoints=2), both)
    assert [(one.series, one.step) for one in found] == [("b", 0), ("b", 4), ("a", 0), ("a", 2)]
    exactly = growth.selected(with_growth(grown[0].config, steps=[2, 0, 2]), both)
    assert [(one.series, one.step) for one in exactly] == [("b", 0), ("b", 2), ("a", 0), ("a", 2)]


def test_a_step_that_a_series_lacks_is_refused(grown: tuple[Place, list[GrownSae]]) -> None:
    both = [*some("b", range(5)), *some("a", range(3))]
    with pytest.raises(
        ConfigError, match=r"series a has no checkpoint at step 3; it has them at 0, 1, 2 .*growth"
    ):
        growth.selected(with_growth(grown[0].config, steps=[2, 3]), both)


# What an SAE has learned


def plain_heldout(folder: Path, documents: list[str], share: float) -> tuple[list[list[int]], set[int]]:
    """Ids of the held-out documents, and the special ids."""
    ids, special = reference.tokenize(folder, documents)
    return [document for document in ids if content_number(document) < share * 2**64], special


def content_number(ids: list[int]) -> int:
    digest = hashlib.blake2b(np.array(ids, dtype="<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def plain_judgement(
    folder: Path, sae: Any, layer: int, documents: list[list[int]], special: set[int], prepend_bos: bool
) -> dict[str, Any]:
    """One window at a time, token by token, three forwards of the whole model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bos = AutoTokenizer.from_pretrained(folder).bos_token_id
    counts, losses = Counter[int](), {"clean": [], "sae": [], "zero": []}
    rows, errors = [], []
    how, keep = "clean", [False]

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for position, is_kept in enumerate(keep):
            if not is_kept:
                continue
            x = hidden[0, position].clone()
            activated = sae.encode(x[None])[0]
            if how == "clean":
                counts.update(activated.nonzero().flatten().tolist())
                rows.append(x.double())
                errors.append(float((sae.decode(activated[None])[0] - x).double().square().sum()))
            elif how == "sae":
                hidden[0, position] = sae.decode(activated[None])[0]
            else:
                hidden[0, position] = 0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.model.layers[layer].register_forward_hook(hook)
    step = CONTEXT - int(prepend_bos)
    with torch.no_grad():
        for document in documents:
            for start in range(0, len(document), step):
                window = document[start : start + step]
                fed = [bos, *window] if prepend_bos else window
                keep = [False] * int(prepend_bos) + [token not in special for token in window]
                for how in losses:
                    logits = model(torch.tensor([fed])).logits[0].double().log_softmax(-1)
                    for now in range(len(fed) - 1):
                        if keep[now] and keep[now + 1]:
                            losses[how].append(-float(logits[now, fed[now + 1]]))
    x = torch.stack(rows)
    ce = {name: sum(values) / len(values) for name, values in losses.items()}
    return {
        "counts": counts,
        "heldout_tokens": len(rows),
        "l0": counts.total() / len(rows),
        "explained_variance": 1 - sum(errors) / float((x - x.mean(0)).square().sum()),
        "ce": ce["clean"],
        "ce_sae": ce["sae"],
        "ce_zero": ce["zero"],
        "ce_recovered": (ce["zero"] - ce["sae"]) / gap if (gap := ce["zero"] - ce["clean"]) > 1e-3 else None,
    }


def learned(here: Place, one: GrownSae) -> dict[str, Any]:
    [row] = here.storage.read_parquet(f"{one.folder}/learned.parquet").to_pylist()
    return row


def check_against_plain_code(here: Place, one: GrownSae, prepend_bos: bool) -> None:
    folder = Path(one.checkpoint.model.name)
    heldout, special = plain_heldout(folder, here.documents, SHARE)
    sae = load_dictionary(here.storage, one.dictionary)
    expected = plain_judgement(folder, sae, 1, heldout, special, prepend_bos)
    counts = expected.pop("counts")
    row = learned(here, one)
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    density = {feature: n / expected["heldout_tokens"] for feature, n in counts.items()}
    assert row["alive_features"] == len(density)
    assert row["dense_features"] == sum(share > 0.2 for share in density.values())
    assert row["learned_features"] == sum(0.02 <= share <= 0.2 for share in density.values())
    assert (row["layer"], row["dictionary_size"]) == (1, 16)
    assert 0 < row["learned_features"] < row["alive_features"]


@pytest.mark.slow
def test_what_is_learned_agrees_with_plain_code(grown: tuple[Place, list[GrownSae]]) -> None:
    here, made = grown
    assert any("<eos>" in text for text in here.documents)
    for one in made:
        check_against_plain_code(here, one, prepend_bos=True)
    rows = [learned(here, one) for one in made]
    assert len({row["ce"] for row in rows}) == 2
    assert any(row["ce_recovered"] is not None for row in rows)


@pytest.mark.slow
def test_it_agrees_without_bos(models: list[Path], documents: list[str], tmp_path: Path) -> None:
    here = place(models[:1], documents, tmp_path, prepend_bos=False)
    check_against_plain_code(here, grow(here)[0], prepend_bos=False)


def plant(folder: Path, log_odds: torch.Tensor) -> None:
    """A model without attention or MLP: a token's residual is 3 e(token mod d_model) after every block.

    Args:
        folder: A saved model, changed in place.
        log_odds: (vocabulary, d_model) logits of the next token, by token mod d_model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.copy_(3 * torch.eye(D_MODEL)[torch.arange(len(embedding)) % D_MODEL])
        # The final norm makes it sqrt(d_model) long.
        model.lm_head.weight.copy_(log_odds / D_MODEL**0.5)
    model.save_pretrained(folder)


def plant_sae(storage: Storage) -> Dictionary:
    """A dictionary whose feature f is active where coordinate f is above 1; it reconstructs exactly."""
    sae = build_sae(d_sae=D_MODEL)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(
                torch.eye(D_MODEL)
                if parameter.ndim == 2
                else torch.full_like(parameter, float(name == "threshold"))
            )
    sae.save_model(str(Path(storage.root) / "dictionaries" / "planted"))
    return Dictionary(layer=1, folder="dictionaries/planted", key="planted", d_sae=D_MODEL, source="test")


@pytest.mark.slow
def test_a_planted_dictionary_counts_as_by_hand(documents: list[str], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=5)
    n_vocabulary = vocabulary_size(folder)
    heldout, special = plain_heldout(folder, documents, SHARE)
    pairs = [
        pair
        for document in heldout
        for start in range(0, len(document), CONTEXT - 1)
        for pair in itertools.pairwise(document[start : start + CONTEXT - 1])
        if not special & set(pair)
    ]
    follows = torch.ones(n_vocabulary, D_MODEL, dtype=torch.float64)
    for now, following in pairs:
        follows[following, now % D_MODEL] += 1
    log_share = (follows / follows.sum(0)).log()
    plant(folder, log_share.float())
    here = place([folder], documents, tmp_path)
    row = judged_by_planted_sae(here)
    tokens = [token for document in heldout for token in document if token not in special]
    counts = Counter(token % D_MODEL for token in tokens)
    assert row["heldout_tokens"] == len(tokens)
    assert row["alive_features"] == len(counts)
    assert row["learned_features"] == sum(0.02 <= n / len(tokens) <= 0.2 for n in counts.values()) > 0
    assert row["dense_features"] == sum(n / len(tokens) > 0.2 for n in counts.values())
    assert row["l0"] == 1
    assert row["explained_variance"] == pytest.approx(1)
    expected = -sum(float(log_share[following, now % D_MODEL]) for now, following in pairs) / len(pairs)
    assert row["ce"] == pytest.approx(expected, abs=1e-5)
    assert row["ce_sae"] == pytest.approx(row["ce"], abs=1e-6)
    assert row["ce_zero"] == pytest.approx(math.log(n_vocabulary), abs=1e-6)
    assert row["ce_recovered"] == pytest.approx(1, abs=1e-5)


def judged_by_planted_sae(here: Place) -> dict[str, Any]:
    parts = judging_parts(here.config, here.storage, here.shards)
    dictionary = plant_sae(here.storage)
    judged = make(here.run(), Judging(here.checkpoints[0], dictionary, parts))
    return learned_row(growth_of(here.config), dictionary, judged)


def vocabulary_size(folder: Path) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.slow
def test_a_model_with_nothing_to_recover_has_no_share_of_it(documents: list[str], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", seed=5)
    plant(folder, torch.zeros(vocabulary_size(folder), D_MODEL))
    row = judged_by_planted_sae(place([folder], documents, tmp_path))
    assert row["ce"] == row["ce_zero"] == pytest.approx(math.log(vocabulary_size(folder)), abs=1e-6)
    assert row["ce_recovered"] is None


# Incremental


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What costs something, in order: a training, a forward of the graph, a judgement."""
    done: list[str] = []
    for module, name, what in (
        (dictionary_training, "train_dictionary", "train"),
        (features, "compute_features", "features"),
        (judgement, "judge", "judge"),
    ):
        real = getattr(module, name)

        def watched(*arguments: Any, real: Any = real, what: str = what, **options: Any) -> Any:
            done.append(what)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, watched)
    return done


def test_a_second_run_does_nothing(grown: tuple[Place, list[GrownSae]], work: list[str]) -> None:
    here, made = grown
    assert grow(here) == made
    assert here.missing() == (2, [])
    assert here.run().result(GROWTH) == made
    assert work == []
    assert [one.checkpoint.step for one in made] == [1, 2]
    for one in made:
        own = here.own_run(one.checkpoint, sae=[Sae(layer=1, train=growth_of(here.config).train)])
        assert own.result(DICTIONARIES) == [one.dictionary]
        assert own.result(FEATURES) == list(one.features)
        assert sum(shard.part.n_tokens for shard in one.features) == here.shards.n_tokens


def test_other_bounds_need_no_forward(grown: tuple[Place, list[GrownSae]], work: list[str]) -> None:
    here, made = grown
    assert not here.run(min_density=0.0, max_density=1.0).is_finished(GROWTH)
    again = grow(here, min_density=0.0, max_density=1.0)
    assert work == []
    for before, after in zip(made, again, strict=True):
        old, new = learned(here, before), learned(here, after)
        assert before.folder != after.folder
        # A feature that is never active is not learned, however low the bound.
        assert new["learned_features"] == new["alive_features"] == old["alive_features"]
        assert (new["dense_features"], new["max_density"]) == (0, 1)
        assert new["ce_recovered"] == old["ce_recovered"]


@pytest.mark.slow
def test_a_new_checkpoint_trains_its_own_sae_alone_where_they_start_fresh(
    models: list[Path], documents: list[str], tmp_path: Path, work: list[str]
) -> None:
    here = place(models, documents, tmp_path)
    outer = replace(here, checkpoints=[here.checkpoints[0], here.checkpoints[2]])
    first = grow(outer)
    work.clear()
    assert here.missing() == (2, ["SAE of a at step 2"])
    made = grow(here)
    assert [made[0], made[2]] == first
    assert (work.count("train"), work.count("judge")) == (1, 1)
    assert work.count("features") == len(here.shards.shards)


@pytest.mark.slow
def test_a_new_checkpoint_trains_those_after_it_again_where_each_starts_from_the_one_before(
    models: list[Path], documents: list[str], tmp_path: Path, work: list[str]
) -> None:
    here = place(models, documents, tmp_path, start="previous")
    outer = replace(here, checkpoints=[here.checkpoints[0], here.checkpoints[2]])
    first = grow(outer)
    assert outer.run().result(GROWTH) == first
    assert grow(outer) == first
    work.clear()
    assert here.missing() == (1, ["SAE of a at step 2", "SAE of a at step 3"])
    made = grow(here)
    assert made[0] == first[0]
    assert made[2].dictionary.key != first[1].dictionary.key
    assert (work.count("train"), work.count("judge")) == (2, 2)


@pytest.mark.slow
def test_the_first_of_every_series_starts_fresh(
    models: list[Path], documents: list[str], tmp_path: Path
) -> None:
    here = place(models[:2], documents, tmp_path, start="previous")
    twice = [*here.checkpoints, *(replace(one, series="b") for one in here.checkpoints)]
    run = replace(here, checkpoints=twice).run()
    made = make(run, GROWTH)
    before = here.storage.url(made[0].dictionary.folder)
    starts = []
    for unit in run.find(GROWTH).units:
        assert unit.own is not None
        [entry] = unit.own.config.sae
        assert entry.train is not None
        starts.append(entry.train.start_from)
    assert starts == [None, before, None, before]
    assert [one.dictionary for one in made[:2]] == [one.dictionary for one in made[2:]]


# Errors and progress


def test_a_layer_that_a_series_does_not_have_is_refused_first(
    grown: tuple[Place, list[GrownSae]], work: list[str]
) -> None:
    here, _ = grown
    deep = [*here.checkpoints, replace(here.checkpoints[0], series="deep", layer=N_LAYERS)]
    with pytest.raises(DictionaryError, match=rf"checkpoint deep, step 1: .*{N_LAYERS} decoder blocks"):
        grow(replace(here, checkpoints=deep))
    assert work == []
    # `status` says the same.
    with pytest.raises(DictionaryError, match=rf"checkpoint deep, step 1: .*{N_LAYERS} decoder blocks"):
        replace(here, checkpoints=deep).missing()


@pytest.mark.slow
def test_a_series_may_have_its_own_layer(models: list[Path], documents: list[str], tmp_path: Path) -> None:
    here = place(models[:1], documents, tmp_path)
    [one] = grow(replace(here, checkpoints=[replace(here.checkpoints[0], layer=0)]))
    assert one.dictionary.layer == learned(here, one)["layer"] == 0
    assert {shard.layer for shard in one.features} == {0}


def test_an_sae_that_falls_short_is_named_by_checkpoint(
    models: list[Path], documents: list[str], tmp_path: Path
) -> None:
    here = place(models[:1], documents, tmp_path, train={"gate": {"min_explained_variance": 1.0}})
    with pytest.raises(DictionaryError, match=r"^\[growth\] checkpoint a, step 1: .*did not pass its gate"):
        grow(here)


@pytest.mark.slow
def test_progress_says_which_checkpoint(models: list[Path], documents: list[str], tmp_path: Path) -> None:
    here = place(models[:2], documents, tmp_path)
    seen: list[tuple[int, int, str]] = []
    grow(here, lambda *told: seen.append(told))
    said = [what for what, _ in itertools.groupby(what for _, _, what in seen)]
    steps = [
        "tokens, residuals",
        "samples, dictionary of layer 1",
        "tokens, features",
        "tokens, held-out text",
    ]
    assert said == [f"SAE of a at step {step} ({step} of 2): {what}" for step in (1, 2) for what in steps]
    assert all(0 <= done <= total for done, total, _ in seen)


# What judges an SAE is not what it was trained on


def judging_documents(here: Place) -> list[int]:
    parts = judging_parts(here.config, here.storage, here.shards)
    return [part.shard.doc_offset + number for part in parts for number in part.documents]


def test_heldout_documents_judge_and_are_never_trained_on(grown: tuple[Place, list[GrownSae]]) -> None:
    here, _ = grown
    own = here.own_run(here.checkpoints[0])
    parts_of_graph = graph_shards(own.config, here.shards, here.storage)
    residuals = list(make(own, Residuals(parts_of_graph, [1])).values())
    train = growth_of(here.config).train.model_copy(update={"max_tokens": 10**6})
    left_out = left_out_documents(own.config, here.storage, residuals)
    sample = ResidualSample(here.storage, residuals, train, left_out)
    unlimited = ResidualSample(here.storage, residuals, train)
    parts = judging_parts(here.config, here.storage, here.shards)
    judged = sum(part.n_tokens for part in parts)
    assert sample.n_rows(heldout=True) + sample.n_rows(heldout=False) == here.shards.n_tokens - judged
    assert unlimited.n_rows(heldout=True) + unlimited.n_rows(heldout=False) == here.shards.n_tokens
    marks = [heldout_documents(here.config, here.storage, shard) for shard in here.shards.shards]
    assert judging_documents(here) == np.flatnonzero(np.concatenate(marks)).tolist()
    rows = {
        row.numpy().tobytes()
        for heldout in (True, False)
        for x in sample.pieces(heldout=heldout)
        for row in x
    }
    everything = [
        row.numpy().tobytes()
        for heldout in (True, False)
        for x in unlimited.pieces(heldout=heldout)
        for row in x
    ]
    assert sum(row not in rows for row in everything) > 0.9 * judged


@pytest.mark.slow
def test_where_all_documents_are_held_out_those_that_were_not_trained_on_judge(
    models: list[Path], tmp_path: Path
) -> None:
    first = texts(20, longest=60)
    here = place(
        models[:1], [*first, *texts(5, seed=9), *first[:3]], tmp_path, share=1.0, train={"max_tokens": 300}
    )
    ids, _ = reference.tokenize(models[0], here.documents)
    within = sum(total <= 300 for total in itertools.accumulate(map(len, ids)))
    assert 3 <= within < 20
    # Copies of what was trained on do not judge either.
    assert judging_documents(here) == list(range(within, 25))
    tokens = [
        read_heldout_tokens(here.storage, part)
        for part in judging_parts(here.config, here.storage, here.shards)
    ]
    assert sum(len(part.rows) for part in tokens) == sum(map(len, ids[within:25]))
    [one] = grow(here)
    assert learned(here, one)["heldout_tokens"] == sum(map(len, ids[within:25]))


def test_it_is_an_error_if_nothing_is_left_to_judge(models: list[Path], tmp_path: Path) -> None:
    here = place(models[:1], texts(8), tmp_path, share=1.0, train={"max_tokens": 10**6})
    with pytest.raises(
        CorpusError, match=r"trained on all 8 documents.*lower consolidation\.growth\.train\.max_tokens or"
    ):
        grow(here)


def test_max_tokens_limits_what_judges(grown: tuple[Place, list[GrownSae]]) -> None:
    here, _ = grown
    few = replace(here, config=with_growth(here.config, max_tokens=200))
    assert 0 < len(judging_documents(few)) < len(judging_documents(here))
    parts = judging_parts(few.config, few.storage, few.shards)
    assert sum(part.n_tokens for part in parts) <= 200
