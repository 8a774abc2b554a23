"""Pre-training's tokens/s against a bare PyTorch loop of the same model, optimizer and rows.

All sides see the same packed rows with the same initial weights, threads and float32; the model is built before the
clock starts.

- `ours`: `Trainer.step`, the loop of `train_series`: making the rows, forward, loss, backward, clipping, AdamW.
- `bare_loop`: the same `LlamaForCausalLM` over rows made beforehand, `F.cross_entropy` on its logits, backward,
  `clip_grad_norm_`, the same fused AdamW; nothing else.
- `train_series`: the whole: also building the model, reading the losses, and saving a state and two checkpoints, which
  weighs more in so few steps than in a real training.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from typing import Any

import torch

from bench.common import (
    CORPUS,
    Side,
    alternate,
    config_with_data,
    emit,
    figure,
    parser,
    ratio,
    say,
    spread,
    times,
)
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import consolidation_of
from tasks.pretraining.packing import Rows
from tasks.pretraining.plan import TrainingPlan


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare on a corpus' first documents; everything is written under `root`."""
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.corpus.tokenizer_training import train_tokenizer, with_tokenizer
    from tasks.engine.run import Run, make
    from tasks.models.devices import prepared_device
    from tasks.models.tokenizers import load_tokenizer
    from tasks.pretraining.loop import packed_rows
    from tasks.pretraining.model import build_model, count_parameters
    from tasks.pretraining.plan import plan_training
    from tasks.pretraining.trainer import Trainer
    from tasks.pretraining.training import train_series

    storage, asked = Storage(root), _config(arguments, root)
    say("training the tokenizer and tokenizing")
    train_tokenizer(asked, storage)
    config = with_tokenizer(asked, storage)
    assert config is not None
    shards = make(Run(config, storage), TOKENIZE)
    (series,) = consolidation_of(config).series
    plan = plan_training(config, shards, series)
    tokenizer = load_tokenizer(config.model, storage)
    prepared_device(config.model)
    rows = packed_rows(config, storage, shards, plan, tokenizer)
    made = [rows.rows(step * plan.rows_per_step, plan.rows_per_step) for step in range(plan.steps)]
    last: dict[str, float] = {}
    held: dict[str, Any] = {}

    def fresh() -> Any:
        torch.manual_seed(plan.train.seed)
        return build_model(plan, tokenizer)

    def prepare_ours() -> None:
        held["trainer"] = Trainer(plan, rows, fresh())

    def ours() -> None:
        for step in range(1, plan.steps + 1):
            loss, _ = held["trainer"].step(step)
        last["ours"] = float(loss)

    def prepare_bare() -> None:
        held["model"] = fresh()

    def bare() -> None:
        last["bare_loop"] = _bare_loop(held["model"], plan, made)

    def prepare_whole() -> None:
        for folder in ("training", "checkpoints"):
            storage.delete(folder)

    sides = [
        Side(name="ours", run=ours, prepare=prepare_ours),
        Side(name="bare_loop", run=bare, prepare=prepare_bare),
        Side(
            name="train_series",
            run=lambda: train_series(config, storage, shards, plan),
            prepare=prepare_whole,
        ),
    ]
    say("warming up on one step")
    prepare_ours()
    held["trainer"].step(1)
    cpu: dict[str, list[float]] = {}
    seconds = alternate(sides, arguments.rounds, cpu)
    if not math.isclose(last["ours"], last["bare_loop"], rel_tol=1e-3):
        raise SystemExit(f"the loops do not train the same: losses {last}")
    n_tokens = plan.steps * plan.step_tokens
    flop = _flop_per_token(held["model"], plan)
    return {
        "figures": [
            figure(
                "pre-training: tokens/s over a bare loop of the same model and optimizer",
                ratio(seconds["bare_loop"], seconds["ours"]),
                "≥",
                0.9,
            ),
            figure(
                "the same, with building the model, a state and two checkpoints in so few steps",
                ratio(seconds["bare_loop"], seconds["train_series"]),
            ),
        ],
        **times(seconds, cpu, n_tokens),
        "last_loss": last,
        "input": {
            "tokens": n_tokens,
            "steps": plan.steps,
            "batch_tokens": plan.step_tokens,
            "context_size": plan.context_size,
            "vocabulary": tokenizer.highest_id + 1,
            "parameters": count_parameters(held["model"]),
            "threads": torch.get_num_threads(),
        },
        "flops": {
            "per_token": flop,
            "achieved_gflop_per_second": {
                name: round(flop * n_tokens / spread(values)["median"] / 1e9, 1)
                for name, values in seconds.items()
            },
        },
        "limits": (
            "matrix products in float32 on all cores; the head's loss and gradient are taken in chunks, which is "
            "where ours can be faster than the bare loop"
        ),
    }


def _bare_loop(model: Any, plan: TrainingPlan, made: list[Rows]) -> float:
    from tasks.pretraining.model import make_optimizer

    optimizer = make_optimizer(model, plan.train)
    for step, rows in enumerate(made, start=1):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        logits = model(
            input_ids=torch.from_numpy(rows.input_ids),
            position_ids=torch.from_numpy(rows.position_ids),
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(rows.labels).flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.train.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss)


def _flop_per_token(model: Any, plan: TrainingPlan) -> int:
    """Forward and backward: six a weight of a matrix product, twelve a pair of positions and width in each block."""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    if not plan.shape.tie_embeddings:
        weights -= model.model.embed_tokens.weight.numel()
    return 6 * weights + 12 * plan.shape.layers * plan.shape.hidden_size * plan.context_size


def _config(arguments: argparse.Namespace, root: str) -> Config:
    shape = {"hidden_size": arguments.hidden_size, "layers": arguments.layers, "heads": arguments.heads}
    train = {
        "tokens": arguments.steps * arguments.batch_tokens,
        "batch_tokens": arguments.batch_tokens,
        "vocabulary_size": arguments.vocabulary,
        "checkpoints": 2,
        "first_checkpoint": max(1, arguments.steps // 2),
    }
    return config_with_data(
        arguments,
        root,
        {"max_documents": arguments.documents, "max_reject_share": 1.0},
        model={"device": "cpu"},
        windows={"context_size": arguments.context_size},
        consolidation={"series": [{"name": "bench", "shape": shape}], "train": train},
    )


def main() -> None:
    """Command line."""
    arguments = parser("training", __doc__)
    arguments.add_argument("--corpus", default=CORPUS, help="fsspec URL of one corpus file")
    arguments.add_argument("--text-field", default="text", help="its column or key with the text")
    arguments.add_argument("--documents", type=int, default=500, help="first documents only")
    arguments.add_argument(
        "--vocabulary", type=int, default=4096, help="size of the tokenizer trained on them"
    )
    arguments.add_argument("--hidden-size", type=int, default=256)
    arguments.add_argument("--layers", type=int, default=6)
    arguments.add_argument("--heads", type=int, default=4)
    arguments.add_argument("--context-size", type=int, default=256)
    arguments.add_argument("--batch-tokens", type=int, default=8192)
    arguments.add_argument("--steps", type=int, default=5, help="optimizer steps of a repetition")
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("training", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
