"""Our tokenization against a bare loop of the tokenizer's own batch call, on the same cores.

Ours is the whole stage: finding the corpus file, reading and tokenizing it, counting, and writing and committing the
shards, in this process with all cores. The bare loop is given the texts in
memory and keeps nothing: `tokenizer(batch, add_special_tokens=False)["input_ids"]`, transformers' call, over
batches as large as ours. Beside it, the lower bound of any way: the Rust backend's own `encode_batch_fast`
over the same batches, whose ids stay in Rust.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.common import Side, alternate, config_with_data, emit, figure, parser_with_data, ratio, say, times
from schemas.config import Config
from schemas.work import CorpusShards
from tasks.corpus.files import CorpusFile
from tasks.engine.stage import Stage

BATCH_DOCUMENTS = 1024


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare on one corpus file; shards go under `root`."""
    from infra.cluster import available_cores
    from infra.storage import Storage
    from tasks.corpus.files import corpus_files
    from tasks.corpus.records import read_records
    from tasks.engine.run import Run, make
    from tasks.models.tokenizers import load_tokenizer

    storage = Storage(root)
    config = config_with_data(arguments, root, {}, model={"name": arguments.model})
    say("loading the tokenizer and the texts")
    tokenizer = load_tokenizer(config.model, storage)
    (file,) = corpus_files(config)
    texts: list[str] = []
    for record in read_records(file, config.corpus, 0):
        if record.text is not None:
            texts.append(record.text)
        if len(texts) == arguments.documents:
            # A corpus of its own: under a limit, ours would tokenize ahead what it then leaves.
            config, file = _first(texts, config, root)
            break
    batches = [texts[at : at + BATCH_DOCUMENTS] for at in range(0, len(texts), BATCH_DOCUMENTS)]
    stage, made = _here(), list[CorpusShards]()

    def ours() -> None:
        made.append(make(Run(config, storage), stage))

    def bare() -> None:
        for batch in batches:
            tokenizer.tokenizer(batch, add_special_tokens=False)["input_ids"]

    def backend() -> None:
        for batch in batches:
            tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)

    def reading() -> None:
        for _ in read_records(file, config.corpus, 0):
            continue

    sides = [
        Side(name="ours", run=ours, prepare=lambda: storage.delete("tokens")),
        Side(name="bare_loop", run=bare),
        Side(name="backend_alone", run=backend),
        Side(name="reading_alone", run=reading),
    ]
    say("warming up")
    for side in sides:
        side.run()
    cpu: dict[str, list[float]] = {}
    seconds = alternate(sides, arguments.rounds, cpu)
    n_tokens = made[-1].n_tokens
    characters = sum(len(text) for text in texts)
    against_bare = ratio(seconds["bare_loop"], seconds["ours"])
    against_backend = ratio(seconds["backend_alone"], seconds["ours"])
    return {
        "figures": [
            figure(
                "tokenization: speed over a bare loop of the tokenizer's batch call", against_bare, "≥", 0.9
            ),
            figure("tokenization: speed over the Rust backend alone, ids left in Rust", against_backend),
        ],
        **times(seconds, cpu, n_tokens),
        "input": {
            "documents": len(texts),
            "characters": characters,
            "tokens": n_tokens,
            "batch_documents": BATCH_DOCUMENTS,
            "tokenizer_threads": int(os.environ.get("RAYON_NUM_THREADS", available_cores())),
        },
        "limits": (
            "the merges of the tokenizer's BPE on all cores (backend_alone); reading the file and making "
            "arrays of ids overlap with it in another thread but take the same cores, writing follows each shard"
        ),
    }


def _here() -> Stage[Any, CorpusShards]:
    """Tokenization without workers, which take seconds to start."""
    from tasks.corpus.tokenization import Tokenize

    class Here(Tokenize):
        def client(self, *_: object) -> nullcontext[None]:
            return nullcontext()

    return Here()


def _first(texts: list[str], config: Config, root: str) -> tuple[Config, CorpusFile]:
    """A corpus of these texts alone, as one JSON Lines file."""
    from tasks.corpus.files import corpus_files

    path = Path(root, "first.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = config.model_dump() | {"corpus": {"urls": [str(path)]}}
    made = Config.model_validate(values)
    return made, corpus_files(made)[0]


def main() -> None:
    """Command line."""
    arguments = parser_with_data("tokenization", __doc__)
    arguments.add_argument("--documents", type=int, default=None, help="first documents only (default: all)")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("tokenization", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
