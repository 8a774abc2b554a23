"""Losses of held-out documents against a bare loop of forward and cross-entropy that writes nothing.

All sides see the same windows in the same padded batches, with the same weights, threads and dtype, and the model
and tokenizer are loaded before the clock starts.

- `ours`: the stage `losses` on finished token shards: reading the shards, batches, the decoder, the head in
  chunks over the predictions that count, ordering, Parquet, manifests.
- `bare_loop`: `module(input_ids).logits` whole and `cross_entropy` over batches made beforehand, padding included; the
  losses are dropped.
- `bare_forward`: the same without the cross-entropy.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any
from unittest.mock import patch

import torch

from bench.common import Side, alternate, config_with_data, emit, figure, parser_with_data, ratio, say, times
from infra.allocator import freed_memory_kept
from infra.storage import Storage
from schemas.pretraining.work import LossShard


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare on the first `arguments.tokens` tokens of a corpus; everything is written under `root`."""
    from schemas.pretraining.work import Checkpoint
    from tasks.corpus.heldout import heldout_parts
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.corpus.windows import read_heldout_tokens
    from tasks.dictionaries.residuals import shard_batches
    from tasks.engine.run import Run, make
    from tasks.models.model import model_key
    from tasks.pretraining import losses
    from tasks.pretraining.checkpoints import CHECKPOINTS
    from tasks.pretraining.loading import open_checkpoint

    class OfOneCheckpoint(Run):
        """A run whose only checkpoint is the model of the bench."""

        def is_finished(self, stage: Any) -> bool:
            return stage is CHECKPOINTS or super().is_finished(stage)

        def result(self, stage: Any) -> Any:
            return [checkpoint] if stage is CHECKPOINTS else super().result(stage)

    storage = Storage(root)
    config = config_with_data(
        arguments,
        root,
        {"max_tokens": arguments.tokens},
        model={"name": arguments.model},
        windows={"context_size": arguments.context_size},
        # Every document is held out; the series is never looked for.
        consolidation={"heldout_share": 1.0, "series": [{"name": "bench", "folder": root}]},
        losses={"max_tokens": None},
    )
    say("tokenizing, and converting the model where needed")
    shards = make(Run(config, storage), TOKENIZE)
    checkpoint = Checkpoint(series="bench", step=0, model=config.model, key=model_key(config.model, storage))
    model, tokenizer = open_checkpoint(config, storage, checkpoint)
    plan = [
        batch
        for part in heldout_parts(config, storage, shards, None)
        for batch in shard_batches(config, read_heldout_tokens(storage, part), tokenizer)
    ]
    inputs = [torch.from_numpy(batch.input_ids).to(model.device) for batch in plan]
    counted = [torch.from_numpy((batch.token[:, :-1] >= 0) & (batch.token[:, 1:] >= 0)) for batch in plan]
    made: list[list[LossShard]] = []
    sums: list[float] = []

    def ours() -> None:
        made.append(make(OfOneCheckpoint(config, storage), losses.LOSSES))

    @freed_memory_kept()  # as the stage has it
    @torch.inference_mode()
    def bare() -> None:
        total = 0.0
        for ids, real in zip(inputs, counted, strict=True):
            logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1].float()
            found = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            total += float(found.view(real.shape).cpu()[real].double().sum())
        sums.append(total)

    @freed_memory_kept()  # as the stage has it
    @torch.inference_mode()
    def forward() -> None:
        for ids in inputs:
            model.module(input_ids=ids, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    sides = [
        Side(name="ours", run=ours, prepare=lambda: storage.delete("losses")),
        Side(name="bare_loop", run=bare),
        Side(name="bare_forward", run=forward),
    ]
    say("warming up")
    forward()
    cpu: dict[str, list[float]] = {}
    # Loading is no part of what is compared.
    with patch.object(losses, "open_checkpoint", lambda *_: (model, tokenizer)):
        seconds = alternate(sides, arguments.rounds, cpu)
    _check_same(storage, made[-1], sums[-1])
    n_tokens = sum(shard.part.n_tokens for shard in made[-1])
    return {
        "figures": [
            figure(
                "losses: speed over a bare loop of forward and cross-entropy that writes nothing",
                ratio(seconds["bare_loop"], seconds["ours"]),
                "≥",
                0.9,
            ),
            figure(
                "losses: speed over a bare forward whose logits are dropped",
                ratio(seconds["bare_forward"], seconds["ours"]),
            ),
        ],
        **times(seconds, cpu, n_tokens),
        "input": {
            "tokens": n_tokens,
            "predictions": sum(shard.n_predictions for shard in made[-1]),
            "padded_tokens": sum(ids.numel() for ids in inputs),
            "batches": len(inputs),
            "context_size": config.windows.context_size,
            "vocabulary": model.vocabulary,
            "device": str(model.device),
            "dtype": str(model.dtype),
            "threads": torch.get_num_threads(),
        },
        "limits": "the matrix products of decoder and head, and the softmax over the vocabulary, a row a prediction",
    }


def _check_same(storage: Storage, made: list[LossShard], total: float) -> None:
    """Make sure that both sides find the same losses; what differs must not be compared."""
    found = [
        storage.read_parquet(f"{shard.folder}/token_losses.parquet")["loss"].to_numpy() for shard in made
    ]
    ours, n = sum(float(part.astype("float64").sum()) for part in found), sum(map(len, found))
    if not abs(ours - total) <= 1e-3 * n:
        raise SystemExit(f"the mean loss is {ours / n:.5f} here and {total / n:.5f} in the bare loop")


def main() -> None:
    """Command line."""
    arguments = parser_with_data("losses", __doc__)
    arguments.add_argument("--tokens", type=int, default=6000, help="corpus tokens at most")
    arguments.add_argument("--context-size", type=int, default=1024, help="tokens a window, BOS included")
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("losses", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
