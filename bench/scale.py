"""How each stage grows: its time and its memory at 1×, 4× and 16× its work, and the exponent of each.

One run with every stage and experiment, of a tiny random model over made-up texts, so that what a stage does itself
shows and not a forward; at 4× and 16× the same with as many times the documents, samples, cases, sequences and so on
(`WORK`). Each stage is a process of its own, with its libraries imported before the clock starts. It finds what the
stages before it have left, as a run does, and computes on one thread (matrices so small are not worth two),
tokenization too, without Dask's workers.

Memory is the process' peak above what it had when the stage began. `duckdb.memory_limit` is so small that tables are
made in several passes at 16×, as those of a corpus ten times as large are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.common import emit, figure, memory_gb, parser, say, spread
from schemas.config import Config

TIMES = (1, 4, 16)
"""The works that are compared; `exponent` needs a geometric series."""

WORK = {
    "tokenize": (256, "documents of 250 tokens"),
    "dictionary": (32_768, "samples of an SAE's training"),
    "features": (256, "documents"),
    "checkpoints": (32_768, "tokens of pre-training"),
    "losses": (256, "documents, of which a third is held out"),
    "growth": (256, "documents"),
    "generations": (4, "prompts"),
    "reactivation": (8, "cases"),
    "steering": (2, "experiments"),
    "retention_gate": (4, "sequences"),
    "retention": (4, "sequences"),
    "retrieval": (2, "prompts"),
    "checks of stages": (256, "documents and all else"),
    "tables of corpus": (256, "documents"),
    "tables of graph": (256, "documents"),
    "tables of features": (256, "documents"),
    "tables of steering": (8, "cases and experiments"),
    "tables of consolidation": (256, "documents"),
    "tables of retention": (4, "sequences"),
    "checks and publishing": (256, "documents and all else"),
    "report": (256, "documents and all else"),
    "status": (256, "documents and all else"),
}
"""What is measured, in the order in which it is made: how much at 1×, and of what, its work being linear in that."""

DOCUMENT_WORDS, WORDS, VOCABULARY = 230, 6_000, 8_192
LAYER, D_SAE, ACTIVE = 1, 1_024, 16
GROWTH_SAMPLES = 16_384
"""Of the SAE of `growth`, at all sizes: a longer training would change how many of its features are active."""

NOISE = {"seconds": 0.05, "cpu_seconds": 0.05, "memory_gb": 0.005}
"""Differences below these are none."""

TARGET = 1.1
PRELOAD = ["sae_lens", "transformers", "duckdb", "pandas", "great_expectations", "tasks.stages"]


def exponent(at: Sequence[float], least: float) -> float:
    """How something grows that was measured at 1×, 4× and 16× its work: p of a + b · work^p.

    The constant cancels in the differences: of 16× and 4×, and of 4× and 1×, the first is 4^p times the second. Where
    4× is no more than 1×, there is nothing to tell the constant by, and the slope of log(16× ÷ 4×) is taken, as if it
    were 0: what is the larger of a floor and a line has 1 by that. 0: it does not grow.

    >>> exponent([3 + 2 * work**1.5 for work in (1, 4, 16)], 0.0)
    1.5

    Args:
        at: The three values.
        least: Differences below it are none.
    """
    one, four, sixteen = at
    if sixteen - four <= least:
        return 0.0
    step = TIMES[1] / TIMES[0]
    rise = (sixteen - four) / (four - one) if four - one > least else sixteen / four
    return round(max(0.0, math.log(rise) / math.log(step)), 3)


def words() -> list[str]:
    """Made-up words, by rank."""
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    found = ["".join(some) for some in itertools.product(syllables, repeat=3)]
    np.random.default_rng(0).shuffle(found)
    return found[:WORDS]


def texts(n: int) -> list[str]:
    """Documents of equally many words, of a power law; the first of more are those of fewer."""
    weights = 1 / (np.arange(WORDS) + 10)
    drawn = np.random.default_rng(1).choice(WORDS, size=(n, DOCUMENT_WORDS), p=weights / weights.sum())
    known = words()
    return [" ".join(known[rank] for rank in document) for document in drawn]


def write_cases(path: Path, n_cases: int, n_experiments: int) -> None:
    """Cases of two prompts, two traits, and experiments that steer by one of them."""
    known = words()

    def prompt(number: int, differs: str) -> str:
        later = [known[0], known[50 + number % 70], known[1], known[120 + number % 30], known[2]]
        return " ".join([known[10 + number % 40], known[3], differs, *later])

    lines: list[str] = []
    for number in range(n_cases):
        prompts = [prompt(number, known[150 + (2 * number + which) % 60]) for which in range(2)]
        lines += [
            "[[case]]",
            f'name = "{number}"',
            f'relation = "{number % 4}"',
            f"prompts = {json.dumps(prompts)}",
        ]
    for trait in range(2):
        shown = [
            [prompt(3 * number, known[210 + 2 * trait + which]) for number in range(4)] for which in range(2)
        ]
        lines += ["[[trait]]", f'name = "{trait}"']
        lines += [f"positive = {json.dumps(shown[0])}", f"negative = {json.dumps(shown[1])}"]
    for number in range(n_experiments):
        lines += ["[[steer]]", f'traits = ["{number % 2}"]', f'prompt = "{prompt(number, known[220])}"']
        lines += [f'target = " {known[30 + number]}"']
    path.write_text("\n".join(lines))


def make_inputs(folder: Path, amount: Callable[[str], int]) -> None:
    """A corpus, cases and, where they are not there yet, model and dictionary beside them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    parts = folder.parent / "parts"
    if not parts.exists():
        tokenizer = tiny.save_tokenizer(parts / "model", texts(256), VOCABULARY)
        tiny.save_model(parts / "model", tokenizer=tokenizer)
        tiny.save_sae(parts / "sae", "topk", d_sae=D_SAE, k=ACTIVE)
    tiny.write_jsonl(folder / "corpus.jsonl", texts(amount("tokenize")))
    write_cases(folder / "cases.toml", amount("reactivation"), amount("steering"))


def configured(folder: Path, amount: Callable[[str], int], *, is_trained: bool = False) -> Config:
    """The run, or one on the same corpus whose dictionary is trained: its activations would grow with the training."""
    parts = folder.parent / "parts"
    gate = {"min_explained_variance": -1e9, "max_l0_deviation": 1e9, "min_alive_share": 0}
    train = {"d_sae": 256, "k": 8, "samples": amount("dictionary"), "max_tokens": 10**9, "gate": gate}
    known = words()
    spine = {
        "corpus": {"urls": [f"{folder}/corpus.jsonl"], "shard_tokens": 16_384},
        "model": {"name": f"{parts}/model", "device": "cpu", "threads": 1},
        "windows": {"context_size": 128},
        "sae": [{"layer": LAYER, "train": train} if is_trained else {"layer": LAYER, "path": f"{parts}/sae"}],
        "duckdb": {"memory_limit": "256MB", "threads": 1},
        "storage": {"root": f"{folder}/run"},
    }
    experiments = {
        "losses": {"max_tokens": None},
        "consolidation": {
            "series": [{"name": "tiny", "shape": {"hidden_size": 32, "layers": 2, "heads": 2}}],
            "train": {
                "tokens": amount("checkpoints"),
                "batch_tokens": 2_048,
                "checkpoints": 2,
                "processes": 1,
            },
            "heldout_share": 0.3,
            "growth": {
                "layer": 1,
                "checkpoints": 1,
                "train": {**train, "samples": GROWTH_SAMPLES},
                "max_tokens": 10**9,
            },
            "generations": {
                "prompts": [f"{known[0]} {word}" for word in known[: amount("generations")]],
                "max_new_tokens": 8,
            },
        },
        "steering": {
            "cases": f"{folder}/cases.toml",
            "chat_template": False,
            "modes": ["add"],
            "strengths": [2.0],
            "random_controls": 1,
            "max_new_tokens": 4,
        },
        "retention": {
            "policies": ["streaming", "random", "h2o", "str-gate"],
            "options": {"str-gate": {"policy": "str", "gate": True}},
            "budgets": [0.25],
            "chunk": 16,
            "sequences": [{"length": 96, "documents": amount("retention")}],
            "heldout_share": 0.3,
            "recent": 8,
            "gate_sequences": amount("retention_gate"),
            "gate_length": 96,
            "retrieval": {"tasks": ["passkey"], "lengths": [64], "depths": [0.5], "n": amount("retrieval")},
        },
    }
    return Config.model_validate(spine if is_trained else {**spine, **experiments})


def measured(step: str, folder: Path, amounts: Mapping[str, int]) -> dict[str, float]:
    """Do one step, in this process: its seconds on the clock and of CPU, and its memory in GB."""
    import torch

    from infra.storage import Storage
    from tasks import stages

    torch.set_num_threads(1)
    is_trained = step == "dictionary"
    config = configured(folder, amounts.__getitem__, is_trained=is_trained)
    storage = Storage(config.storage.root)
    for stage in stages.working_stages(config):
        for library in stage.libraries:
            import_module(library)
    work = _work(step, config, storage)
    had, started, cpu = memory_gb("VmRSS"), time.perf_counter(), sum(os.times()[:4])
    work()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": sum(os.times()[:4]) - cpu,
        "memory_gb": memory_gb() - had,
    }


def _work(step: str, config: Config, storage: Any) -> Callable[[], object]:
    """What is timed of a step; what it needs besides is imported or made here."""
    from tasks import stages
    from tasks.engine import checks, run, tables

    groups = {f"tables of {group.name}": group for group in stages.table_groups(config)}
    if step == "checks of stages":
        asked = stages.working_stages(config)
        return lambda: [checks.check(stages.open_run(config, storage), stage) for stage in asked]
    if step in groups:
        return lambda: groups[step].build(stages.open_run(config, storage))
    if step == "checks and publishing":
        of = stages.open_run(config, storage)
        catalog = tables.candidate(storage, [group.build(of) for group in groups.values()])

        def publish() -> None:
            checks.check_tables(config, storage, catalog, stages.beside(storage, catalog))
            tables.publish(storage, catalog)

        return publish
    if step == "report":
        return lambda: stages.write_report(storage, config)
    if step == "status":
        return lambda: stages.plan_run(config, storage)
    stage = stages.stage_named("dictionaries" if step == "dictionary" else step)

    def make() -> None:
        with patch.object(stage, "client", lambda *_: nullcontext()):
            run.make(stages.open_run(config, storage), stage)

    return make


def walk(
    folder: Path, share: float, times: int, steps: Collection[str] = tuple(WORK)
) -> dict[str, dict[str, float]]:
    """Make a run in `folder`, step by step, each in a process of its own; what each took.

    Args:
        folder: Is made; model and dictionary lie beside it.
        share: Of the work that is done by default.
        times: The work, times that at 1×.
        steps: Those of `WORK` that are made, all that they need among them.
    """
    amounts = {step: max(1, round(n * share)) * times for step, (n, _) in WORK.items()}
    folder.mkdir(parents=True)
    make_inputs(folder, amounts.__getitem__)
    context, found = multiprocessing.get_context("forkserver"), {}
    # Forks of one process that has the libraries: importing takes longer than most steps.
    context.set_forkserver_preload(PRELOAD)
    for step in (step for step in WORK if step in steps):
        # The run's own dictionary is one from disk.
        for name in ["dictionaries"] * (step == "features") + [step]:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found[step] = process.submit(measured, name, folder, amounts).result()
        say(f"{times}×  {step}: " + ", ".join(f"{value:.2f} {name}" for name, value in found[step].items()))
    return found


def compare(folder: Path, rounds: int, share: float, steps: Collection[str]) -> dict[str, Any]:
    """Make the runs, and say how each step grows; everything is written in `folder`."""
    chosen = [step for step in WORK if step in steps]
    found: dict[str, dict[str, list[list[float]]]] = {step: {name: [] for name in NOISE} for step in chosen}
    for number in range(rounds):
        walks = [walk(folder / f"{number + 1}-{times}", share, times, steps) for times in TIMES]
        for step, name in itertools.product(chosen, NOISE):
            found[step][name].append([of[step][name] for of in walks])
    grown = {
        step: {
            name: {
                "at": [round(median(column), 3) for column in zip(*values, strict=True)],
                "exponent": spread([exponent(value, NOISE[name]) for value in values]),
            }
            for name, values in of.items()
        }
        for step, of in found.items()
    }
    say(_table(grown))
    return {
        "figures": [
            figure(
                f"{step}: exponent of CPU seconds over {WORK[step][1]}",
                of["cpu_seconds"]["exponent"],
                "≤",
                TARGET,
            )
            for step, of in grown.items()
        ],
        "grown": grown,
        "limits": "each stage's own work: the model has three blocks of width 32",
    }


def _table(grown: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """What `bench/README.md` shows of it."""
    lines = [
        "| step | work at 1× | seconds at 1×, 4×, 16× | CPU seconds | exponent | GB of memory | exponent |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step, of in grown.items():
        n, unit = WORK[step]
        at = {name: ", ".join(f"{value:.3g}" for value in entry["at"]) for name, entry in of.items()}
        of_time, of_memory = (of[name]["exponent"]["median"] for name in ("cpu_seconds", "memory_gb"))
        cells = (step, f"{n:,} {unit}", at["seconds"], at["cpu_seconds"], f"{of_time:.2f}", at["memory_gb"])
        lines.append(f"| {' | '.join(cells)} | {of_memory:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    arguments = parser("scale", __doc__)
    arguments.set_defaults(rounds=1)
    arguments.add_argument("--share", type=float, default=1.0, help="of the work that is done by default")
    arguments.add_argument(
        "--steps",
        nargs="+",
        choices=WORK,
        default=list(WORK),
        help="these alone; name what they need as well",
    )
    chosen: argparse.Namespace = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as folder:
        emit("scale", compare(Path(folder), chosen.rounds, chosen.share, chosen.steps))


if __name__ == "__main__":
    main()
