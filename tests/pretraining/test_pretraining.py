"""Pre-training: what a step computes, what is kept and when, and how it fails."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from trained import BATCH_TOKENS, STEPS, Training, series_of

from infra.manifest import load
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, FunctokError, ModelError, TrainingError
from schemas.tables import SHARD_FILES
from tasks.corpus import heldout
from tasks.models.tokenizers import load_tokenizer
from tasks.pretraining import loop as pretraining_loop
from tasks.pretraining import model as pretraining_model
from tasks.pretraining import packing
from tasks.pretraining import plan as pretraining_plan
from tasks.pretraining import trainer as pretraining_trainer
from tasks.pretraining import training as pretraining
from tasks.pretraining import worker as pretraining_worker
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.model import PackedLanguageModel, default_intermediate_size
from tasks.pretraining.plan import TrainingPlan, log_spaced, plan_training
from tasks.pretraining.trainer import Trainer, shares
from tasks.pretraining.training import FAILURE, _failure, as_written

HERE = {"device": "cpu", "precision": "float32", "compiled": False, "processes": 1, "sharded": False}
"""What a step of a training in these tests is computed with."""
GPU = {**HERE, "device": "cuda", "precision": "bfloat16", "compiled": True}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Tokenized, nothing trained."""
    return Training.prepare(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def trained(prepared: Training, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Trained as `config()` says; only to be read."""
    made = prepared.copy(tmp_path_factory.mktemp("trained"))
    made.train(made.config())
    return made


@pytest.fixture
def untrained(prepared: Training, tmp_path: Path) -> Training:
    return prepared.copy(tmp_path / "copy")


@pytest.fixture
def stop_before(untrained: Training, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Trains `untrained` as `config()` says, and kills it before a step."""

    class Stop(Exception):
        pass

    step = Trainer.step

    def train_until(last: int) -> None:
        def stopping(self: Trainer, number: int) -> Any:
            if number == last:
                raise Stop
            return step(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stopping)
            with pytest.raises(Stop):
                untrained.train(untrained.config())

    return train_until


def plan_of(training: Training, config: Config) -> TrainingPlan:
    return plan_training(config, training.shards(), series_of(config))


def test_keeps_checkpoints_that_load_by_themselves(trained: Training) -> None:
    from transformers import AutoModelForCausalLM

    config = trained.config()
    found = trained.checkpoints(config)
    assert found is not None
    assert [checkpoint.step for checkpoint in found] == [1, 3, 7, 20]
    assert [checkpoint.tokens for checkpoint in found] == [step * BATCH_TOKENS for step in (1, 3, 7, 20)]
    assert len({checkpoint.key for checkpoint in found}) == 4
    losses = trained.curve(config)["loss"]
    for checkpoint in found:
        folder = checkpoint.model.name.removeprefix("storage:")
        manifest = load(trained.storage, folder)
        assert manifest is not None
        assert manifest.stats["loss"] == losses[checkpoint.step - 1]
        assert manifest.stats["made_with"] == [{"after_step": 0, **HERE}]
        module = AutoModelForCausalLM.from_pretrained(trained.storage.local_folder(folder))
        assert checkpoint.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert module.lm_head.weight is module.model.embed_tokens.weight
        assert module.config.max_position_embeddings == 32
        # Its own tokenizer is the one that the corpus was tokenized with.
        alone = checkpoint.model.model_copy(update={"tokenizer": None})
        assert load_tokenizer(alone, trained.storage).key == trained.shards().tokenizer_key


def test_keeps_the_loss_curve_and_no_state(trained: Training) -> None:
    config = trained.config()
    name = trained.curve_file(config)
    assert trained.storage.read_parquet(name).schema.equals(SHARD_FILES["training_losses"])
    curve = trained.curve(config)
    assert curve["step"] == list(range(1, STEPS + 1))
    assert curve["tokens"] == [step * BATCH_TOKENS for step in curve["step"]]
    assert curve["learning_rate"][0] == 1e-2
    assert curve["learning_rate"][-1] == pytest.approx(1e-3)
    assert sorted(curve["learning_rate"], reverse=True) == curve["learning_rate"]
    assert curve["loss"][0] == pytest.approx(math.log(400), abs=0.1)
    assert np.mean(curve["loss"][-3:]) < curve["loss"][0] - 1.5
    manifest = load(trained.storage, name.rsplit("/", 1)[0])
    assert manifest is not None
    assert list(manifest.files) == ["losses.parquet"]
    assert manifest.stats["made_with"] == [{"after_step": 0, **HERE}]
    assert manifest.stats["epochs"] == pytest.approx(STEPS * BATCH_TOKENS / manifest.stats["training_tokens"])
    assert trained.states() == []
    done = [report[0] for report in trained.progress]
    assert done == sorted(done)
    assert {report[1:] for report in trained.progress} == {
        (STEPS * BATCH_TOKENS, "tokens, training small (1.1 epochs)")
    }


def test_trains_as_the_plainest_loop_does(trained: Training) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = trained.config()
    plan = plan_of(trained, config)
    tokenizer = load_tokenizer(config.model, trained.storage)
    rows = pretraining_loop.packed_rows(config, trained.storage, trained.shards(), plan, tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            pad_token_id=None,
        )
    )
    decayed = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    losses, gradient_norms = [], []
    for step in range(1, STEPS + 1):
        # One step of warm-up, then a cosine from 1e-2 to 1e-3 over the other 19.
        rate = 1e-2 if step == 1 else 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 1) / 19)) / 2
        batch = rows.rows((step - 1) * 8, 8)
        inputs, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
        logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten())
        loss.backward()
        gradient_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    curve = trained.curve(config)
    np.testing.assert_allclose(curve["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(curve["gradient_norm"], gradient_norms, rtol=1e-3)
    torch.testing.assert_close(
        trained.weights(config)["model.norm.weight"], model.model.norm.weight.detach(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_micro_batches_and_threads_of_the_caller_change_nothing_else(
    trained: Training, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = untrained.config(micro_batch_tokens=96)
    sizes = []
    forward = PackedLanguageModel.forward

    def watched(self: PackedLanguageModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(PackedLanguageModel, "forward", watched)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    untrained.train(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert max(sizes) == (3, 32)
    np.testing.assert_allclose(
        untrained.curve(config)["loss"], trained.curve(trained.config())["loss"], rtol=1e-4
    )


@pytest.mark.slow
def test_is_trained_once_and_again_only_for_steps_that_are_missing(
    trained: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained.copy(tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "run_training", lambda *_: pytest.fail("trained again"))
        for same in (
            made.config(state_every=3),
            made.config(processes=2),
            made.config(micro_batch_tokens=64),
        ):
            made.train(same)
        assert made.steps(made.config(checkpoints=2)) == [1, 20]
    more = made.config(checkpoints=6)
    curve, kept = made.curve(made.config()), made.storage.sizes("checkpoints")
    times = {name: Path(made.storage.full(name)).stat().st_mtime_ns for name in kept}
    assert made.steps(more) is None
    made.train(more)
    assert made.steps(more) == [1, 2, 3, 6, 11, 20]
    assert made.steps(made.config()) == [1, 3, 7, 20]
    assert made.curve(more) == curve
    assert {name: Path(made.storage.full(name)).stat().st_mtime_ns for name in kept} == times


@pytest.mark.slow
def test_goes_on_from_the_newest_state_before_which_nothing_is_missing(
    trained: Training, untrained: Training, stop_before: Callable[[int], None]
) -> None:
    stop_before(10)
    assert untrained.states() == ["state-00000008"]
    config = untrained.config()
    missing = untrained.run(config).find(CHECKPOINTS).missing
    assert CHECKPOINTS.lines(missing) == ["train small: goes on after step 8 of 20"]
    more = untrained.config(checkpoints=6)
    # Steps 2 and 6 are wanted now and behind the state; 3, 7 and 8 are not.
    untrained.train(more)
    assert untrained.progress[0][0] == 0
    assert untrained.curve(more) == trained.curve(trained.config())


@pytest.mark.slow
def test_a_checkpoint_that_is_missing_at_the_state_itself_is_made_of_it(
    trained: Training, untrained: Training, stop_before: Callable[[int], None]
) -> None:
    stop_before(8)
    config = untrained.config()
    folder = plan_of(untrained, config).checkpoint_folder(7)
    untrained.storage.delete(folder)
    untrained.train(config)
    assert untrained.progress[0][0] == 7 * BATCH_TOKENS
    weights = [made.storage.read_bytes(f"{folder}/model.safetensors") for made in (trained, untrained)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_goes_on_on_another_kind_of_device_and_says_so(
    untrained: Training,
    stop_before: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "computes_with", GPU)
        stop_before(10)
        stop_before(11)
    config = untrained.config()
    plan = plan_of(untrained, config)
    state = load(untrained.storage, f"{plan.folder}/state-00000008")
    assert state is not None
    # Gone on on the same device once, which is no change.
    assert state.stats["made_with"] == [{"after_step": 0, **GPU}]
    assert "trained on" not in caplog.text
    untrained.train(config)
    said = "trained on cuda in bfloat16, and the steps after 8 are trained on cpu in float32"
    assert caplog.text.count(said) == 1
    both = [{"after_step": 0, **GPU}, {"after_step": 8, **HERE}]
    for folder, made in (
        (plan.checkpoint_folder(7), both[:1]),
        (plan.checkpoint_folder(20), both),
        (plan.folder, both),
    ):
        manifest = load(untrained.storage, folder)
        assert manifest is not None
        assert manifest.stats["made_with"] == made
    # Trained again for a step that was not kept: beside checkpoints of the other device.
    caplog.clear()
    untrained.train(untrained.config(checkpoints=6))
    assert "trained on cuda in bfloat16, and the steps after 0 are trained on cpu in float32" in caplog.text


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_it_with_the_step_and_the_last_good_checkpoint(
    trained: Training, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def poisoned(self: Trainer, number: int) -> Any:
        if number == 12:
            with torch.no_grad():
                self.causal.model.norm.weight[0] = math.nan
        return step(self, number)

    config = untrained.config(state_every=5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", poisoned)
        with pytest.raises(TrainingError) as caught:
            untrained.train(config)
    folder = untrained.storage.url(plan_of(untrained, config).checkpoint_folder(7))
    assert str(caught.value) == (
        f"[checkpoints] series small: the loss is nan at step 12 of 20; the last good checkpoint is that of step 7, "
        f"in {folder} (lower consolidation.train.learning_rate (now 0.01) or raise warm_up_share)"
    )
    assert untrained.states() == ["state-00000010"]
    assert untrained.steps(config) is None
    # What was kept is good: from it, the training ends as if nothing had been.
    untrained.train(config)
    assert untrained.curve(config) == trained.curve(trained.config())


def test_weights_that_no_longer_give_a_loss_are_not_kept(untrained: Training) -> None:
    with pytest.raises(
        TrainingError, match=r"after the update at step 1 of 20; no checkpoint had been saved"
    ):
        untrained.train(untrained.config(learning_rate=1e30))
    assert not untrained.storage.sizes("checkpoints")
    assert untrained.states() == []


def test_a_gradient_that_is_not_finite_stops_it(untrained: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def exploding(self: Trainer, number: int) -> Any:
        loss, norm = step(self, number)
        return loss, norm * math.inf if number == 2 else norm

    monkeypatch.setattr(Trainer, "step", exploding)
    with pytest.raises(TrainingError, match=r"the gradient's norm is inf at step 2 of 20; .* step 1"):
        untrained.train(untrained.config())


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-2)])
def test_chunked_loss_and_gradients_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, tolerance: float
) -> None:
    monkeypatch.setattr(pretraining_model, "CHUNK_TOKENS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(24, 16)
    weight, labels = torch.randn(50, 16) * 0.3, torch.randint(0, 50, (24,))
    results = []
    for chunked in (True, False):
        inputs, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunked:
            loss = pretraining_model._SummedCrossEntropy.apply(inputs, head, labels, dtype)
        else:
            loss = nn.functional.cross_entropy(inputs @ head.T, labels, reduction="sum")
        (loss * 0.25).backward()
        results.append((loss.detach(), inputs.grad, head.grad))
    for chunk, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunk, whole, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_bfloat16_weight_is_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_model, "CHUNK_TOKENS", 1)
    torch.manual_seed(0)
    hidden, labels = torch.randn(600, 16).bfloat16(), torch.randint(0, 20, (600,))
    head = (torch.randn(20, 16) * 0.1).bfloat16().requires_grad_()
    twin = head.detach().double().requires_grad_()
    pretraining_model._SummedCrossEntropy.apply(hidden, head, labels, torch.bfloat16).backward()
    nn.functional.cross_entropy(hidden.double() @ twin.T, labels, reduction="sum").backward()
    assert head.grad is not None
    assert twin.grad is not None
    assert head.grad.dtype == torch.bfloat16
    assert (head.grad - twin.grad).norm() < 4e-3 * twin.grad.norm()


@pytest.mark.slow
def test_bfloat16_and_compiled_blocks_train_the_same_up_to_rounding(
    trained: Training, untrained: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_ = nn.Module.compile

    def traced(self: nn.Module) -> None:
        compiled.append(self)
        compile_(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    losses = trained.curve(trained.config())["loss"]
    config = untrained.config(compile="on")
    # Rounding alone: the same training, whose results are not made twice.
    assert plan_of(untrained, config).key == plan_of(trained, trained.config()).key
    untrained.train(config)
    assert len(compiled) == 2
    np.testing.assert_allclose(untrained.curve(config)["loss"], losses, rtol=1e-4)
    low = untrained.config(precision="bfloat16", tokens=6 * BATCH_TOKENS, warm_up_share=0.3)
    high = untrained.config(tokens=6 * BATCH_TOKENS, warm_up_share=0.3)
    untrained.train(low)
    untrained.train(high)
    np.testing.assert_allclose(untrained.curve(low)["loss"], untrained.curve(high)["loss"], rtol=1e-2)
    assert untrained.curve(low) != untrained.curve(high)
    assert all(tensor.dtype == torch.float32 for tensor in untrained.weights(low).values())


def test_shapes_are_as_asked(untrained: Training) -> None:
    assert default_intermediate_size(series_of(untrained.config()).shape) == 96  # type: ignore[arg-type]
    shape = {"heads": 4, "kv_heads": 2, "intermediate_size": 40, "tie_embeddings": False, "rope_theta": 500.0}
    config = untrained.config(shape=shape, tokens=BATCH_TOKENS)
    untrained.train(config)
    weights = untrained.weights(config)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert weights["model.layers.1.mlp.up_proj.weight"].shape == (40, 32)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    # BOS, which may be the padding token too, is trained like any other.
    assert weights["model.embed_tokens.weight"].abs().sum(dim=1).min() > 0
    folder = plan_of(untrained, config).checkpoint_folder(1)
    assert untrained.storage.read_json(f"{folder}/config.json")["rope_parameters"]["rope_theta"] == 500.0


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12))
def test_processes_share_a_step_in_as_many_micro_batches(n_rows: int, processes: int, at_once: int) -> None:
    parts = [shares(n_rows, processes, index, at_once) for index in range(processes)]
    assert [row for process in parts for part in process for row in part] == list(range(n_rows))
    assert len({len(process) for process in parts}) == 1
    assert max(len(part) for process in parts for part in process) <= at_once


@given(st.integers(1, 50), st.integers(1, 5000), st.integers(2, 40))
def test_checkpoints_are_log_spaced(first: int, last: int, count: int) -> None:
    steps = log_spaced(first, last, count)
    assert steps[-1] == last
    if first >= last:
        assert steps == (last,)
        return
    assert steps[0] == first
    assert len(set(steps)) == len(steps) == min(count, last - first + 1)
    assert list(steps) == sorted(steps)
    # As near to the even spacing as integers that must differ can be.
    ideal = np.geomspace(first, last, len(steps))
    crowded = np.arange(len(steps)) + first
    assert all(
        step <= max(math.ceil(wanted), least)
        for step, wanted, least in zip(steps, ideal, crowded, strict=True)
    )


@pytest.mark.slow
def test_the_key_is_made_of_what_decides_the_weights(prepared: Training) -> None:
    key = plan_of(prepared, prepared.config()).key
    for same in (
        {"processes": 2, "fsdp": True, "compile": "on", "micro_batch_tokens": 64},
        {"checkpoints": 5, "first_checkpoint": 2, "state_every": 1, "context_size": 32},
    ):
        assert plan_of(prepared, prepared.config(**same)).key == key
    others = [
        prepared.config(seed=1),
        prepared.config(learning_rate=1e-3),
        prepared.config(batch_tokens=128),
        prepared.config(tokens=4000),
        prepared.config(beta2=0.99),
        prepared.config(precision="bfloat16"),
        prepared.config(precision="float32"),
        prepared.config(context_size=64),
        prepared.config(shape={"layers": 3}),
        prepared.config(sections={"windows": {"context_size": 32, "prepend_bos": False}}),
    ]
    shards = prepared.shards()
    keys = {plan_of(prepared, other).key for other in others}
    assert shards.eos_id is not None
    for changed in ({"tokenizer_key": "other"}, {"eos_id": shards.eos_id + 1}):
        keys.add(
            plan_training(prepared.config(), dataclasses.replace(shards, **changed), series_of(others[0])).key
        )
    assert len(keys) == len(others) + 2
    assert key not in keys


@pytest.mark.parametrize("module", [heldout, packing, pretraining_plan])
def test_other_held_out_documents_or_rows_are_another_training(
    prepared: Training, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    config = prepared.config()
    key = plan_of(prepared, config).key
    monkeypatch.setattr(module, "VERSION", -1)
    assert plan_of(prepared, config).key != key


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_machines_with_and_without_a_gpu_find_the_same_training(
    trained: Training, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    tokenizer = trained.config().model.tokenizer
    config = trained.config(sections={"model": {"tokenizer": tokenizer, "device": device}})
    key = plan_of(trained, trained.config()).key
    assert plan_of(trained, config).key == key
    assert trained.steps(config) == [1, 3, 7, 20]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    plan = plan_of(trained, config)
    assert (plan.device.type, plan.is_bfloat16) == ("cuda", True)
    assert plan.processes == (1 if device == "cuda:1" else 3)
    assert plan.key == key
    assert trained.steps(config) == [1, 3, 7, 20]


def test_compiles_only_where_there_is_a_compiler(
    prepared: Training, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compiles(asked: str, device: str) -> bool:
        model = prepared.config().model.model_copy(update={"device": device})
        plan = dataclasses.replace(plan_of(prepared, prepared.config(compile=asked)), model=model)
        return pretraining_trainer._is_compiled(plan, says_why=True)

    there: set[str] = set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pretraining_trainer.shutil, "which", lambda name: name if name in there else None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert not compiles("off", "cuda")
    assert not compiles("auto", "cpu")
    assert not caplog.records
    assert not compiles("auto", "cuda")
    assert "series small is trained without torch.compile" in caplog.text
    for device, language in (("cuda", "C compiler on cuda"), ("cpu", r"C\+\+ compiler on cpu")):
        with pytest.raises(ConfigError, match=rf"compile = on needs a {language}") as caught:
            compiles("on", device)
        assert "or set it to off" in str(caught.value)
    there.add("g++")
    assert compiles("on", "cpu")
    assert not compiles("auto", "cuda")
    there.add("clang")
    assert compiles("auto", "cuda")
    # It is the one that torch takes, there or not.
    monkeypatch.setenv("CC", "icx")
    assert not compiles("auto", "cuda")
    there.add("icx")
    assert compiles("auto", "cuda")


def test_says_that_one_process_shards_nothing(untrained: Training, caplog: pytest.LogCaptureFixture) -> None:
    untrained.train(untrained.config(fsdp=True, tokens=BATCH_TOKENS))
    assert "consolidation.train.fsdp does nothing for series small" in caplog.text
    caplog.clear()
    untrained.train(untrained.config(tokens=2 * BATCH_TOKENS))
    assert "fsdp" not in caplog.text


def test_says_how_many_epochs_a_small_corpus_makes(
    untrained: Training, caplog: pytest.LogCaptureFixture
) -> None:
    config = untrained.config()
    plan = plan_of(untrained, config)
    plan.warn_of_repeats(STEPS * BATCH_TOKENS)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        plan.warn_of_repeats(1000)
    assert "5,120 tokens are asked for and the training text has 1,000: it is shown 5.1 times" in caplog.text
    assert "repeats teach little" in caplog.text


@pytest.mark.slow
def test_refuses_what_does_not_fit(untrained: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"context_size = 16 is less than windows.context_size = 32"):
        untrained.train(untrained.config(context_size=16))
    with pytest.raises(ConfigError, match=r"batch_tokens = 31 is less than one row of 32 tokens"):
        untrained.train(untrained.config(batch_tokens=31))
    with pytest.raises(CorpusError, match=r"training tokens are fewer than one row of 100000"):
        untrained.train(untrained.config(context_size=100_000, batch_tokens=100_000))
    monkeypatch.setattr(pretraining_trainer.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        untrained.train(untrained.config(compile="on"))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining_trainer, "launched_processes", lambda: 2)
        with pytest.raises(ConfigError, match="accelerate shards over GPUs"):
            untrained.train(untrained.config(fsdp=True))
    tokenizer = load_tokenizer(untrained.config().model, untrained.storage)
    tokenizer.tokenizer.eos_token = None
    bare = dataclasses.replace(tokenizer, bos_id=None)
    monkeypatch.setattr(pretraining, "load_tokenizer", lambda *_: bare)
    with pytest.raises(ModelError, match="neither BOS nor EOS"):
        untrained.train(untrained.config())


def test_trains_with_an_eos_alone_and_without_bos_in_the_windows(untrained: Training) -> None:
    from transformers import AutoTokenizer

    folder = untrained.folder / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    config = untrained.config(
        tokens=2 * BATCH_TOKENS, sections={"windows": {"context_size": 32, "prepend_bos": False}}
    )
    untrained.train(config)
    loaded = load_tokenizer(config.model, untrained.storage)
    assert loaded.bos_id is None
    plan = plan_of(untrained, config)
    rows = pretraining_loop.packed_rows(config, untrained.storage, untrained.shards(), plan, loaded).rows(
        0, 40
    )
    eos = loaded.tokenizer.eos_token_id
    # EOS stands between documents; a row that begins inside one begins with its own token.
    assert (rows.input_ids == eos).sum() == (rows.position_ids[:, 1:] == 0).sum() + (
        rows.input_ids[:, 0] == eos
    ).sum()
    assert (rows.input_ids[:, 0] != eos).sum() > 30
    assert untrained.steps(config) == [1, 2]


def test_a_worker_tells_why_it_failed(untrained: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    path = untrained.folder / "config.json"
    path.write_text(as_written(untrained.config(), untrained.storage).model_dump_json())
    arguments = ["worker", str(path), "large", "--report", str(untrained.folder)]
    monkeypatch.setattr("sys.argv", arguments)
    assert _failure(untrained.folder) is None
    with pytest.raises(SystemExit):
        pretraining_worker.main()
    assert (untrained.folder / FAILURE).exists()
    failure = _failure(untrained.folder)
    assert isinstance(failure, ConfigError)
    assert failure.message == "there is no series large with a shape"


def test_a_configuration_goes_to_a_worker_as_it_was_written(tmp_path: Path) -> None:
    from infra.storage import Storage
    from tasks.corpus.tokenizer_training import train_tokenizer, with_tokenizer

    corpus = tiny.write_jsonl(tmp_path / "a.jsonl", tiny.texts(10))
    storage = Storage(str(tmp_path / "elsewhere"))
    config = Config.model_validate(
        {
            "corpus": {"urls": [str(corpus)]},
            "storage": {"root": str(tmp_path / "run")},
            "consolidation": {
                "series": [{"name": "small", "shape": {"hidden_size": 16, "layers": 2, "heads": 2}}],
                "train": {"tokens": 1000, "vocabulary_size": 300},
            },
        }
    )
    train_tokenizer(config, storage)
    resolved = with_tokenizer(config, storage)
    assert resolved is not None
    assert resolved.model.tokenizer
    written = Config.model_validate_json(as_written(resolved, storage).model_dump_json())
    assert written.model == config.model
    assert written.storage.root == storage.root
    assert written.consolidation == config.consolidation


@pytest.mark.slow
def test_a_series_is_found_only_when_all_of_it_is_there(trained: Training, tmp_path: Path) -> None:
    made = trained.copy(tmp_path / "copy")
    config = made.config()
    plan = plan_of(made, config)
    made.storage.delete(plan.checkpoint_folder(3))
    assert made.steps(config) is None
    made = trained.copy(tmp_path / "other")
    made.storage.delete(plan.folder)
    assert made.steps(config) is None
    with pytest.raises(FunctokError, match="the stage checkpoints is not finished"):
        made.run(config).result(CHECKPOINTS)
    made.train(config)
    assert made.steps(config) == [1, 3, 7, 20]
