"""Tokenization of one file by one worker and by two, and what two processes get on two separate files in the same run.

Workers have one tokenizer thread each. Three corpora of the same texts: one JSONL file, one Parquet file, and two JSONL
files of half of the texts that go whole to a worker each: what the machine gives two processes that share nothing.
Beside them the one JSONL file whole in one worker with two tokenizer threads, as it was before workers shared files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bench.common import Side, alternate, config_with_data, emit, figure, parser_with_data, ratio, say, times
from schemas.config import Config

_GROUP_ROWS = 200


def measure(arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Compare; corpora and shards go under `root`."""
    from infra.cluster import _local
    from infra.storage import Storage
    from tasks.engine.run import Run, make

    texts, tokenizer = _texts(arguments, root), _tokenizer(arguments, root)
    say(f"{len(texts):,} documents")
    corpora = _write(texts, Path(root, "corpus"))
    made: dict[str, list[list[tuple[int, int]]]] = {}
    cpu: dict[str, list[float]] = {}
    with ExitStack() as stack:

        def workers(n: int, threads: int = 1) -> Any:
            environment = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
            return stack.enter_context(_local(n, environment))

        one, two, threads = workers(1), workers(2), workers(1, threads=2)

        def side(name: str, corpus: str, client: Any, *, is_shared: bool = True) -> Side:
            storage = Storage(f"{root}/{name}")
            config = _config(tokenizer, storage.root, corpora[corpus], client.scheduler.address)
            stage = _stage(is_shared=is_shared)

            def run() -> None:
                before = client.run(time.process_time)
                shards = make(Run(config, storage), stage).shards
                after = client.run(time.process_time)
                cpu.setdefault(name, []).append(max(after[worker] - before[worker] for worker in before))
                made.setdefault(corpus, []).append([(s.n_documents, s.n_tokens) for s in shards])

            return Side(name=name, run=run, prepare=lambda: storage.delete("tokens"))

        sides = [
            side("jsonl_one_worker", "jsonl", one),
            side("jsonl_two_workers", "jsonl", two),
            side("parquet_one_worker", "parquet", one),
            side("parquet_two_workers", "parquet", two),
            side("two_files_one_worker", "apart", one, is_shared=False),
            side("two_files_two_workers", "apart", two, is_shared=False),
            side("jsonl_whole_two_threads", "jsonl", threads, is_shared=False),
        ]
        say("warming up")
        # Each worker once.
        for each in (sides[0], sides[1], sides[-1]):
            each.run()
        cpu.clear()
        seconds = alternate(sides, arguments.rounds)
    for corpus, shards in made.items():
        if any(some != shards[0] for some in shards):
            raise SystemExit(f"the shards of {corpus} are not the same whatever the workers")
    n_tokens = sum(tokens for _, tokens in made["jsonl"][0])
    apart = _speedups(seconds, "two_files")
    figures = []
    for kind, what in (("jsonl", "JSONL"), ("parquet", "Parquet")):
        speedups, of_cpu = _speedups(seconds, kind), _speedups(cpu, kind)
        figures += [
            figure(
                f"tokenization of one {what} file: speed of two workers over one", _spread(speedups), "≥", 1.8
            ),
            figure("the same, in CPU seconds of the busier worker", _spread(of_cpu), "≥", 1.8),
            figure(
                "the same, over what two processes get of two separate files",
                ratio(speedups, apart),
                "≥",
                0.95,
            ),
        ]
    return {
        "figures": [
            *figures,
            figure("tokenization of two files, one a worker: speed of two workers over one", _spread(apart)),
            figure(
                "tokenization of one JSONL file: speed of two workers over one with two threads",
                ratio(seconds["jsonl_whole_two_threads"], seconds["jsonl_two_workers"]),
            ),
        ],
        **times(seconds, cpu, n_tokens),
        "input": {
            "documents": len(texts),
            "bytes": sum(Path(url).stat().st_size for url in corpora["jsonl"]),
            "tokens": n_tokens,
        },
        "limits": "what the machine gives two processes at once (two_files); the finding of parts and shards is in "
        "this process, which is a third",
    }


def _speedups(seconds: Mapping[str, Sequence[float]], kind: str) -> list[float]:
    one, two = seconds[f"{kind}_one_worker"], seconds[f"{kind}_two_workers"]
    return [a / b for a, b in zip(one, two, strict=True)]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return ratio(values, [1.0] * len(values))


def _texts(arguments: argparse.Namespace, root: str) -> list[str]:
    """The corpus' texts, again and again until they are large enough."""
    from tasks.corpus.files import corpus_files
    from tasks.corpus.records import read_records

    config = config_with_data(arguments, root, {}, model={"name": arguments.model})
    (file,) = corpus_files(config)
    once = [record.text for record in read_records(file, config.corpus) if record.text is not None]
    times_over = -(-(arguments.megabytes << 20) // sum(len(text.encode()) for text in once))
    return once * times_over


def _write(texts: list[str], folder: Path) -> dict[str, list[str]]:
    folder.mkdir()

    def jsonl(name: str, some: list[str]) -> str:
        lines = (
            json.dumps({"id": f"{name}-{place}", "text": text}) + "\n" for place, text in enumerate(some)
        )
        (folder / name).write_text("".join(lines))
        return str(folder / name)

    table = pa.table({"id": [str(place) for place in range(len(texts))], "text": texts})
    pq.write_table(table, folder / "one.parquet", row_group_size=_GROUP_ROWS)
    half = len(texts) // 2
    return {
        "jsonl": [jsonl("one.jsonl", texts)],
        "parquet": [str(folder / "one.parquet")],
        "apart": [jsonl("a.jsonl", texts[:half]), jsonl("b.jsonl", texts[half:])],
    }


def _tokenizer(arguments: argparse.Namespace, root: str) -> str:
    """The tokenizer in a folder of its own: out of a .gguf file it takes seconds each time."""
    from infra.storage import Storage
    from tasks.models.tokenizers import load_tokenizer

    config = config_with_data(arguments, root, {}, model={"name": arguments.model})
    loaded, folder = load_tokenizer(config.model, Storage(root)), f"{root}/tokenizer"
    loaded.tokenizer.save_pretrained(folder)
    loaded.backend.save(f"{folder}/tokenizer.json")
    return folder


def _config(tokenizer: str, root: str, urls: list[str], address: str) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": urls},
            "model": {"name": tokenizer},
            "storage": {"root": root},
            "dask": {"scheduler": address},
        }
    )


def _stage(*, is_shared: bool) -> Any:
    """Tokenization; not shared: each file goes whole to a worker."""
    from tasks.corpus.tokenization import TOKENIZE, Tokenize

    if is_shared:
        return TOKENIZE

    class Whole(Tokenize):
        shared: Callable[..., Any] = lambda *_: ()

    return Whole()


def main() -> None:
    """Command line."""
    arguments = parser_with_data("sharing", __doc__)
    arguments.add_argument("--megabytes", type=int, default=32, help="of text in each corpus")
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as root:
        emit("sharing", measure(arguments.parse_args(), root))


if __name__ == "__main__":
    main()
