"""Reactivation and steering from corpus and cases to the report (PAPER 1.3), on tiny models."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from plain import run_plain
from s3 import S3Root

from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config
from tasks.stages import is_up_to_date, plan_run, stages_of

pytestmark = pytest.mark.slow
SAES = {0: "standard", 1: "jumprelu"}
CASES = """
[[case]]
name = "capital"
relation = "capitals"
prompts = ["who was in Russia when the river of", "who was in Moscow when the river of"]

[[case]]
name = "animal"
relation = "animals"
prompts = ["the quick fox and the mountain", "the quick emoji and the mountain"]

[[trait]]
name = "Moscow"
positive = ["Moscow said the", "in Moscow the river was the", "they had Moscow and the"]
negative = ["Russia said the", "in Russia the river was the", "they had Russia and the"]

[[trait]]
name = "given"
layer = 1
features = [3, 17]
values = [4.0, 5.0]

[[steer]]
traits = ["Moscow"]
prompt = "what is the"
target = " Moscow"

[[steer]]
traits = ["given"]
prompt = "said the lazy"
target = " dog jumps"
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    for layer, kind in SAES.items():
        tiny.save_sae(folder / f"sae-{layer}", kind, seed=layer)
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(30))
    (folder / "cases.toml").write_text(CASES)
    return folder


def config_for(parts: Path, root: Path | str, architecture: str = "llama", **steering: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": [str(parts / "corpus.jsonl")]},
            "model": {"name": str(parts / architecture)},
            "windows": {"context_size": 32},
            "sae": [{"layer": layer, "path": str(parts / f"sae-{layer}")} for layer in SAES],
            "activations": {"max_tokens": 400, "mantissa_bits": 23},
            "graph": {"rarefaction_m": 5},
            "storage": {"root": str(root)},
            "steering": {
                "cases": str(parts / "cases.toml"),
                "strengths": [1.0, 3.0],
                "random_controls": 2,
                "max_new_tokens": 3,
                "resamples": 100,
                **steering,
            },
        }
    )


def contents(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    tables = (
        *("prompt_tokens", "reactivations", "reactivation_positions", "reactivation_scores"),
        *("trait_layers", "trait_features", "steering", "steering_effects"),
    )
    with connect(storage) as connection:
        return {table: connection.sql(f"SELECT * FROM {table}").fetchall() for table in tables}


def plainest_reactivations(parts: Path, storage: Storage, architecture: str) -> set[tuple[Any, ...]]:
    """(case, prompt, position, token id, is function, layer, feature) by whole forwards and `sae.encode`."""
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parts / architecture)
    model = AutoModelForCausalLM.from_pretrained(parts / architecture, dtype=torch.float32).eval()
    with connect(storage) as connection:
        function = {
            row[0] for row in connection.sql("SELECT token_id FROM tokens WHERE is_function").fetchall()
        }
    found = set()
    for case in tomllib.loads(CASES)["case"]:
        for prompt in case["prompts"]:
            ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in SAES:
                sae = SAE.load_from_disk(parts / f"sae-{layer}", device="cpu", dtype="float32")
                features = sae.encode(hidden[layer + 1][0])
                for position, feature in features.nonzero().tolist():
                    if position > 0:
                        token = ids[position]
                        found.add((case["name"], prompt, position, token, token in function, layer, feature))
    return found


@pytest.fixture(scope="module")
def root(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of the llama is finished, to be left as it is."""
    folder = tmp_path_factory.mktemp("steered") / "root"
    run_plain(config_for(parts, folder))
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_from_cases_to_the_report(parts: Path, root: Path, moto_root: S3Root, architecture: str) -> None:
    """The one on this disk, the other on S3, its cases too."""
    config = config_for(parts, root, architecture)
    if architecture == "gpt_neox":
        Storage(moto_root.url).write_bytes("cases.toml", CASES.encode())
        config = config_for(parts, moto_root.url, architecture, cases=f"{moto_root.url}/cases.toml")
        run_plain(config)
    assert [*stages_of(config)] == [
        "tokenize",
        "dictionaries",
        "features",
        "reactivation",
        "steering",
        "tables",
        "report",
    ]
    storage = Storage(config.storage.root)
    with connect(storage) as connection:
        rows = connection.sql(
            'SELECT "case", prompt, position, token_id, is_function, layer, feature_id FROM reactivations'
        ).fetchall()
        silent = connection.sql(
            "SELECT count(*), count(*) FILTER (kl = 0 AND target_logprob_delta = 0 AND baseline_text = steered_text) "
            "FROM steering WHERE strength = 0"
        ).fetchall()[0]
        moved = connection.sql("SELECT count(*) FROM steering WHERE strength = 3 AND kl > 0").fetchall()[0][0]
    assert len(rows) == len(set(rows))
    assert set(rows) == plainest_reactivations(parts, storage, architecture)
    assert silent[0] == silent[1] > 0
    assert moved > 0
    assert is_up_to_date(plan_run(config, storage), stages_of(config))
    html = storage.read_bytes("report.html").decode()
    assert "Reactivation" in html
    assert "Steering" in html


def test_another_case_is_computed_alone_and_the_tables_are_those_of_a_fresh_run(
    parts: Path, root: Path, tmp_path: Path
) -> None:
    more = """
[[case]]
name = "river"
relation = "places"
prompts = ["one river with the fox of the", "one mountain with the fox of the"]
"""
    shutil.copytree(root, tmp_path / "root")
    storage = Storage(str(tmp_path / "root"))
    before = storage.sizes("reactivation") | storage.sizes("steering") | storage.sizes("traits")
    changed = tmp_path / "cases.toml"
    changed.write_text(CASES + more)
    longer = config_for(parts, tmp_path / "root", cases=str(changed))
    assert not is_up_to_date(plan_run(longer, storage), stages_of(longer))
    stamps = {name: (tmp_path / "root" / name).stat().st_mtime_ns for name in before}
    run_plain(longer)
    assert {name: (tmp_path / "root" / name).stat().st_mtime_ns for name in before} == stamps
    fresh = run_plain(config_for(parts, tmp_path / "fresh", cases=str(changed)))
    assert contents(storage) == contents(fresh)


def test_a_run_that_asks_for_no_steering_has_none(finished: Path) -> None:
    storage = Storage(str(finished / "run"))
    with connect(storage) as connection:
        views = {row[0] for row in connection.sql("SHOW TABLES").fetchall()}
    assert "coverage" in views
    assert not {"reactivations", "reactivation_scores", "steering", "trait_layers"} & views
    assert "Steering" not in storage.read_bytes("report.html").decode()
