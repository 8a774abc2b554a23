"""Extraction, encoding and writing against a bare loop that writes nothing, and against SAELens' own way.

All sides see the same windows in the same batches, with the same dictionaries, threads and float32, and
everything is loaded before the clock starts.

- `ours`: the stage `features` on finished token shards: reading the shards, batches, truncated forward, encoding,
  ordering, edges, Parquet, manifests.
- `bare_loop`: the same truncated forward over batches made beforehand, `addmm` and the threshold for
  each layer on the real positions; what comes out is dropped.
- `saelens_proxy`: `sae_lens.load_model.load_model("AutoModelForCausalLM", …)` gives SAELens' `HookedProxyLM` around
  the Hugging Face model; `run_with_cache(tokens, names_filter=hooks)` and `sae.encode(cache[hook])`, dense, dropped.
- `saelens_proxy_stopped`: the same with `stop_at_layer`, as SAELens' `ActivationsStore` calls it for training: no
  block after the deepest hook, no head. Not what its analysis tutorials do, but its best.

`HookedSAETransformer` itself takes only TransformerLens' list of official model names, where a local
model has no place.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.common import (
    Side,
    alternate,
    batched_corpus,
    emit,
    figure,
    parser_with_data,
    ratio,
    save_random_dictionaries,
    say,
    spread,
    times,
)
from infra.allocator import freed_memory_kept
from infra.storage import Storage
from schemas.config import Config
from schemas.work import FeatureShard
from tasks.corpus.windows import Batch


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare on the first `arguments.tokens` tokens of a corpus; everything is written under `root`."""
    from tasks.dictionaries.dictionaries import DICTIONARIES, load_dictionary
    from tasks.engine.run import Run, make
    from tasks.graph.extraction import _encoder, keep_for, loaded_model, loaded_tokenizer
    from tasks.graph.features import FEATURES
    from tasks.models.devices import choose_device

    batched = batched_corpus(arguments, root)
    storage, model, plan = batched.storage, batched.model, batched.plan
    given = {int(layer): path for layer, _, path in (entry.partition("=") for entry in arguments.sae)}
    layers = sorted(given) or sorted(arguments.layers)
    random = [layer for layer in layers if layer not in given]
    given |= save_random_dictionaries(batched, random, d_sae=arguments.d_sae, l0=arguments.l0)
    config = batched.with_dictionaries(given)
    run = Run(config, storage)
    dictionaries = make(run, DICTIONARIES)
    device = choose_device(config.model.device)
    saes = {entry.layer: load_dictionary(storage, entry, device) for entry in dictionaries}
    kept = [torch.from_numpy(batch.token >= 0) for batch in plan]
    inputs = [torch.from_numpy(batch.input_ids) for batch in plan]

    def load_ours() -> None:
        # What a run loads for its first part, and keeps for all others.
        storage.delete("features")
        run.forget(FEATURES)
        keep_for(model.key)
        loaded_model(config.model, storage)
        loaded_tokenizer(config.model, storage)
        for entry in dictionaries:
            _encoder(replace(entry, quality=None), storage, device)

    made: list[list[FeatureShard]] = []

    def ours() -> None:
        made.append(make(run, FEATURES))

    bare_weights = {layer: _folded(sae) for layer, sae in saes.items()}

    @freed_memory_kept()  # as the stage has it
    def bare() -> None:
        for ids, real in zip(inputs, kept, strict=True):

            def receive(layer: int, hidden: torch.Tensor, real: torch.Tensor = real) -> None:
                weight, bias, threshold = bare_weights[layer]
                before = torch.addmm(bias, hidden[real], weight)
                before.mul_(before > threshold)

            model.forward(ids, layers, receive)

    proxy = _Proxy(config, storage, saes, model.blocks, model.module)
    sides = [
        Side(name="ours", run=ours, prepare=load_ours),
        Side(name="bare_loop", run=bare),
        Side(name="saelens_proxy", run=lambda: proxy.encode_all(inputs, stopped=False)),
        Side(name="saelens_proxy_stopped", run=lambda: proxy.encode_all(inputs, stopped=True)),
    ]
    say("warming up on one batch")
    _check_same(config, storage, proxy, plan)
    cpu: dict[str, list[float]] = {}
    seconds = alternate(sides, arguments.rounds, cpu)
    sizes = _sizes(storage, made[-1])
    flops = _flops(model, saes, layers, plan)
    n_tokens = batched.part.n_tokens
    return {
        "figures": [
            figure(
                "extraction, encoding and writing: speed over a bare loop that writes nothing",
                ratio(seconds["bare_loop"], seconds["ours"]),
                "≥",
                0.9,
            ),
            figure(
                "extraction, encoding and writing: speed over SAELens' HF proxy with sae.encode",
                ratio(seconds["saelens_proxy"], seconds["ours"]),
                "≥",
                1.5,
            ),
            figure(
                "the same, over the proxy stopped after the deepest hook (ActivationsStore's way)",
                ratio(seconds["saelens_proxy_stopped"], seconds["ours"]),
            ),
            figure("activations: bytes per non-zero", spread([sizes["bytes_per_nonzero"]]), "≤", 4),
            figure("edges: bytes per edge", spread([sizes["bytes_per_edge"]]), "≤", 3),
        ],
        **times(seconds, cpu, n_tokens),
        "sizes": sizes,
        "input": {
            "tokens": n_tokens,
            "padded_tokens": sum(ids.numel() for ids in inputs),
            "batches": len(inputs),
            "context_size": config.windows.context_size,
            "layers": layers,
            "d_sae": {layer: int(sae.cfg.d_sae) for layer, sae in saes.items()},
            "dictionaries": "random, calibrated JumpReLU" if random else "given",
            "device": str(device),
            "dtype": str(model.dtype),
            "threads": torch.get_num_threads(),
        },
        "flops": flops
        | {
            "achieved_gflop_per_second": {
                "ours": _rate(flops["up_to_deepest"] + flops["encode"], inputs, seconds["ours"]),
                "bare_loop": _rate(flops["up_to_deepest"] + flops["encode"], inputs, seconds["bare_loop"]),
                "saelens_proxy": _rate(flops["whole"] + flops["encode"], inputs, seconds["saelens_proxy"]),
            },
            "sgemm_gflop_per_second": _sgemm(),
        },
        "limits": (
            "the forward's matrix products: flops.up_to_deepest a token of flops.up_to_deepest + flops.encode, at "
            "the rate in achieved_gflop_per_second, against sgemm_gflop_per_second of a large product alone"
        ),
    }


def _folded(sae: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = sae.W_enc.detach()
    bias = sae.b_enc.detach() - (sae.b_dec.detach() @ weight if sae.cfg.apply_b_dec_to_input else 0)
    threshold = getattr(sae, "threshold", torch.zeros(()))
    return weight, bias, threshold.detach().clamp(min=0)


class _Proxy:
    """SAELens' own wrapper of a Hugging Face model, hooked where the dictionaries read."""

    def __init__(
        self,
        config: Config,
        storage: Storage,
        saes: dict[int, Any],
        blocks: torch.nn.ModuleList,
        decoder: Any,
    ) -> None:
        from sae_lens.load_model import load_model as load_proxy
        from transformers import AutoModelForCausalLM

        from tasks.models.files import converted_gguf, is_gguf

        logging.getLogger("sae_lens").setLevel(logging.ERROR)
        folder = str(converted_gguf(config.model, storage)) if is_gguf(config.model) else config.model.name
        # The decoder's blocks have another prefix inside the model with its head.
        inner = next(name for name, module in decoder.named_modules() if module is blocks)
        prefix = f"{AutoModelForCausalLM.from_pretrained(folder).base_model_prefix}.{inner}"
        self.hooks = {layer: f"{prefix}.{layer}" for layer in saes}
        self._saes = saes
        self._model: Any = load_proxy(
            "AutoModelForCausalLM",
            folder,
            device="cpu",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            hook_names=list(self.hooks.values()),
        )
        self._model.eval()

    @torch.inference_mode()
    def encode(self, ids: torch.Tensor, *, stopped: bool) -> dict[int, torch.Tensor]:
        """Dense (windows, padded length, d_sae) features by layer."""
        stop = {"stop_at_layer": max(self.hooks) + 1} if stopped else {}
        _, cache = self._model.run_with_cache(ids, names_filter=list(self.hooks.values()), **stop)
        return {layer: self._saes[layer].encode(cache[hook]) for layer, hook in self.hooks.items()}

    def encode_all(self, inputs: Sequence[torch.Tensor], *, stopped: bool) -> None:
        """Every batch, results dropped."""
        for ids in inputs:
            self.encode(ids, stopped=stopped)


def _check_same(config: Config, storage: Storage, proxy: _Proxy, plan: Sequence[Batch]) -> None:
    """Make sure that ours and SAELens' way find the same features; what differs must not be compared."""
    from tasks.dictionaries.encoding import Encoder
    from tasks.graph.extraction import loaded_model

    batch = min(plan, key=lambda entry: entry.input_ids.size)
    ids, real = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.token >= 0)
    found: dict[int, torch.Tensor] = {}
    loaded_model(config.model, storage).forward(
        ids, list(proxy.hooks), lambda layer, hidden: found.__setitem__(layer, hidden[real])
    )
    for stopped in (False, True):
        for layer, dense in proxy.encode(ids, stopped=stopped).items():
            theirs = dense[real]
            sparse = Encoder(proxy._saes[layer], torch.device("cpu"))(found[layer])
            ours = torch.zeros_like(theirs).index_put((sparse.row, sparse.feature), sparse.value)
            differing = int(((ours > 0) != (theirs > 0)).sum())
            # Tokens that repeat have values as equal as rounding lets them be: some thresholds lie on those.
            if differing > 1e-3 * len(sparse.value):
                raise SystemExit(
                    f"layer {layer}: {differing} of {len(sparse.value)} active entries are not SAELens'"
                )


def _sizes(storage: Storage, made: list[FeatureShard]) -> dict[str, float]:
    size = {name: 0 for name in ("activations", "edges")}
    rows = {name: 0 for name in size}
    for shard in made:
        found = storage.sizes(shard.folder)
        for name in size:
            size[name] += found[f"{shard.folder}/{name}.parquet"]
        rows["activations"] += shard.n_activations
        rows["edges"] += storage.read_parquet(f"{shard.folder}/edges.parquet", columns=["n"]).num_rows
    tokens = sum(shard.part.n_tokens for shard in made)
    return {
        "nonzeros": rows["activations"],
        "edges": rows["edges"],
        "bytes_per_nonzero": round(size["activations"] / rows["activations"], 4),
        "bytes_per_edge": round(size["edges"] / rows["edges"], 4),
        "edge_bytes_per_nonzero": round(size["edges"] / rows["activations"], 4),
        "mean_l0": round(rows["activations"] / tokens, 2),
    }


def _flops(model: Any, saes: dict[int, Any], layers: list[int], plan: Sequence[Batch]) -> dict[str, float]:
    """Floating-point operations a padded token: 2 for each weight of a matrix, and causal attention."""
    config = model.module.config
    block = sum(2 * weight.numel() for weight in model.blocks[0].parameters() if weight.ndim == 2)
    padded = sum(batch.input_ids.size for batch in plan)
    squares = sum(batch.input_ids.shape[0] * batch.input_ids.shape[1] ** 2 for batch in plan)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or model.d_model // heads)
    # Scores and weighted values, 2 each for every earlier position: half the square.
    attention = 2 * 2 * width * squares / padded / 2
    return {
        "up_to_deepest": round((max(layers) + 1) * (block + attention)),
        "whole": round(model.n_layers * (block + attention) + 2 * model.d_model * config.vocab_size),
        "encode": float(sum(2 * model.d_model * int(sae.cfg.d_sae) for sae in saes.values())),
    }


def _rate(per_token: float, inputs: Sequence[torch.Tensor], seconds: list[float]) -> float:
    padded = sum(ids.numel() for ids in inputs)
    return float(round(per_token * padded / float(spread(seconds)["median"]) / 1e9, 1))


def _sgemm(size: int = 2048, repetitions: int = 5) -> dict[str, Any]:
    a, b = torch.ones(size, size), torch.ones(size, size)
    side = Side(name="sgemm", run=lambda: torch.mm(a, b))
    side.run()
    return spread([2 * size**3 / second / 1e9 for second in alternate([side], repetitions)["sgemm"]])


def main() -> None:
    """Command line."""
    arguments = parser_with_data("extraction", __doc__)
    arguments.add_argument("--tokens", type=int, default=6000, help="corpus tokens at most")
    arguments.add_argument("--layers", type=int, nargs="+", default=[7, 15, 22], help="decoder blocks")
    arguments.add_argument("--d-sae", type=int, default=4096, help="latents of a random dictionary")
    arguments.add_argument(
        "--l0", type=float, default=48, help="active latents a token of a random dictionary"
    )
    arguments.add_argument("--context-size", type=int, default=1024, help="tokens a window, BOS included")
    arguments.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="LAYER=PATH",
        help="a dictionary saved by SAELens instead of random ones; repeat for more layers",
    )
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("extraction", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
