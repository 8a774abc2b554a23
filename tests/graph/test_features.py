"""Feature shards on tiny random models against the slow, obvious way, and what makes them be computed again."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plain
import pytest
import reference
import tiny
import torch
from suite import EACH_ARCHITECTURE

from infra.duck import open_duckdb, view_of_shards
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, ExpectationError, ModelError
from schemas.work import Dictionary, FeatureShard
from tasks.corpus.graph_documents import graph_shards
from tasks.corpus.tokenization import TOKENIZE
from tasks.corpus.windows import read_shard_tokens
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.dictionaries.encoding import Encoder
from tasks.engine.checks import ASKED, check
from tasks.engine.run import Run
from tasks.graph import extraction, features
from tasks.graph.extraction import compute_features
from tasks.graph.features import FEATURES
from tasks.graph.tables import graph_inputs
from tasks.models.model import LoadedModel, load_model, model_key
from tasks.stages import check_before_work, open_run

SAES = {0: "jumprelu", 1: "standard", 2: "topk"}
Activated = dict[tuple[int, int, int, int, int], float]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    for layer, kind in SAES.items():
        tiny.save_sae(folder / f"sae-{layer}", kind, seed=layer)
    tiny.save_sae(folder / "other-sae", "jumprelu", seed=9)
    tiny.write_jsonl(folder / "corpus.jsonl", [*tiny.texts(11, longest=70), "a <eos> b <bos> the river", "x"])
    return folder


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    extraction.forget_loaded()


def config_for(parts: Path, root: Path, architecture: str = "llama", **sections: Any) -> Config:
    values: dict[str, Any] = {
        "corpus": {"urls": [str(parts / "corpus.jsonl")], "shard_tokens": 150},
        "model": {"name": str(parts / architecture)},
        "windows": {"context_size": 32},
        "sae": [{"layer": layer, "path": str(parts / f"sae-{layer}")} for layer in SAES],
        "activations": {"batch_tokens": 256},
        "storage": {"root": str(root)},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return Config.model_validate(values)


def run(config: Config) -> tuple[list[FeatureShard], list[Dictionary], Storage]:
    done: Run = plain.finished(config, None, FEATURES)
    return done.result(FEATURES), done.result(DICTIONARIES), done.storage


def activated(made: list[FeatureShard], storage: Storage) -> Activated:
    return {
        (
            shard.layer,
            row["doc"] + shard.part.shard.doc_offset,
            row["position"],
            row["token_id"],
            row["feature_id"],
        ): row["activation"]
        for shard in made
        for row in storage.read_parquet(f"{shard.folder}/activations.parquet").to_pylist()
    }


def contents(made: list[FeatureShard], storage: Storage) -> list[bytes]:
    files = [
        (f"{shard.folder}/activations.parquet", f"{shard.folder}/edges.parquet", shard.counts_file)
        for shard in made
    ]
    return [storage.read_bytes(name) for names in files for name in names]


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.slow
def test_features_are_what_plain_hooks_and_sae_encode_give(
    parts: Path, tmp_path: Path, architecture: str, prepend_bos: bool
) -> None:
    from sae_lens import SAE

    config = config_for(parts, tmp_path, architecture, windows={"prepend_bos": prepend_bos})
    made, _, storage = run(config)
    documents = [eval_line["text"] for eval_line in _lines(parts / "corpus.jsonl")]
    ids, special = reference.tokenize(parts / architecture, documents)
    saes = {layer: SAE.load_from_disk(str(parts / f"sae-{layer}")) for layer in SAES}
    expected = reference.activations(parts / architecture, saes, ids, special, 32, prepend_bos)
    found = activated(made, storage)
    assert len(expected) > 5_000
    assert len(set(found) ^ set(expected)) <= len(expected) / 10_000
    assert all(
        found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5) for key in set(found) & set(expected)
    )
    for shard in made:
        rows = storage.read_parquet(f"{shard.folder}/activations.parquet").to_pylist()
        keys = [(row["doc"], row["position"], row["feature_id"]) for row in rows]
        assert keys == sorted(keys)
        assert len(rows) == shard.n_activations
        stats = storage.read_json(f"{shard.folder}/manifest.json")["stats"]
        assert stats["encoded_by"] == Encoder(saes[shard.layer], torch.device("cpu")).way != "sae.encode"
        edges = {
            (r["token_id"], r["feature_id"]): r["n"]
            for r in storage.read_parquet(f"{shard.folder}/edges.parquet").to_pylist()
        }
        pairs = [(row["token_id"], row["feature_id"]) for row in rows]
        assert edges == {pair: pairs.count(pair) for pair in list(edges)[:50]} | {
            pair: n for pair, n in list(edges.items())[50:]
        }
        assert set(edges) == set(pairs)
        assert sum(edges.values()) == len(rows)
        counts = {r["token_id"]: r["count"] for r in storage.read_parquet(shard.counts_file).to_pylist()}
        assert sum(counts.values()) == shard.part.n_tokens


def _lines(path: Path) -> list[dict[str, str]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_residuals_on_disk_give_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    fused = run(config_for(parts, tmp_path / "fused"))
    dense = run(config_for(parts, tmp_path / "dense", activations={"keep_dense": True}))
    assert contents(fused[0], fused[2]) == contents(dense[0], dense[2])
    residuals = [name for name in dense[2].sizes("residuals") if name.endswith(".safetensors")]
    assert len(residuals) == len(dense[0])


@pytest.mark.slow
def test_running_again_gives_the_same_bytes(parts: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    one = run(config_for(parts, tmp_path / "one"))
    extraction.forget_loaded()
    torch.set_num_threads(1)
    try:
        other = run(config_for(parts, tmp_path / "other"))
    finally:
        torch.set_num_threads(threads)
    assert contents(one[0], one[2]) == contents(other[0], other[2])


@pytest.mark.slow
def test_changing_one_layers_dictionary_recomputes_that_layer_alone(parts: Path, tmp_path: Path) -> None:
    made, _, storage = run(config_for(parts, tmp_path))
    times = {
        shard.folder: Path(storage.full(shard.folder), "manifest.json").stat().st_mtime_ns for shard in made
    }
    sae = [{"layer": layer, "path": str(parts / f"sae-{layer}")} for layer in (0, 2)]
    changed = config_for(parts, tmp_path, sae=[*sae, {"layer": 1, "path": str(parts / "other-sae")}])
    there = plain.finished(changed, storage, DICTIONARIES).find(FEATURES)
    assert len(there.done) == len(made) * 2 // 3
    assert [unit.dictionary.layer for unit in there.missing] == [1] * (len(made) // 3)
    told = FEATURES.lines(there.missing)
    assert len(told) == len(made) // 3
    assert all(
        re.fullmatch(r"tokens/.* \([\d,]+ tokens of .*corpus\.jsonl\): layers 1", line) for line in told
    )
    again, _, _ = run(changed)
    kept = [shard for shard in again if shard.layer != 1]
    assert all(
        Path(storage.full(s.folder), "manifest.json").stat().st_mtime_ns == times[s.folder] for s in kept
    )
    assert {shard.folder for shard in again if shard.layer == 1}.isdisjoint(times)


@pytest.mark.parametrize("limit", [{"max_documents": 6}, {"max_tokens": 300}])
@pytest.mark.slow
def test_the_graph_takes_the_first_documents(parts: Path, tmp_path: Path, limit: dict[str, int]) -> None:
    whole = run(config_for(parts, tmp_path / "whole"))
    some = run(config_for(parts, tmp_path / "some", activations=limit))
    n_documents = sum(shard.part.n_documents for shard in some[0] if shard.layer == 0)
    n_tokens = sum(shard.part.n_tokens for shard in some[0] if shard.layer == 0)
    assert n_documents == 6 or 200 < n_tokens <= 300
    everything = activated(whole[0], whole[2])
    found = activated(some[0], some[2])
    expected = {key: value for key, value in everything.items() if key[1] < n_documents}
    # The last shard is batched by its own documents: a value at the threshold may flip.
    assert len(set(found) ^ set(expected)) <= len(expected) / 1000
    assert {key[1] for key in found} == set(range(n_documents))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"windows": {"context_size": 129}}, "more than .* was built for"),
        ({"model": {"device": "cuda:0"}}, "has no CUDA device"),
        ({"model": {"device": "tpu?"}}, "is no device"),
        ({"model": {"name": "nowhere/at-all"}}, "nowhere/at-all"),
    ],
)
def test_what_does_not_fit_is_named(
    parts: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((ModelError, ConfigError), match=message):
        run(config_for(parts, tmp_path, **sections))


def test_what_is_no_device_is_refused_before_any_work(parts: Path, tmp_path: Path) -> None:
    config = config_for(parts, tmp_path / "run", model={"device": "tpu?"})
    with pytest.raises(ModelError, match=r"model\.device = 'tpu\?' is no device"):
        check_before_work(config, Storage(config.storage.root), ["tokenize", "features"])
    # A worker may have what this machine has not.
    config = config_for(parts, tmp_path / "run", model={"device": "cuda:0"})
    check_before_work(config, Storage(config.storage.root), ["tokenize", "features"])
    assert not (tmp_path / "run" / "tokens").exists()


def test_a_tokenizer_without_bos_is_refused_where_bos_is_asked_for(parts: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(parts / "llama", tmp_path / "nobos")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "nobos")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "nobos")
    config = config_for(parts, tmp_path / "run", model={"name": str(tmp_path / "nobos")})
    with pytest.raises(ModelError, match="has no BOS"):
        run(config)


@pytest.mark.slow
def test_a_residual_that_is_not_finite_stops_the_run(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        model = load_model(*arguments)
        with torch.no_grad():
            next(model.blocks[1].parameters()).fill_(float("nan"))
        return model

    monkeypatch.setattr(extraction, "load_model", broken)
    with pytest.raises(ModelError, match="layer 1: the residual stream is not finite"):
        run(config_for(parts, tmp_path))


def test_the_forward_stops_at_the_deepest_layer(parts: Path, tmp_path: Path) -> None:
    config = config_for(parts, tmp_path)
    model = load_model(config.model, Storage(str(tmp_path)))
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward(torch.tensor([[1, 5, 6]]), [0, 1], lambda layer, hidden: None)
    assert ran in ([0], [0, 1])
    assert all(len(block._forward_hooks) == 1 for block in model.blocks)


@pytest.mark.parametrize("keep_dense", [False, True])
@pytest.mark.slow
def test_one_forward_serves_all_layers_that_a_part_lacks(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_dense: bool
) -> None:
    config = config_for(parts, tmp_path, activations={"keep_dense": keep_dense})
    forward, ran = LoadedModel.forward, []

    def noting(self: LoadedModel, input_ids: Any, layers: list[int], receive: Any) -> None:
        ran.append(list(layers))
        forward(self, input_ids, layers, receive)

    monkeypatch.setattr(LoadedModel, "forward", noting)
    told: list[tuple[int, int, str]] = []
    done = plain.finished(config, None, FEATURES, progress=lambda *report: told.append(report))
    made, storage = done.result(FEATURES), done.storage
    n_batches = len(ran)
    assert ran == [[0, 1, 2]] * n_batches
    # A part's tokens are counted once, however many layers it lacks.
    n_tokens = sum(shard.part.n_tokens for shard in made if shard.layer == 0)
    measures = ["tokens, residuals"] * keep_dense + ["tokens, features"]
    assert [report for report in told if report[0] == report[1] and "tokens, " in report[2]] == [
        (n_tokens, n_tokens, measure) for measure in measures
    ]
    ran.clear()
    for shard in made[:2]:
        storage.delete(shard.folder)
    if keep_dense:
        for name in storage.sizes("residuals"):
            storage.delete(name)
    extraction.forget_loaded()
    assert run(config)[0] == made
    assert ran == ([[0, 1, 2]] * n_batches if keep_dense else [[0, 1]] * len(ran))
    assert 0 < len(ran) < n_batches or keep_dense


@pytest.mark.slow
def test_a_killed_stage_keeps_its_finished_shards(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(parts, tmp_path / "killed")
    write, written = features._write_layer, []

    def dying(run: Run, unit: Any, *rest: Any) -> Any:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(unit.folder)
        return write(run, unit, *rest)

    monkeypatch.setattr(features, "_write_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    again = []

    def noting(run: Run, unit: Any, *rest: Any) -> Any:
        again.append(unit.folder)
        return write(run, unit, *rest)

    monkeypatch.setattr(features, "_write_layer", noting)
    made, _, storage = run(config)
    assert set(again).isdisjoint(written)
    fresh = run(config_for(parts, tmp_path / "fresh"))
    assert contents(made, storage) == contents(fresh[0], fresh[2])


@pytest.mark.slow
def test_files_of_equal_content_are_in_the_graph_twice_and_made_once(parts: Path, tmp_path: Path) -> None:
    for name in "ab":
        tiny.write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", tiny.texts(3))
    config = config_for(parts, tmp_path / "run", corpus={"urls": [f"{tmp_path}/corpus/*.jsonl"]})
    made, _, storage = run(config)
    found = activated(made, storage)
    assert {key[1] for key in found} == set(range(6))
    assert len({shard.folder for shard in made}) * 2 == len(made)


@pytest.mark.slow
def test_a_shard_reads_only_its_graph_documents(parts: Path, tmp_path: Path) -> None:
    made, _, storage = run(config_for(parts, tmp_path, activations={"max_documents": 3}))
    tokens = read_shard_tokens(storage, made[0].part)
    assert set(tokens.doc.tolist()) == {0, 1, 2}


def test_a_model_that_changed_since_the_run_was_planned_is_refused(parts: Path, tmp_path: Path) -> None:
    config = config_for(parts, tmp_path)
    ready: Run = plain.finished(config, None, DICTIONARIES)
    storage, dictionaries = ready.storage, ready.result(DICTIONARIES)
    (part, *_) = graph_shards(config, ready.result(TOKENIZE), storage)
    with pytest.raises(ModelError, match=r"model .*llama is not here what it was where the run was planned"):
        compute_features(config, storage, part, dictionaries, "another", {})


@pytest.mark.slow
def test_a_process_that_outlives_a_run_reads_its_model_again_when_that_has_changed(
    parts: Path, tmp_path: Path
) -> None:
    shutil.copytree(parts / "llama", tmp_path / "model")
    config = config_for(parts, tmp_path / "run", model={"name": str(tmp_path / "model")})
    ready: Run = plain.finished(config, None, DICTIONARIES)
    storage, dictionaries = ready.storage, ready.result(DICTIONARIES)
    (part, *_) = graph_shards(config, ready.result(TOKENIZE), storage)

    def values() -> npt.NDArray[np.float32]:
        key = model_key(config.model, storage)
        return compute_features(config, storage, part, dictionaries, key, {})[1][1].value

    before = values()
    tiny.save_model(tmp_path / "model", seed=5)
    changed = values()
    extraction.forget_loaded()
    assert not np.array_equal(before, changed)
    assert np.array_equal(values(), changed)


@pytest.mark.slow
@pytest.mark.parametrize("keep_dense", [False, True])
def test_a_padding_id_beyond_the_embedding_is_no_matter(
    parts: Path, tmp_path: Path, keep_dense: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / "llama")
    tokenizer.add_special_tokens({"pad_token": "<later>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    activations = {"keep_dense": keep_dense}
    model = {"name": str(parts / "llama"), "tokenizer": str(tmp_path / "tokenizer")}
    padded = run(config_for(parts, tmp_path / "padded", model=model, activations=activations))
    plainly = run(config_for(parts, tmp_path / "plain", activations=activations))
    assert contents(padded[0], padded[2]) == contents(plainly[0], plainly[2])


def test_a_token_outside_the_vocabulary_is_refused(parts: Path, tmp_path: Path) -> None:
    model = load_model(config_for(parts, tmp_path).model, Storage(str(tmp_path)))
    with pytest.raises(ModelError, match=r"token id 400 is outside the model's vocabulary \(400 tokens\)"):
        model.forward(torch.tensor([[1, 400]]), [0], lambda _layer, _hidden: None)


@pytest.mark.slow
def test_a_fault_of_the_making_is_found_alike_in_the_rows_and_in_the_files(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = features.sum_edges

    def wrong(*arguments: Any) -> Any:
        edges, scale = add(*arguments)
        return edges.slice(1) if edges.num_rows else edges, scale

    monkeypatch.setattr(features, "sum_edges", wrong)
    config = config_for(parts, tmp_path, sae=[{"layer": 1, "path": str(parts / "sae-1")}])
    made, _, storage = run(config)
    with pytest.raises(ExpectationError, match=r"'edges\.n = activations grouped'") as told:
        check(open_run(config, storage), FEATURES)
    assert f"folder: {made[0].folder}" in str(told.value)
    for shard in made:
        manifest = storage.read_json(f"{shard.folder}/manifest.json")
        assert manifest["stats"].pop(ASKED)
        storage.write_json(f"{shard.folder}/manifest.json", manifest)
    with pytest.raises(ExpectationError) as asked:
        check(open_run(config, storage), FEATURES)
    assert str(asked.value) == str(told.value)


@pytest.mark.slow
def test_an_activation_that_is_no_number_is_refused(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(*arguments: Any) -> Any:
        tokens, found = compute_features(*arguments)
        found[1].value[3] = np.inf
        return tokens, found

    monkeypatch.setattr(features, "compute_features", overflowing)
    config = config_for(parts, tmp_path, sae=[{"layer": 1, "path": str(parts / "sae-1")}])
    with pytest.raises(ExpectationError, match=r"layer 1 has an activation that is inf, of tokens/.*"):
        run(config)


@pytest.mark.slow
def test_a_whole_shards_counts_are_those_of_its_tokens(parts: Path, tmp_path: Path) -> None:
    config = config_for(parts, tmp_path, sae=[{"layer": 1, "path": str(parts / "sae-1")}])
    made, _, storage = run(config)
    parted = config_for(parts, tmp_path, sae=[{"layer": 1, "path": str(parts / "sae-1")}])
    whole = made[-1].part.shard
    assert not any(shard.has_counts for shard in made)
    limit = whole.doc_offset + whole.n_documents - 1
    cut = parted.model_copy(
        update={"activations": parted.activations.model_copy(update={"max_documents": limit})}
    )
    of_cut, _, _ = run(cut)
    assert [shard.has_counts for shard in of_cut] == [
        shard.part.n_documents < shard.part.shard.n_documents for shard in of_cut
    ]
    for shard in (*made, *of_cut):
        counts = storage.read_parquet(shard.counts_file, columns=["token_id", "count"])
        assert sum(counts["count"].to_pylist()) == shard.part.n_tokens
        assert storage.exists(f"{shard.folder}/counts.parquet") == shard.has_counts
    assert {shard.has_counts for shard in of_cut} == {True, False}
    with open_duckdb(storage) as connection:
        files = graph_inputs(of_cut)["shard_graph_counts"]
        view_of_shards(connection, storage, "shard_graph_counts", files)
        counted = connection.execute("SELECT sum(count) FROM shard_graph_counts").fetchone()
    assert counted == (sum(shard.part.n_tokens for shard in of_cut),)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [7, 23])
def test_a_shards_edges_are_its_stored_activations_added_up(parts: Path, tmp_path: Path, bits: int) -> None:
    # With so few bits the stored values are others than those computed.
    made, _, storage = run(config_for(parts, tmp_path, activations={"mantissa_bits": bits}))
    for shard in made:
        stored: dict[tuple[int, int], list[float]] = defaultdict(list)
        for row in storage.read_parquet(f"{shard.folder}/activations.parquet").to_pylist():
            stored[row["token_id"], row["feature_id"]].append(row["activation"])
        edges = storage.read_parquet(f"{shard.folder}/edges.parquet").to_pylist()
        assert [tuple(row.values()) for row in edges] == [
            (
                *pair,
                len(of),
                max(of),
                None if len(of) == 1 else sum(round(Fraction(a) * 2**32) for a in of),
                32,
            )
            for pair, of in sorted(stored.items())
        ]
        assert (shard.n_edges, shard.scale) == (len(edges), 32)
