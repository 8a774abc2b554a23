"""functok beside its peers: delphi's `LatentCache` and SAELens, each a process of its own, asked in turns.

All read the same windows in the same batches, with the same model, dictionaries, threads and float32, and have loaded
everything before the clock starts. Each writes what it keeps, the way it does: functok its feature shards, delphi its
splits (`save_splits`), SAELens nothing, for it has no such file. Before that, all must find the same latents active.

delphi runs in an environment of its own, made once by `venv` and pip, without its packages for explaining and serving
(vllm, bitsandbytes, flask), which caching does not import: `bench.peers_worker` says what each side does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
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
)

DELPHI = "0.1.3"
NEEDS = (
    "jaxtyping",
    "simple_parsing",
    "orjson",
    "faiss-cpu",
    "sentence-transformers",
    "blobfile",
    "asyncer",
    "eai-sparsify",
    "datasets",
)
"""What `delphi.latents` imports."""

SIDES = ("functok", "delphi", "saelens", "saelens_stopped")


class Worker:
    """One side's process.

    Args:
        side: One of `SIDES`.
        python: Of its environment.
        given: What `bench.peers_worker` reads.
    """

    def __init__(self, side: str, python: str, given: Path) -> None:
        worker = Path(__file__).with_name("peers_worker.py")
        self.side = side
        self._process = subprocess.Popen(
            [python, worker, side, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )
        self._read()

    def ask(self, what: str) -> Any:
        """The answer to `support`, `prepare`, `run` or `end`.

        Raises:
            SystemExit: if the process ends before it answers.
        """
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side} ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def environment(folder: Path) -> str:
    """The Python of an environment with delphi, made where there is none yet."""
    python = folder / "bin" / "python"
    if not list(folder.glob(f"lib/python*/site-packages/eai_delphi-{DELPHI}.dist-info")):
        say(f"making an environment with delphi {DELPHI} in {folder}")
        venv.create(folder, with_pip=True, clear=True)
        # The same PyTorch and transformers, whatever they are built for: their speed is not what is compared.
        same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "transformers")]
        for wanted in ([*same, *NEEDS], ["--no-deps", f"eai-delphi=={DELPHI}"]):
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr
            )
    return str(python)


def prepare(arguments: argparse.Namespace, root: str, d_sae: int) -> tuple[dict[str, Any], int]:
    """Tokens, model, windows and dictionaries in files; what workers are told, and the number of tokens."""
    from tasks.dictionaries.dictionaries import DICTIONARIES
    from tasks.engine.run import Run, make
    from tasks.models.files import converted_gguf, is_gguf

    batched = batched_corpus(arguments, root, threads=arguments.threads)
    storage, model, plan = batched.storage, batched.model, batched.plan
    saes = save_random_dictionaries(batched, arguments.layers, d_sae=d_sae, l0=arguments.l0)
    config = batched.with_dictionaries(saes)
    make(Run(config, storage), DICTIONARIES)
    inner = next(name for name, module in model.module.named_modules() if module is model.blocks)
    given = {
        "root": root,
        "config": config.model_dump(mode="json"),
        "folder": str(converted_gguf(config.model, storage)) if is_gguf(config.model) else arguments.model,
        "inner": inner,
        "saes": saes,
        "threads": torch.get_num_threads(),
        "windows": str(Path(root, "windows.npz")),
        "scratch": str(Path(root, "peers")),
    }
    np.savez(
        given["windows"],
        **{f"ids_{place}": batch.input_ids for place, batch in enumerate(plan)},
        **{f"real_{place}": batch.token >= 0 for place, batch in enumerate(plan)},
    )
    return given, batched.part.n_tokens


def compare(arguments: argparse.Namespace, root: str, d_sae: int) -> dict[str, Any]:
    """All sides on dictionaries of one width."""
    say(f"{d_sae:,} latents: tokenizing, calibrating dictionaries")
    given, n_tokens = prepare(arguments, root, d_sae)
    place = Path(root, "given.json")
    place.write_text(json.dumps(given))
    python = environment(arguments.environment)
    with ExitStack() as stack:
        workers = {}
        for side in SIDES:
            workers[side] = Worker(side, python if side == "delphi" else sys.executable, place)
            stack.callback(workers[side].close)
        differing = _differing({side: worker.ask("support") for side, worker in workers.items()})
        seconds = alternate(
            [
                Side(name=side, run=partial(worker.ask, "run"), prepare=partial(worker.ask, "prepare"))
                for side, worker in workers.items()
            ],
            arguments.rounds,
        )
        ends = {side: worker.ask("end") for side, worker in workers.items()}
    peak = {side: end["peak_mib"] for side, end in ends.items()}
    others = [side for side in SIDES if side != "functok"]
    target = 1.5 if d_sae <= 4096 else 2
    figures = [
        figure(
            f"{d_sae:,} latents: tokens a second over {side}’s",
            ratio(seconds[side], seconds["functok"]),
            *(() if side == "saelens_stopped" else ("≥", target)),
        )
        for side in others
    ]
    figures += [
        figure(
            f"{d_sae:,} latents: peak memory over {side}’s",
            spread([peak["functok"] / peak[side]]),
            *(() if side == "saelens_stopped" else ("≤", 1)),
        )
        for side in others
    ]
    written = {side: end["bytes"] / end["nonzeros"] for side, end in ends.items() if end["bytes"]}
    figures.append(
        figure(
            f"{d_sae:,} latents: bytes written a non-zero over delphi’s",
            spread([written["functok"] / written["delphi"]]),
        )
    )
    return {
        "figures": figures,
        "d_sae": d_sae,
        "tokens": n_tokens,
        "tokens_per_second": {side: round(n_tokens / spread(of)["median"]) for side, of in seconds.items()},
        "seconds": {side: spread(of) for side, of in seconds.items()},
        "peak_mib": peak,
        "bytes_a_nonzero": {side: round(value, 3) for side, value in written.items()},
        "nonzeros": {side: end["nonzeros"] for side, end in ends.items()},
        "differing_of_a_batch": differing,
    }


def _differing(found: dict[str, list[list[int]]]) -> dict[str, float]:
    """Share of a batch's active entries that another side has and functok has not, or the reverse.

    Raises:
        SystemExit: if that is more than one in a thousand: what differs must not be compared.
    """
    ours = {tuple(entry) for entry in found["functok"]}
    shares = {}
    for side, entries in found.items():
        theirs = {tuple(entry) for entry in entries}
        shares[side] = len(ours ^ theirs) / max(1, len(ours))
        # Tokens that repeat have values as equal as rounding lets them be: some thresholds lie on those.
        if shares[side] > 1e-3:
            raise SystemExit(f"{side}: {len(ours ^ theirs)} of {len(ours)} active entries are not functok's")
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    made = parser_with_data("peers", __doc__)
    made.add_argument("--tokens", type=int, default=6000, help="corpus tokens at most")
    made.add_argument("--layers", type=int, nargs="+", default=[7, 15, 22], help="decoder blocks")
    made.add_argument("--d-sae", type=int, nargs="+", default=[4096, 65536], help="latents of a dictionary")
    made.add_argument("--l0", type=float, default=48, help="active latents a token")
    made.add_argument("--context-size", type=int, default=1024, help="tokens a window, BOS included")
    made.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: all cores")
    made.add_argument(
        "--environment", type=Path, default=Path("runs/delphi-environment"), help="of delphi, made once"
    )
    chosen = made.parse_args(arguments)
    compared = []
    for d_sae in chosen.d_sae:
        with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
            compared.append(compare(chosen, root, d_sae))
    emit(
        "peers",
        {
            "figures": [row for one in compared for row in one.pop("figures")],
            "compared": compared,
            "delphi": DELPHI,
            "limits": "the matrix products of forward and encoder; for the others also dense passes over latents",
        },
    )


if __name__ == "__main__":
    main()
