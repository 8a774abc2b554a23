"""Promoted and suppressed tokens against plain products with the weights of the model's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from plain import run_plain

from infra.catalog import read_catalog
from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ModelError
from tasks.graph.logits import extremes
from tasks.graph.preflight import check_model
from tasks.models.unembedding import Unembedding, load_unembedding
from tasks.stages import is_up_to_date, plan_run


def save_model(folder: Path, architecture: str) -> Any:
    """A tiny model whose final norm has weights (and a bias) of its own; the module."""
    from transformers import AutoModelForCausalLM

    tiny.save_model(folder, architecture)
    module = AutoModelForCausalLM.from_pretrained(folder)
    norm = module.gpt_neox.final_layer_norm if architecture == "gpt_neox" else module.model.norm
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    module.save_pretrained(folder)
    return module


def plain_logits(module: Any, architecture: str, directions: torch.Tensor) -> torch.Tensor:
    """(n, vocabulary) float64."""
    directions = directions.double()
    if architecture == "gpt_neox":
        centred = directions - directions.mean(dim=1, keepdim=True)
        return centred * module.gpt_neox.final_layer_norm.weight.double() @ module.lm_head.weight.double().T
    weight = module.model.norm.weight.double()
    gain = 1 + weight if architecture == "gemma2" else weight
    return directions * gain @ module.lm_head.weight.double().T


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_are_the_weights_products(tmp_path: Path, architecture: str) -> None:
    module = save_model(tmp_path / "model", architecture)
    found = load_unembedding(Model(name=str(tmp_path / "model")), Storage(str(tmp_path / "root")))
    directions = torch.randn((7, tiny.D_MODEL), generator=torch.Generator().manual_seed(2))
    expected = plain_logits(module, architecture, directions)
    assert torch.allclose(found.logits(directions).double(), expected, rtol=1e-4, atol=1e-4)
    assert found.centres == (architecture == "gpt_neox")


def test_equal_logits_come_in_the_order_of_their_ids() -> None:
    weight = torch.tensor([[1.0], [3.0], [3.0], [9.0], [-2.0], [-2.0], [0.0]])
    unembedding = Unembedding(weight=weight, gain=torch.ones(1), centres=False)
    ids = np.array([0, 1, 2, 4, 5, 6])
    (promoted, suppressed) = extremes(unembedding, torch.tensor([[1.0], [-1.0]]), ids, 3)
    rows = pa.concat_tables([promoted, suppressed]).to_pylist()
    found = {
        (feature, sign): [
            (row["token_id"], row["logit"])
            for row in sorted(rows, key=lambda row: row["place"])
            if (row["feature_id"], row["sign"]) == (feature, sign)
        ]
        for feature in (0, 1)
        for sign in ("promoted", "suppressed")
    }
    assert found == {
        (0, "promoted"): [(1, 3.0), (2, 3.0), (0, 1.0)],
        (0, "suppressed"): [(4, -2.0), (5, -2.0), (6, 0.0)],
        (1, "promoted"): [(4, 2.0), (5, 2.0), (6, 0.0)],
        (1, "suppressed"): [(1, -3.0), (2, -3.0), (0, -1.0)],
    }
    with pytest.raises(ModelError, match="not finite"):
        list(extremes(unembedding, torch.tensor([[float("inf")]]), ids, 3))


def config_of(folder: Path, **features: Any) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": [str(folder / "corpus.jsonl")]},
            "model": {"name": str(folder / "model")},
            "sae": [{"layer": 1, "path": str(folder / "sae")}],
            "windows": {"context_size": 32},
            "graph": {"rarefaction_m": 5},
            "features": features,
            "storage": {"root": str(folder / "root")},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logits")
    save_model(folder / "model", "llama")
    tiny.save_sae(folder / "sae")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(6))
    return folder


@pytest.mark.slow
def test_logits_join_a_finished_run_and_leave_it(folder: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, asked = config_of(folder), config_of(folder, logits=True, logit_tokens=3)
    storage = run_plain(plain)
    before = read_catalog(storage)
    assert "feature_logits" not in before.sharded
    assert not is_up_to_date(plan_run(asked, storage), ["tables"])
    run_plain(asked)
    assert is_up_to_date(plan_run(asked, storage), ["tables"])
    after = read_catalog(storage)
    assert after.lineage["graph"] == before.lineage["graph"]
    assert after.sharded["feature_examples"] == before.sharded["feature_examples"]
    with connect(storage) as connection:
        rows = connection.execute("FROM feature_logits").fetchall()
    module = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    decoder = load_file(folder / "sae" / "sae_weights.safetensors")["W_dec"]
    logits = plain_logits(module, "llama", decoder)
    logits[:, tokenizer.all_special_ids] = torch.nan
    expected = []
    for feature, of in enumerate(logits.tolist()):
        ids = [token for token, value in enumerate(of) if value == value]
        ids.sort(key=lambda token: of[token])
        for sign, chosen in (("promoted", ids[::-1][:3]), ("suppressed", ids[:3])):
            expected += [
                (1, feature, sign, place, token, pytest.approx(of[token], abs=1e-4))
                for place, token in enumerate(chosen, 1)
            ]
    assert [(*row[:5], row[6]) for row in rows] == expected
    with connect(storage) as connection:
        wrong = "SELECT count(*) FROM feature_logits AS f JOIN tokens AS t USING (token_id) WHERE f.token <> t.token"
        assert connection.execute(wrong).fetchone() == (0,)
    run_plain(plain)
    assert "feature_logits" not in read_catalog(storage).sharded


def test_a_model_without_a_head_is_refused_before_work(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    headless = tmp_path / "model"
    tiny.save_tokenizer(headless)
    AutoModel.from_pretrained(folder / "model").save_pretrained(headless)
    config = config_of(folder, logits=True).model_copy(update={"model": Model(name=str(headless))})
    with pytest.raises(ModelError, match=r"lack lm_head\.weight"):
        check_model(config, Storage(str(tmp_path / "root")))
    with pytest.raises(ModelError, match=r"lack lm_head\.weight.*"):
        load_unembedding(config.model, Storage(str(tmp_path / "root")))


def test_logits_need_dictionaries(folder: Path) -> None:
    values = {**config_of(folder).model_dump(), "sae": [], "features": {"logits": True}}
    with pytest.raises(ValueError, match=r"features\.logits needs sae"):
        Config.model_validate(values)
