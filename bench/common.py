"""What every bench shares: alternated repetitions, their summary, the machine, and the one JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from infra.cluster import available_cores
from infra.storage import Storage
from schemas.config import Config
from schemas.sections import Sae
from schemas.work import GraphShard

if TYPE_CHECKING:
    import torch

    from tasks.corpus.windows import Batch

ASSETS = Path("assets")
MODEL = ASSETS / "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = f"zip://NewsArticles.csv::{ASSETS}/NewsArticles.zip"
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sae-lens",
    "transformer-lens",
    "prefect",
    "dask",
    "duckdb",
    "pyarrow",
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the things compared.

    Attributes:
        name: Its name in the JSON.
        run: What is timed.
        prepare: Called before each repetition, not timed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def alternate(
    sides: Sequence[Side], rounds: int, cpu: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each side, one of each a round (A B C A B C …), so that a slow minute slows all alike.

    Args:
        sides: What is compared.
        rounds: How often.
        cpu: Filled with the CPU seconds of this process and all its threads, which a busy machine disturbs
            less than the seconds on the clock.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for index in range(rounds):
        for side in sides:
            side.prepare()
            gc.collect()
            started, started_cpu = time.perf_counter(), time.process_time()
            side.run()
            seconds[side.name].append(time.perf_counter() - started)
            if cpu is not None:
                cpu.setdefault(side.name, []).append(time.process_time() - started_cpu)
            say(f"round {index + 1}/{rounds}  {side.name}: {seconds[side.name][-1]:.2f} s")
    return seconds


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of some measurements, and how many there were."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "n": len(values),
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """The spread of `over / under`, round by round: both saw the same minute of the machine."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def figure(
    what: str,
    measured: Mapping[str, Any],
    comparison: Literal["≥", "≤", ""] = "",
    target: float | None = None,
) -> dict[str, Any]:
    """A row of the table in `bench/README.md`: what, its spread, and the target it has or has not met."""
    row: dict[str, Any] = {"what": what, **measured}
    if target is not None:
        row |= {
            "target": f"{comparison} {target:g}",
            "met": measured["median"] >= target if comparison == "≥" else measured["median"] <= target,
        }
    return row


def times(
    seconds: Mapping[str, Sequence[float]], cpu: Mapping[str, Sequence[float]], tokens: int
) -> dict[str, Any]:
    """What every comparison reports of its sides: seconds on the clock, CPU seconds, and tokens a second."""
    spreads = {name: spread(values) for name, values in seconds.items()}
    return {
        "seconds": spreads,
        "cpu_seconds": {name: spread(values) for name, values in cpu.items()},
        "tokens_per_second": {name: round(tokens / found["median"]) for name, found in spreads.items()},
    }


def memory_gb(which: str = "VmHWM") -> float:
    """Resident memory of this process, in GB: its peak, or what it is now (`VmRSS`).

    Read from the process' own address space: `getrusage` would pass on what the parent had before it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s*(\d+) kB", status)[1]) * 1024 / 1e9  # type: ignore[index]  # always there


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, versions and the date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model,
        "cores": available_cores(),
        "memory_gib": round(memory, 1),
        "load_at_start": [round(load, 2) for load in _LOAD],
        "versions": versions,
        "date": date.today().isoformat(),
    }


# Taken at import, before the bench itself is the load: it tells whether the machine was quiet.
_LOAD = os.getloadavg()


def parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments that every bench has."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{bench}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("--rounds", type=int, default=5, help="repetitions of each side")
    return made


def parser_with_data(bench: str, description: str | None) -> argparse.ArgumentParser:
    """The arguments of a bench on a model and a corpus; the defaults are the demo's (`make assets`)."""
    made = parser(bench, description)
    made.add_argument("--model", default=str(MODEL), help="a local directory or a .gguf file")
    made.add_argument("--corpus", default=CORPUS, help="fsspec URL of one corpus file")
    made.add_argument("--text-field", default="text", help="its column or key with the text")
    return made


def config_with_data(
    arguments: argparse.Namespace, root: str, corpus: Mapping[str, Any], **sections: Any
) -> Config:
    """The configuration of a bench on a corpus, everything under `root`; `sections` are further ones."""
    return Config.model_validate(
        {
            "corpus": {"urls": [arguments.corpus], "text_field": arguments.text_field, **corpus},
            "storage": {"root": root},
            "dask": {"workers": 1},
            **sections,
        }
    )


@dataclass(frozen=True, kw_only=True)
class BatchedCorpus:
    """A corpus in batches of windows, and its model.

    Attributes:
        config: Of the corpus and the model; without dictionaries.
        storage: Its root.
        model: Loaded.
        part: What of the corpus is read.
        plan: Its batches.
    """

    config: Config
    storage: Storage
    model: Any
    part: GraphShard
    plan: Sequence[Batch]

    def with_dictionaries(self, paths: Mapping[int, str]) -> Config:
        """The configuration, with the dictionary of each layer at its path."""
        saes = [Sae(layer=layer, path=path) for layer, path in sorted(paths.items())]
        return self.config.model_copy(update={"sae": saes})


def batched_corpus(arguments: argparse.Namespace, root: str, **model: Any) -> BatchedCorpus:
    """The first `arguments.tokens` tokens of a corpus, tokenized, in windows of `arguments.context_size`.

    Args:
        arguments: Those of `parser_with_data`, and these two.
        root: Where everything is written.
        model: Further settings of the model.
    """
    from tasks.corpus.graph_documents import graph_shards
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.corpus.windows import read_shard_tokens
    from tasks.dictionaries.residuals import shard_batches
    from tasks.engine.run import Run, make
    from tasks.graph.extraction import loaded_model, loaded_tokenizer

    storage = Storage(root)
    config = config_with_data(
        arguments,
        root,
        {"max_tokens": arguments.tokens},
        model={"name": arguments.model, **model},
        windows={"context_size": arguments.context_size},
    )
    say("tokenizing, and converting the model where needed")
    shards = make(Run(config, storage), TOKENIZE)
    loaded = loaded_model(config.model, storage)
    tokenizer = loaded_tokenizer(config.model, storage)
    (part,) = graph_shards(config, shards, storage)
    plan = shard_batches(config, read_shard_tokens(storage, part), tokenizer)
    return BatchedCorpus(config=config, storage=storage, model=loaded, part=part, plan=plan)


def save_random_dictionaries(
    batched: BatchedCorpus, layers: Sequence[int], *, d_sae: int, l0: float
) -> dict[int, str]:
    """Save a random dictionary of each layer below the root, calibrated on the corpus; their folders by layer.

    Args:
        batched: The corpus. Its middle batch, whose windows are of middling length, is what they are calibrated on.
        layers: Decoder blocks.
        d_sae: Number of latents.
        l0: Mean number of active latents a token.
    """
    import torch

    residuals: dict[int, torch.Tensor] = {}
    if layers:
        batch = batched.plan[len(batched.plan) // 2]
        real = torch.from_numpy(batch.token >= 0)
        batched.model.forward(
            torch.from_numpy(batch.input_ids),
            list(layers),
            lambda layer, hidden: residuals.__setitem__(layer, hidden[real].clone()),
        )
    folders = {}
    for layer, of_layer in residuals.items():
        say(f"layer {layer}: calibrating a random dictionary on {len(of_layer)} residuals")
        folder = Path(batched.config.storage.root, "given", str(layer))
        _save_random_dictionary(folder, of_layer, d_sae=d_sae, l0=l0, seed=layer)
        folders[layer] = str(folder)
    return folders


def _save_random_dictionary(
    folder: Path, residuals: torch.Tensor, *, d_sae: int, l0: float, seed: int
) -> None:
    """Save a random JumpReLU dictionary in SAELens' format, whose every latent fires as often as asked.

    Directions are uniform on the sphere, `b_dec` is the mean residual, and each latent's threshold is its own
    (1 - l0 / d_sae) quantile over the residuals given: as dense as a trained dictionary's features are on
    average, and as costly to encode with; but no more uneven than the text is.

    Args:
        folder: Where.
        residuals: (n, d_model), n at least 2, of the layer that it reads, to calibrate the thresholds.
        d_sae: Number of latents.
        l0: Mean number of active latents a token.
        seed: Of the directions.
    """
    import torch
    from sae_lens import SAE

    x = residuals.to(torch.float32)
    sae: Any = SAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": x.shape[1],
            "d_sae": d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "metadata": {},
        }
    )
    directions = torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc.zero_()
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        before = (x - sae.b_dec) @ sae.W_enc
        # Half-way to the next value: a threshold that is a value itself flips with the last bit of a sum.
        rank = min(len(x) - 1, max(1, round(len(x) * (1 - l0 / d_sae))))
        below, above = (before.kthvalue(k, dim=0).values for k in (rank, rank + 1))
        sae.threshold.copy_(((below + above) / 2).clamp(min=1e-3))
    sae.save_model(str(folder))


def emit(bench: str, report: Mapping[str, Any]) -> None:
    """Print the one JSON object on stdout."""
    print(
        json.dumps(
            {"bench": bench, "command": [f"bench.{bench}", *sys.argv[1:]], "machine": machine(), **report},
            ensure_ascii=False,
            indent=2,
        )
    )
