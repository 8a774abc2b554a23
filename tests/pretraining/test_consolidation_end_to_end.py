"""Memory consolidation from corpus to report (PAPER 1.4): a public-style series, and models trained here."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import run_plain
from s3 import S3Root
from tiny import save_model, texts, write_jsonl

from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import Series, Shape, consolidation_of
from tasks.stages import is_up_to_date, plan_run, stages_of

pytestmark = pytest.mark.slow
CONTEXT = 32


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a random GPT-NeoX, as public series publish them."""
    folder = tmp_path_factory.mktemp("pythia")
    for seed, step in enumerate(("step2", "step16")):
        save_model(folder / step, "gpt_neox", seed=seed)
    return folder


def _public(pythia: Path, tmp_path: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": [str(write_jsonl(tmp_path / "a.jsonl", texts(40)))], "shard_tokens": 800},
            "model": {"tokenizer": str(pythia / "step2")},
            "windows": {"context_size": CONTEXT},
            "activations": {"max_tokens": 1500},
            "graph": {"rarefaction_m": 3},
            "storage": {"root": str(tmp_path / "root")},
            "consolidation": {
                "series": [{"name": "neox", "folder": str(pythia)}],
                "heldout_share": 0.4,
                "growth": {
                    "layer": 1,
                    "checkpoints": 2,
                    "train": {"d_sae": 32, "k": 4, "samples": 2000, "batch_size": 64},
                },
                "generations": {"prompts": ["the of and", "Tokyo"], "max_new_tokens": 4},
            },
            **sections,
        }
    )


def _plainest_buckets(config: Config, storage: Storage, folder: Path) -> dict[str, tuple[int, float]]:
    """Count and mean loss of each token group, by the plainest possible code: one window, one logit at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with connect(storage) as connection:
        function = {
            row[0] for row in connection.sql("SELECT token_id FROM tokens WHERE is_function").fetchall()
        }
        heldout = {row[0] for row in connection.sql("SELECT DISTINCT doc_id FROM token_losses").fetchall()}
    sums: dict[str, list[float]] = defaultdict(list)
    for number, text in enumerate(texts(40)):
        if number not in heldout:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), CONTEXT - 1):
            window = ids[start : start + CONTEXT - 1]
            logits = model(input_ids=torch.tensor([[tokenizer.bos_token_id, *window]])).logits[0].double()
            for place in range(1, len(window)):
                loss = -float(torch.log_softmax(logits[place], 0)[window[place]])
                kinds = [
                    "function" if token in function else "content" for token in window[place - 1 : place + 1]
                ]
                sums["→".join(kinds)].append(loss)
    return {bucket: (len(losses), math.fsum(losses) / len(losses)) for bucket, losses in sums.items()}


@pytest.fixture(scope="module")
def public(pythia: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the series, to be left as it is."""
    folder = tmp_path_factory.mktemp("public")
    run_plain(_public(pythia, folder))
    return folder


def test_a_public_series_from_corpus_to_report(pythia: Path, public: Path) -> None:
    config = _public(pythia, public)
    storage = Storage(config.storage.root)
    with connect(storage) as connection:
        for step in (2, 16):
            rows = connection.execute(
                "SELECT bucket, n, mean_loss, loss_share FROM loss_buckets WHERE model = 'neox' AND step = ?",
                [step],
            ).fetchall()
            expected = _plainest_buckets(config, storage, pythia / f"step{step}")
            assert len(expected) == 4
            assert {row[0]: row[1] for row in rows} == {bucket: n for bucket, (n, _) in expected.items()}
            total = sum(n * mean for n, mean in expected.values())
            for bucket, n, mean, share in rows:
                assert mean == pytest.approx(expected[bucket][1], abs=1e-5)
                assert share == pytest.approx(n * expected[bucket][1] / total, abs=1e-5)
        learned = connection.sql("SELECT * FROM learned_features ORDER BY step").df()
        assert learned.step.tolist() == [2, 16]
        assert set(learned.dictionary_size) == {32}
        assert (learned.learned_features <= learned.dictionary_size).all()
        degrees = connection.sql(
            "SELECT step, count(*), max(degree) FROM checkpoint_degree GROUP BY step ORDER BY step"
        ).fetchall()
        assert [row[0] for row in degrees] == [2, 16]
        assert all(row[2] > 0 for row in degrees)
        texts_made = connection.sql("SELECT count(*) FROM generations").fetchall()[0][0]
        assert texts_made == 2 * 2 * 2
    html = storage.read_bytes("report.html").decode()
    assert "function→content" in html
    plans = plan_run(config, storage)
    assert [plan.stage for plan in plans] == [*stages_of(config)]
    assert is_up_to_date(plans, stages_of(config))


def test_one_more_checkpoint_makes_its_own_work_alone(pythia: Path, public: Path, tmp_path: Path) -> None:
    shutil.copytree(public, tmp_path, dirs_exist_ok=True)
    series = tmp_path / "series"
    series.mkdir()
    for step in ("step2", "step16"):
        (series / step).symlink_to(pythia / step)
    config = _public(series, tmp_path)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"tokenizer": str(pythia / "step2")})}
    )
    storage = Storage(config.storage.root)
    # What is said of the run in its tables names the folder.
    working = [stage for stage in stages_of(config) if stage not in {"tables", "report"}]
    assert is_up_to_date(plan_run(config, storage), working), "where a series lies decides nothing"
    before = storage.sizes("losses") | storage.sizes("growth") | storage.sizes("generations")
    save_model(series / "step64", "gpt_neox", seed=7)
    missing = {plan.stage: plan.missing for plan in plan_run(config, storage)}
    assert missing["checkpoints"] == 0
    assert missing["losses"] is not None
    assert missing["losses"] > 0
    run_plain(config)
    after = storage.sizes("losses") | storage.sizes("growth") | storage.sizes("generations")
    assert before.items() <= after.items()
    with connect(storage) as connection:
        steps = connection.sql("SELECT DISTINCT step FROM loss_buckets ORDER BY step").fetchall()
    assert steps == [(2,), (16,), (64,)]


@pytest.mark.s3
def test_two_sizes_trained_here_on_s3_from_corpus_to_report(tmp_path: Path, moto_root: S3Root) -> None:
    config = Config.model_validate(
        {
            "corpus": {"urls": [str(write_jsonl(tmp_path / "a.jsonl", texts(150)))]},
            "windows": {"context_size": CONTEXT},
            "activations": {"max_tokens": 2000},
            "graph": {"rarefaction_m": 3},
            "storage": {"root": moto_root.url},
            "consolidation": {
                "heldout_share": 0.2,
                "train": {
                    "vocabulary_size": 320,
                    "tokens": 4000,
                    "batch_tokens": 256,
                    "checkpoints": 3,
                    "learning_rate": 1e-2,
                },
                "series": [
                    {"name": "small", "shape": {"hidden_size": 8, "layers": 2, "heads": 2}},
                    {"name": "large", "shape": {"hidden_size": 32, "layers": 2, "heads": 2}},
                ],
                "growth": {
                    "layer": 1,
                    "checkpoints": 2,
                    "start": "previous",
                    "train": {"d_sae": 32, "k": 4, "samples": 1000, "batch_size": 64},
                },
                "generations": {"prompts": ["the of"], "max_new_tokens": 2},
            },
        }
    )
    storage = run_plain(config)
    with connect(storage) as connection:
        total = "SELECT sum(n * mean_loss) / sum(n) FROM loss_buckets WHERE model = ? AND step = ?"
        steps = [
            row[0] for row in connection.sql("SELECT DISTINCT step FROM checkpoints ORDER BY 1").fetchall()
        ]
        assert len(steps) == 3
        for model in ("small", "large"):
            first, last = (connection.execute(total, [model, step]).fetchall()[0][0] for step in steps[::2])
            assert last < first
        curve = connection.sql("SELECT count(*) FROM training_losses GROUP BY model").fetchall()
        assert curve == [(steps[-1],), (steps[-1],)]
        overlap = connection.sql(
            "SELECT count(*) FROM checkpoints WHERE parameters IS NULL OR tokens <> step * 256"
        ).fetchall()
        assert overlap == [(0,)]
    finished = plan_run(config, storage)
    assert is_up_to_date(finished, stages_of(config))
    assert not moto_root.unfinished_uploads()

    section = consolidation_of(config)
    other = Series(name="other", shape=Shape(hidden_size=16, layers=2, heads=2))
    longer = config.model_copy(
        update={"consolidation": section.model_copy(update={"series": [*section.series, other]})}
    )
    plans = {plan.stage: plan for plan in plan_run(longer, storage)}
    # Three checkpoints and a loss curve each.
    assert (plans["checkpoints"].done, plans["checkpoints"].missing) == (8, 4)
    assert plans["checkpoints"].details == ("train other",)
    for name in ("losses", "growth", "generations"):
        assert plans[name].missing is None
