"""Losses of held-out predictions against the plainest code, and what makes them be computed again."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import plain
import pytest
import reference
import tiny
import torch

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ModelError
from schemas.pretraining.work import LossShard
from tasks.corpus.tables import CorpusTables
from tasks.engine.run import Run, make
from tasks.models import devices
from tasks.pretraining import loading
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.losses import LOSSES

STEPS = (0, 10)
DOCUMENTS = [
    *tiny.texts(12, longest=90),
    "a <eos> b <bos> the river <pad><pad> of the mountain, which was",
    "<bos>the river",
    "x",
    "Tokyo <eos>",
]
Loss = dict[tuple[int, int, int], dict[str, Any]]
"""By step, doc_id and position of what is predicted."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for step in STEPS:
        tiny.save_model(folder / "series" / f"step-{step}", "gpt_neox", seed=step)
    tiny.write_jsonl(folder / "corpus.jsonl", DOCUMENTS)
    return folder


def config_for(parts: Path, root: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "corpus": {"urls": [str(parts / "corpus.jsonl")], "shard_tokens": 250},
        "model": {"name": "", "tokenizer": str(parts / "series" / "step-0")},
        "windows": {"context_size": 32},
        "activations": {"batch_tokens": 256},
        "consolidation": {
            "heldout_share": 0.6,
            "series": [{"name": "tiny", "folder": str(parts / "series")}],
        },
        "losses": {},
        "function_tokens": {},
        "storage": {"root": str(root)},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return Config.model_validate(values)


def prepare(config: Config) -> Run:
    """A new look at a run whose checkpoints are there."""
    run: Run = plain.finished(config, None, CHECKPOINTS)
    return run


def compute(config: Config) -> list[LossShard]:
    return make(prepare(config), LOSSES)


def found_of(config: Config) -> list[LossShard] | None:
    run = prepare(config)
    return run.result(LOSSES) if run.is_finished(LOSSES) else None


def to_do(config: Config) -> tuple[int, list[str]]:
    """How many loss shards are done, and a line for each that is missing."""
    found = prepare(config).find(LOSSES)
    return len(found.done), list(LOSSES.lines(found.missing))


def kept(made: list[LossShard], storage: Storage) -> Loss:
    found: Loss = {}
    for shard in made:
        rows = storage.read_parquet(f"{shard.folder}/token_losses.parquet").to_pylist()
        assert len(rows) == shard.n_predictions
        assert [(r["doc"], r["position"]) for r in rows] == sorted((r["doc"], r["position"]) for r in rows)
        for row in rows:
            doc_id = shard.part.shard.doc_offset + row["doc"]
            found[shard.checkpoint.step, doc_id, row["position"]] = row
    return found


def contents(made: list[LossShard], storage: Storage) -> list[bytes]:
    return [storage.read_bytes(f"{shard.folder}/token_losses.parquet") for shard in made]


def heldout_ids(made: list[LossShard]) -> list[int]:
    return sorted({shard.part.shard.doc_offset + doc for shard in made for doc in shard.part.documents})


def expected_losses(folder: Path, doc_ids: list[int], context_size: int, prepend_bos: bool) -> Loss:
    """One window at a time, one position at a time, log-softmax in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids, special = reference.tokenize(folder / "step-0", DOCUMENTS)
    bos = AutoTokenizer.from_pretrained(folder / "step-0").bos_token_id
    step_size = context_size - int(prepend_bos)
    found: Loss = {}
    for step in STEPS:
        module = AutoModelForCausalLM.from_pretrained(folder / f"step-{step}", dtype=torch.float32).eval()
        for doc_id in doc_ids:
            document = ids[doc_id]
            for start in range(0, len(document), step_size):
                window = document[start : start + step_size]
                fed = [bos, *window] if prepend_bos else window
                with torch.no_grad():
                    logits = module(torch.tensor([fed])).logits[0][int(prepend_bos) :].double()
                for offset in range(len(window) - 1):
                    current, following = window[offset], window[offset + 1]
                    if current in special or following in special:
                        continue
                    found[step, doc_id, start + offset + 1] = {
                        "current_token_id": current,
                        "token_id": following,
                        "loss": -float(logits[offset].log_softmax(-1)[following]),
                    }
    return found


def buckets(found: Loss, function: set[int]) -> dict[tuple[int, bool, bool], float]:
    """(step, current is function, next is function) to the mean loss."""
    grouped = defaultdict(list)
    for (step, _, _), row in found.items():
        key = (step, row["current_token_id"] in function, row["token_id"] in function)
        grouped[key].append(row["loss"])
    return {key: sum(values) / len(values) for key, values in grouped.items()}


def function_tokens(folder: Path) -> set[int]:
    ids, special = reference.tokenize(folder / "step-0", DOCUMENTS)
    rows = reference.tokens_table(ids, special, 0.4)
    return {token for token, row in rows.items() if row["is_function"]}


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.slow
def test_losses_are_those_of_the_plainest_code(parts: Path, tmp_path: Path, prepend_bos: bool) -> None:
    run = prepare(config_for(parts, tmp_path, windows={"prepend_bos": prepend_bos}))
    made, storage = make(run, LOSSES), run.storage
    assert [shard.checkpoint.step for shard in made] == sorted(shard.checkpoint.step for shard in made)
    n_parts = len(made) // 2
    assert n_parts >= 3
    offsets = [shard.part.shard.doc_offset for shard in made[:n_parts]]
    assert offsets == sorted(offsets)
    doc_ids = heldout_ids(made)
    # The documents with special tokens inside are among them, and others are not.
    assert {12, 13} <= set(doc_ids) < set(range(len(DOCUMENTS)))
    found, expected = kept(made, storage), expected_losses(parts / "series", doc_ids, 32, prepend_bos)
    assert set(found) == set(expected)
    assert len(found) > 300
    assert max(position for _, _, position in found) > 64
    for key, row in found.items():
        assert row["current_token_id"] == expected[key]["current_token_id"]
        assert row["token_id"] == expected[key]["token_id"]
        assert row["loss"] == pytest.approx(expected[key]["loss"], abs=1e-5)
    function = function_tokens(parts / "series")
    ours, plainly = buckets(found, function), buckets(expected, function)
    assert len(ours) == 8
    assert ours == pytest.approx(plainly, abs=1e-5)
    assert sum(shard.n_predictions for shard in made) == len(expected)


@pytest.mark.slow
def test_the_batch_size_changes_nothing_to_speak_of(parts: Path, tmp_path: Path) -> None:
    one = prepare(config_for(parts, tmp_path, activations={"batch_tokens": 1}))
    other = prepare(config_for(parts, tmp_path, activations={"batch_tokens": 4096}))
    alone, together = make(one, LOSSES), make(other, LOSSES)
    assert {shard.folder for shard in alone}.isdisjoint(shard.folder for shard in together)
    a, b = kept(alone, one.storage), kept(together, other.storage)
    assert set(a) == set(b)
    assert max(abs(a[key]["loss"] - b[key]["loss"]) for key in a) < 1e-5


@pytest.mark.slow
def test_sums_by_document_are_those_of_the_kept_losses_to_the_bit(parts: Path, tmp_path: Path) -> None:
    single = prepare(config_for(parts, tmp_path))
    summed = prepare(config_for(parts, tmp_path, losses={"keep_tokens": False}))
    singles, sums = make(single, LOSSES), make(summed, LOSSES)
    function = function_tokens(parts / "series")
    assert [shard.n_predictions for shard in sums] == [shard.n_predictions for shard in singles]
    for one, other in zip(singles, sums, strict=True):
        name = Path(single.storage.full(one.folder), "token_losses.parquet")
        expected = duckdb.execute(
            f"""SELECT doc, current_token_id IN $function, token_id IN $function, count(*)::BIGINT,
            sum((loss::DOUBLE * 4294967296)::BIGINT)::BIGINT FROM '{name}' GROUP BY ALL ORDER BY ALL""",
            {"function": sorted(function)},
        ).fetchall()
        table = summed.storage.read_parquet(f"{other.folder}/document_losses.parquet")
        assert [tuple(row.values()) for row in table.to_pylist()] == expected
        assert not summed.storage.exists(f"{other.folder}/token_losses.parquet")


@pytest.mark.slow
def test_a_second_call_computes_nothing_and_a_lost_unit_comes_back_alone(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(parts, tmp_path)
    storage = Storage(config.storage.root)
    assert found_of(config) is None
    done, lines = to_do(config)
    reports: list[tuple[int, int, str]] = []
    made = make(prepare(config), LOSSES, lambda *report: reports.append(report))
    assert (done, len(lines)) == (0, len(made))
    assert all(line.startswith("tiny, step ") and "corpus.jsonl" in line for line in lines)
    n_tokens = sum(shard.part.n_tokens for shard in made)
    assert reports[0] == (0, n_tokens, "tokens, losses")
    assert reports[-1] == (n_tokens, n_tokens, "tokens, losses")
    assert len(reports) == len(made) + 1
    before = contents(made, storage)
    load, loaded = loading.load_language_model, []

    def counting(*arguments: Any) -> Any:
        loaded.append(arguments[0].name)
        return load(*arguments)

    monkeypatch.setattr(loading, "load_language_model", counting)
    assert compute(config) == made == found_of(config)
    assert to_do(config) == (len(made), [])
    assert loaded == []
    lost = made[-1]
    storage.delete(lost.folder)
    times = {
        shard.folder: Path(storage.full(shard.folder), "manifest.json").stat().st_mtime_ns
        for shard in made[:-1]
    }
    assert found_of(config) is None
    _, lines = to_do(config)
    assert len(lines) == 1
    assert lines[0].startswith("tiny, step 10: ")
    assert compute(config) == made
    assert loaded == [str(parts / "series" / "step-10")]
    assert contents(made, storage) == before
    assert all(
        Path(storage.full(folder), "manifest.json").stat().st_mtime_ns == time
        for folder, time in times.items()
    )


@pytest.mark.slow
def test_what_losses_depend_on(parts: Path, tmp_path: Path) -> None:
    made = compute(config_for(parts, tmp_path))
    summed = compute(config_for(parts, tmp_path, losses={"keep_tokens": False}))
    assert {shard.folder for shard in made}.isdisjoint(shard.folder for shard in summed)
    other_share = {"function_tokens": {"share": 0.2}}

    def found(**sections: Any) -> list[LossShard] | None:
        return found_of(config_for(parts, tmp_path, **sections))

    assert found(losses={"resamples": 107}) == made
    assert found(**other_share) == made
    assert found(losses={"keep_tokens": False}) == summed
    assert found(losses={"keep_tokens": False}, **other_share) is None
    assert found(windows={"context_size": 31}) is None
    assert found(windows={"prepend_bos": False}) is None


@pytest.mark.slow
def test_held_out_tokens_are_limited(parts: Path, tmp_path: Path) -> None:
    made = compute(config_for(parts, tmp_path, losses={"max_tokens": 300}))
    assert 150 < sum(shard.part.n_tokens for shard in made if shard.checkpoint.step == 0) <= 300


@pytest.mark.slow
def test_equal_files_and_equal_checkpoints_are_read_once(parts: Path, tmp_path: Path) -> None:
    for name in "ab":
        tiny.write_jsonl(tmp_path / "corpus" / f"{name}.jsonl", DOCUMENTS[:6])
    for step in (1, 2):
        shutil.copytree(parts / "series" / "step-0", tmp_path / "series" / f"step-{step}")
    config = config_for(
        parts,
        tmp_path / "run",
        corpus={"urls": [f"{tmp_path}/corpus/*.jsonl"]},
        consolidation={"series": [{"name": "twins", "folder": str(tmp_path / "series")}]},
    )
    made = compute(config)
    found = kept(made, Storage(config.storage.root))
    assert {step for step, _, _ in found} == {1, 2}
    assert {doc_id % 6 for _, doc_id, _ in found} == {doc_id for _, doc_id, _ in found if doc_id < 6}
    assert len({shard.folder for shard in made}) * 4 == len(made)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_checkpoint_and_source(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_language_model

    def broken(model: Any, storage: Storage) -> Any:
        loaded = load(model, storage)
        if model.name.endswith("step-10"):
            with torch.no_grad():
                loaded.blocks[2].mlp.dense_4h_to_h.bias.fill_(float("nan"))
        return loaded

    monkeypatch.setattr(loading, "load_language_model", broken)
    config = config_for(parts, tmp_path)
    with pytest.raises(
        ModelError, match=r"\[losses\] checkpoint tiny, step 10: .*not finite in .*corpus.jsonl"
    ):
        compute(config)
    done, lines = to_do(config)
    assert done == len(lines) > 0
    assert all("step 10" in line for line in lines)


def in_a_series(source: Path, target: Path) -> Path:
    shutil.copytree(source, target / "series" / "step-7")
    return target / "series" / "step-7"


def refused(parts: Path, tmp_path: Path, message: str, **sections: Any) -> None:
    series = {"series": [{"name": "odd", "folder": str(tmp_path / "series")}]}
    config = config_for(parts, tmp_path / "run", consolidation=series, **sections)
    with pytest.raises(ModelError, match=f"checkpoint odd, step 7: {message}"):
        compute(config)


@pytest.mark.slow
def test_a_checkpoint_with_another_tokenizer_is_refused(parts: Path, tmp_path: Path) -> None:
    folder = in_a_series(parts / "series" / "step-0", tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (one, a), (other, b) = [(token, index) for token, index in vocabulary.items() if index in (30, 31)]
    vocabulary[one], vocabulary[other] = b, a
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(parts, tmp_path, "its own tokenizer is another one than the corpus': id 30 is")
    # A tokenizer that differs only in what no id depends on is the same one.
    vocabulary[one], vocabulary[other] = a, b
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    series = {"series": [{"name": "odd", "folder": str(tmp_path / "series")}]}
    assert compute(config_for(parts, tmp_path / "run", consolidation=series))


def test_what_does_not_fit_the_corpus_is_said_before_any_forward(parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "series" / "step-0", tmp_path / "series" / "step-3")
    folder = in_a_series(parts / "series" / "step-10", tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(parts, tmp_path, "its own tokenizer is another")
    assert not Storage(str(tmp_path / "run")).sizes("losses")


@pytest.mark.slow
def test_a_checkpoint_with_too_small_a_vocabulary_is_refused(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(parts / "series" / "step-0")
    module.resize_token_embeddings(300)
    module.save_pretrained(tmp_path / "series" / "step-7")
    refused(parts, tmp_path, r"token id \d+ is outside the vocabulary of .* \(300 tokens\)")


@pytest.mark.slow
def test_a_checkpoint_whose_embedding_lacks_the_padding_id_is_read(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / "series" / "step-0")
    tokenizer.add_special_tokens({"pad_token": "<later>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer.pad_token_id == 400
    config = config_for(parts, tmp_path / "run", model={"tokenizer": str(tmp_path / "tokenizer")})
    found = kept(compute(config), Storage(config.storage.root))
    plainly = config_for(parts, tmp_path / "plain")
    expected = kept(compute(plainly), Storage(plainly.storage.root))
    shared = set(found) & set(expected)
    assert len(shared) > 0.9 * len(expected)
    assert all(found[key]["loss"] == pytest.approx(expected[key]["loss"], abs=1e-5) for key in shared)


def test_a_window_longer_than_the_context_is_refused(parts: Path, tmp_path: Path) -> None:
    in_a_series(parts / "series" / "step-0", tmp_path)
    message = "windows.context_size = 129 is more than .*step-7 was built for"
    refused(parts, tmp_path, message, windows={"context_size": 129})


def test_a_tokenizer_without_bos_is_refused_where_windows_begin_with_it(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    in_a_series(parts / "series" / "step-0", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(parts / "series" / "step-0")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    refused(
        parts, tmp_path, "the tokenizer of .* has no BOS", model={"tokenizer": str(tmp_path / "tokenizer")}
    )


@pytest.mark.cluster
def test_workers_take_whole_checkpoints(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client

    here = prepare(config_for(parts, tmp_path / "here"))
    there = prepare(config_for(parts, tmp_path / "there"))
    expected = contents(make(here, LOSSES), here.storage)
    jobs: list[int] = []

    @contextmanager
    def two_workers(_dask: Any, _count_devices: Any, n_parts: int) -> Iterator[Any]:
        jobs.append(n_parts)
        with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
            yield client

    monkeypatch.setattr(devices, "extraction_client", two_workers)
    reports: list[tuple[int, int, str]] = []
    made = make(there, LOSSES, lambda *report: reports.append(report))
    assert jobs == [2]
    n_tokens = sum(shard.part.n_tokens for shard in made)
    assert (reports[0], reports[-1]) == (
        (0, n_tokens, "tokens, losses"),
        (n_tokens, n_tokens, "tokens, losses"),
    )
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)
    assert contents(made, there.storage) == expected


@pytest.mark.slow
def test_function_tokens_are_those_of_the_table(parts: Path, tmp_path: Path) -> None:
    run = prepare(config_for(parts, tmp_path, losses={"keep_tokens": False}))
    ids = run.find(LOSSES).units[0].function_ids
    assert ids is not None
    name = CorpusTables().build(run).tables["tokens"]
    rows = run.storage.read_parquet(name).to_pylist()
    assert ids.tolist() == sorted(row["token_id"] for row in rows if row["is_function"])
    assert set(ids.tolist()) == function_tokens(parts / "series")
