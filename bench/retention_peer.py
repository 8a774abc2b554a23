"""Our policies beside those of kvpress, NVIDIA's library of KV-cache compression.

kvpress pins an older transformers, so it runs in an environment of its own, which this makes (`--environment`, once:
venv and pip), in a process that is asked over a pipe (`bench.kvpress_worker`). Both sides read the same tokens with the
same weights, in float32, with as many threads: the prompt is read exactly in one forward, the cache compressed to the
same number of tokens in each head, and the rest read on top of it, teacher-forced. What a press protects, ours
protects: 4 sinks for StreamingLLM, nothing else. Compared are the tokens that are kept, the perplexity of what follows,
bytes, and, in alternation, seconds.

`key_norm` is a policy of this file alone, to hold the cache against a press that looks at keys only.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import Side, alternate, emit, figure, parser_with_data, ratio, say
from infra.cluster import available_cores
from infra.storage import Storage
from schemas.config import Config, Model
from tasks.corpus.files import corpus_files
from tasks.corpus.records import read_records
from tasks.models.language_model import LanguageModel, load_language_model
from tasks.models.tokenizers import load_tokenizer
from tasks.retention.budgets import Budget, Protection
from tasks.retention.policies import Held, Policy, policy_named
from tasks.retention.running import Prefill, Settings, next_losses, read

Row = dict[str, Any]

KVPRESS = "0.5.5"
SHARES = (0.25, 0.5)
"""Of the prompt's tokens, that are kept."""


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """Keeps the keys of smallest norm (arXiv 2406.11430)."""

    name = "key_norm"

    def score(self, held: Held) -> torch.Tensor:
        """The smaller the norm, the higher."""
        norms: torch.Tensor = held.keys().float().norm(dim=-1)
        return -norms


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A press and our policy that is to do the same.

    Attributes:
        press: Class of kvpress.
        options: Of it, beside the compression ratio.
        policy: Ours.
        protection: What the press protects of its own.
    """

    press: str
    options: dict[str, Any]
    policy: Policy
    protection: Protection


NOTHING = Protection(sinks=0, recent=0)
PAIRS = (
    Pair(
        press="StreamingLLMPress",
        options={"n_sink": 4},
        policy=policy_named("streaming"),
        protection=Protection(sinks=4, recent=0),
    ),
    Pair(
        press="SnapKVPress",
        options={"window_size": 64, "kernel_size": 5},
        policy=policy_named("snapkv", window=64, kernel=5),
        protection=NOTHING,
    ),
    # It never evicts the last token.
    Pair(
        press="TOVAPress", options={}, policy=policy_named("tova"), protection=Protection(sinks=0, recent=1)
    ),
    Pair(press="KnormPress", options={}, policy=KeyNorm(), protection=NOTHING),
)


class Peer:
    """kvpress with one model, in its own environment.

    Args:
        environment: Folder of the virtual environment.
        folder: Of the model.
        threads: Of PyTorch.
    """

    def __init__(self, environment: Path, folder: Path, threads: int) -> None:
        worker = Path(__file__).with_name("kvpress_worker.py")
        self._process = subprocess.Popen(
            [environment / "bin" / "python", worker, folder, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )
        self.versions: dict[str, str] = self._read()

    def ask(
        self, pair: Pair, share: float, prompt: list[int], rest: list[int], *, kept: bool = False
    ) -> dict[str, Any]:
        """What `bench.kvpress_worker.answer` says."""
        assert self._process.stdin is not None
        options = {**pair.options, "compression_ratio": 1 - share}
        asked = {"press": pair.press, "options": options, "prompt": prompt, "rest": rest, "kept": kept}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"kvpress ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def peer(environment: Path, folder: Path, threads: int) -> Iterator[Peer]:
    """kvpress, its environment made where there is none yet."""
    if not list(environment.glob(f"lib/python*/site-packages/kvpress-{KVPRESS}.dist-info")):
        say(f"making an environment with kvpress {KVPRESS} in {environment}")
        venv.create(environment, with_pip=True, clear=True)
        # The same PyTorch, whatever it is built for: its speed is not what is compared.
        wanted = [f"torch=={torch.__version__.partition('+')[0]}", f"kvpress=={KVPRESS}"]
        subprocess.run(
            [environment / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted],
            check=True,
            stdout=sys.stderr,
        )
    made = Peer(environment, folder, threads)
    try:
        yield made
    finally:
        made.close()


@dataclass(kw_only=True)
class Ours:
    """What our side found of one document.

    Attributes:
        seconds: Of prompt and compression.
        rest_seconds: Of the rest.
        losses: Of rest[1:].
        n_bytes: After compression, all tensors.
        kept: Of each layer and head the positions.
    """

    seconds: float
    rest_seconds: float
    losses: list[float]
    n_bytes: int
    kept: list[list[list[int]]]


def ours(
    model: LanguageModel, pair: Pair, share: float, prompt: list[int], rest: list[int], *, kept: bool = False
) -> Ours:
    """The same by our cache, in the same two forwards."""
    ids, n = torch.tensor([[*prompt, *rest]]), len(prompt)
    settings = Settings(
        policy=pair.policy,
        budget=Budget(token_share=share),
        protocol=Prefill(prompt=n, chunk=max(n, len(rest))),
        protection=pair.protection,
        fused=True,
    )
    steps = read(model, ids, settings)
    started = time.perf_counter()
    first = next(steps)
    compressed = time.perf_counter()
    size = first.cache.n_bytes
    stays = [fates.kept(n)[0, :, :n] for fates in first.cache.fates.values()] if kept else []
    resumed = time.perf_counter()
    second = next(steps)
    ended = time.perf_counter()
    return Ours(
        seconds=compressed - started,
        rest_seconds=ended - resumed,
        losses=next_losses(second, ids)[0].tolist(),
        n_bytes=size,
        kept=[[head.nonzero()[:, 0].tolist() for head in layer] for layer in stays],
    )


def compare(
    model: LanguageModel,
    other: Peer,
    name: str,
    documents: Sequence[tuple[list[int], list[int]]],
    rounds: int,
) -> list[Row]:
    """What one model gives: each pair of policies at each share."""
    found = list[Row]()
    for pair in PAIRS:
        for share in SHARES:
            what = f"{name}, {pair.policy.name} and {pair.press}, {share:.0%} kept"
            same, of, losses, theirs_losses = 0, 0, list[float](), list[float]()
            sizes = (0, 0)
            for prompt, rest in documents:
                mine = ours(model, pair, share, prompt, rest, kept=True)
                theirs = other.ask(pair, share, prompt, rest, kept=True)
                for layer, its in zip(mine.kept, theirs["kept"], strict=True):
                    for head, its_head in zip(layer, its, strict=True):
                        same, of = same + len({*head} & {*its_head}), of + len(its_head)
                losses += mine.losses
                theirs_losses += theirs["losses"]
                sizes = mine.n_bytes, theirs["bytes"]
            perplexity, its_perplexity = (math.exp(sum(some) / len(some)) for some in (losses, theirs_losses))
            seconds: dict[str, list[float]] = {"ours": [], "rest": [], "theirs": [], "their rest": []}

            def run_ours(pair: Pair = pair, share: float = share, seconds: Any = seconds) -> None:
                made = ours(model, pair, share, *documents[0])
                seconds["ours"].append(made.seconds)
                seconds["rest"].append(made.rest_seconds)

            def run_theirs(pair: Pair = pair, share: float = share, seconds: Any = seconds) -> None:
                made = other.ask(pair, share, *documents[0])
                seconds["theirs"].append(made["seconds"])
                seconds["their rest"].append(made["rest_seconds"])

            run_ours()
            run_theirs()
            for times in seconds.values():
                times.clear()
            alternate([Side(name="ours", run=run_ours), Side(name="kvpress", run=run_theirs)], rounds)
            say(
                f"{what}: {same / of:.4f} of the tokens, perplexity {perplexity:.4f} and {its_perplexity:.4f}"
            )
            found.append(
                {
                    "model": name,
                    "policy": pair.policy.name,
                    "press": pair.press,
                    "kept": share,
                    "same_tokens": same / of,
                    "perplexity": perplexity,
                    "kvpress_perplexity": its_perplexity,
                    "bytes_ratio": sizes[0] / sizes[1],
                    "prompt_speed": ratio(seconds["theirs"], seconds["ours"]),
                    "rest_speed": ratio(seconds["their rest"], seconds["rest"]),
                }
            )
    return found


def figures_of(name: str, pairs: Sequence[Row]) -> list[Row]:
    """A model's rows of the table of all benches: the worst of its pairs."""
    same = min(pair["same_tokens"] for pair in pairs)
    apart = max(abs(pair["perplexity"] / pair["kvpress_perplexity"] - 1) for pair in pairs)
    tokens = f"retention, {name}: of the tokens that kvpress keeps, kept here, the fewest of all policies"
    perplexity = f"retention, {name}: perplexity apart from kvpress's, the most of all policies"
    return [figure(tokens, _one(same), "≥", 0.999), figure(perplexity, _one(apart), "≤", 0.01)]


def table(pairs: Sequence[Row]) -> str:
    """What `bench/README.md` shows: a line a model, policy and share."""
    lines = [
        "| model | policy, press | kept | same tokens | perplexity, kvpress's | bytes ÷ kvpress's | speed ÷ kvpress's, "
        "prompt and compression | the rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs:
        speeds = [
            f"{of['median']:.2f} ({of['min']:.2f} … {of['max']:.2f}, n = {of['n']})"
            for of in (pair["prompt_speed"], pair["rest_speed"])
        ]
        cells = (
            pair["model"],
            f"{pair['policy']}, {pair['press']}",
            f"{pair['kept']:.0%}",
            f"{pair['same_tokens']:.2%}",
            f"{pair['perplexity']:.4f}, {pair['kvpress_perplexity']:.4f}",
            f"{pair['bytes_ratio']:.2f}",
            *speeds,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one(value: float) -> dict[str, Any]:
    return {"median": round(value, 6), "min": round(value, 6), "max": round(value, 6), "n": 1}


def tiny() -> LanguageModel:
    """A random Llama whose attention is far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    )
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return LanguageModel(module.eval().requires_grad_(False), "tiny", 1024)


def random_documents(n: int, prompt: int, rest: int) -> list[tuple[list[int], list[int]]]:
    """Random ids as prompt and rest."""
    ids = torch.randint(3, 512, (n, prompt + rest), generator=torch.Generator().manual_seed(1)).tolist()
    return [(row[:prompt], row[prompt:]) for row in ids]


def corpus_documents(arguments: argparse.Namespace, storage: Storage) -> list[tuple[list[int], list[int]]]:
    """The corpus’ first documents, joined and cut into prompts and rests, with BOS first where there is one."""
    config = Config.model_validate(
        {
            "corpus": {"urls": [arguments.corpus], "text_field": arguments.text_field},
            "model": {"name": arguments.model},
        }
    )
    tokenizer, length = load_tokenizer(config.model, storage), arguments.prompt + arguments.rest
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    (file,) = corpus_files(config)
    ids, found = list(first), list[tuple[list[int], list[int]]]()
    for record in read_records(file, config.corpus):
        if record.text is None:
            continue
        ids += tokenizer.backend.encode(record.text, add_special_tokens=False).ids
        while len(ids) >= length and len(found) < arguments.documents:
            found.append((ids[: arguments.prompt], ids[arguments.prompt : length]))
            ids = [*first, *ids[length:]]
        if len(found) == arguments.documents:
            return found
    raise SystemExit(f"{arguments.corpus} has not {arguments.documents} times {length} tokens")


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare on a tiny model, and on the one that is given if it is there."""
    storage, threads = Storage(root), available_cores()
    torch.set_num_threads(threads)
    environment = Path(arguments.environment)
    models = [("tiny", tiny(), random_documents(arguments.documents, 512, 128))]
    if Path(arguments.model).exists():
        model = load_language_model(Model(name=arguments.model, dtype="float32", device="cpu"), storage)
        models.append((Path(arguments.model).name, model, corpus_documents(arguments, storage)))
    else:
        say(f"{arguments.model} is not here: make assets")
    figures, pairs, versions = list[Row](), list[Row](), dict[str, str]()
    for name, model, documents in models:
        folder = Path(root) / name
        model.module.save_pretrained(folder)
        with peer(environment, folder, threads) as other:
            versions = other.versions
            mine = compare(model, other, name, documents, arguments.rounds)
        figures += figures_of(name, mine)
        pairs += mine
    say(table(pairs))
    return {"figures": figures, "pairs": pairs, "peer": versions, "documents": arguments.documents}


def main() -> None:
    """Command line."""
    arguments = parser_with_data("retention_peer", __doc__)
    arguments.add_argument(
        "--environment", default=f".cache/kvpress-{KVPRESS}", help="virtual environment of kvpress"
    )
    arguments.add_argument("--documents", type=int, default=3, help="documents of each model")
    arguments.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt, of the given model")
    arguments.add_argument("--rest", type=int, default=256, help="tokens that follow it")
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("retention_peer", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
