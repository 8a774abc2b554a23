"""What many shards cost those who only look: `functok status` and `functok query` over 10^3, 10^4 and 10^5 of them.

A tiny model, a tiny dictionary, and a corpus whose first file is tokenized and encoded for real, each document a shard
of its own; the shards of every other file are copies of its, in the folders that the stages ask for, with their
manifests and indexes. The tables are then made and published as a run does. Each command is a process of its own, on
a cache that knows the files already (the first of each number is not timed), and on a local disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.common import emit, figure, parser, say, spread
from infra.manifest import MANIFEST, from_json
from infra.storage import json_bytes, unsealed

HERE = Path(__file__).resolve().parents[1]
COMMANDS = {
    "query, a table of one file": ["query", "SELECT count(*) FROM tokens", "--root", "{root}"],
    "query, all tables told": ["query", "SHOW TABLES", "--root", "{root}"],
    "query, one document of one shard": [
        "query",
        "SELECT count(*) FROM activations_in([{last}], layers := [1])",
        "--root",
        "{root}",
    ],
    "query, a table of all shards": [
        "query",
        "SELECT count(*), sum(n_tokens) FROM documents",
        "--root",
        "{root}",
    ],
    "status": ["status", "{config}"],
}
SECONDS = {"query, a table of one file": 2.0, "status": 30.0}
"""Targets at the largest number of shards."""


def make_root(folder: Path, n_shards: int, per_file: int) -> dict[str, float]:
    """A finished run of `n_shards` shards in `folder`; seconds that its tables took."""
    sys.path.insert(0, str(HERE / "tests"))
    import tiny
    from plain import finished

    from infra.config_file import load_config
    from infra.index import remember_files
    from infra.storage import Storage
    from tasks import stages
    from tasks.corpus.tokenization import TOKENIZE
    from tasks.engine import tables
    from tasks.graph.features import FEATURES

    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae")
    n_files = math.ceil(n_shards / per_file)
    tiny.write_jsonl(folder / "corpus" / "000000.jsonl", tiny.texts(per_file, longest=20))
    for place in range(1, n_files):
        (folder / "corpus" / f"{place:06d}.jsonl").write_text(json.dumps({"text": str(place)}) + "\n")
    written = (
        f'[corpus]\nurls = ["{folder}/corpus/*.jsonl"]\nshard_tokens = 1\n[model]\nname = "{folder}/model"\n'
        f'[windows]\ncontext_size = 64\n[graph]\nrarefaction_m = 5\n[[sae]]\nlayer = 1\npath = "{folder}/sae"\n'
        f'[storage]\nroot = "{folder}/run"\n'
    )
    (folder / "bench.toml").write_text(written)
    config = load_config(folder / "bench.toml")
    one = config.model_copy(
        update={"corpus": config.corpus.model_copy(update={"urls": [f"{folder}/corpus/000000.jsonl"]})}
    )
    finished(one, None, FEATURES)
    root = Path(config.storage.root)
    storage = Storage(str(root))

    run = stages.open_run(config, storage)
    first, *others = TOKENIZE.units(run)
    files = {path: path.read_bytes() for path in sorted((root / first.folder).rglob("*")) if path.is_file()}
    small: dict[str, bytes] = {}
    for unit in others:
        for path, content in files.items():
            name = f"{unit.folder}/{path.relative_to(root / first.folder)}"
            if path.name == "file.json":
                value = json.loads(json.dumps(unsealed(content, "")).replace(first.folder, unit.folder))
                content = json_bytes(value)
            if path.suffix == ".json":
                small[name] = content
            _write(root / name, content)
    remember_files(storage, small)

    # From a worker's copy, whose results are looked for again: all token shards are there now.
    small = {}
    units = FEATURES.units(stages.open_run(config, storage))
    for place, unit in enumerate(units):
        of = units[place % per_file]
        if of is unit:
            continue
        manifest = from_json((root / of.folder / MANIFEST).read_bytes(), "")
        for name in manifest.files:
            _write(root / unit.folder / name, (root / of.folder / name).read_bytes())
        small[f"{unit.folder}/{MANIFEST}"] = json_bytes(
            asdict(replace(manifest, inputs=dict(unit.inputs or {})))
        )
        _write(root / unit.folder / MANIFEST, small[f"{unit.folder}/{MANIFEST}"])
    remember_files(storage, small)

    run, seconds = stages.open_run(config, storage), {}
    made = []
    for group in stages.table_groups(config):
        started = time.perf_counter()
        made.append(group.build(run))
        seconds[f"tables of {group.name}"] = time.perf_counter() - started
    started = time.perf_counter()
    tables.publish(storage, tables.candidate(storage, made))
    return {**seconds, "publish": time.perf_counter() - started}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A process: its seconds on the clock and of CPU, its peak memory in GB, and what it printed."""

    seconds: float
    cpu: float
    memory: float
    told: str


def timed(command: Sequence[str], environment: Mapping[str, str]) -> Timed:
    """Run a process.

    Raises:
        SystemExit: if it fails.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {told}")
    return Timed(
        seconds=time.perf_counter() - started,
        cpu=usage.ru_utime + usage.ru_stime,
        memory=usage.ru_maxrss * 1024 / 1e9,
        told=told,
    )


def measure(folder: Path, n_shards: int, per_file: int, rounds: int) -> dict[str, Any]:
    """Make a root of so many shards, unless it is there, and ask it everything; all is written in `folder`."""
    environment = {**os.environ, "FUNCTOK_CACHE": str(folder / "cache"), "PYTHONPATH": str(HERE)}
    made = folder / "made.json"
    if not made.exists():
        say(f"{n_shards} shards: making them")
        command = [sys.executable, "-m", "bench.shards", "--make", str(folder)]
        command += ["--shards", str(n_shards), "--per-file", str(per_file)]
        made.write_text(timed(command, environment).told)
    fields = {"root": str(folder / "run"), "config": str(folder / "bench.toml"), "last": str(n_shards - 1)}
    found: dict[str, Any] = {
        "made": json.loads(made.read_text()),
        "catalog_bytes": (folder / "run/catalog.json").stat().st_size,
    }
    for what, words in COMMANDS.items():
        command = [sys.executable, "-m", "functok", *(word.format(**fields) for word in words)]
        once, *rest = (timed(command, environment) for _ in range(rounds + 1))
        found[what] = {
            "first_seconds": round(once.seconds, 2),
            "seconds": spread([one.seconds for one in rest]),
            "cpu_seconds": spread([one.cpu for one in rest]),
            "peak_memory_gb": round(max(one.memory for one in (once, *rest)), 3),
        }
        say(f"{n_shards} shards, {what}: {found[what]}")
        if what == "status" and "the published tables are current" not in once.told:
            raise SystemExit(f"the run is not finished:\n{once.told}")
    return found


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(shards) between the two largest sizes: 1 is linear."""
    (a, b), (s, t) = sizes[-2:], seconds[-2:]
    return round(math.log(t / s) / math.log(b / a), 2)


def main() -> None:
    """Command line."""
    arguments = parser("shards", __doc__)
    arguments.set_defaults(rounds=3)
    arguments.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="how many")
    arguments.add_argument("--per-file", type=int, default=10, help="shards of one corpus file")
    arguments.add_argument("--root", help="where the runs are made and kept; else they are deleted")
    arguments.add_argument("--make", metavar="FOLDER", help="only make the root of the first number there")
    chosen = arguments.parse_args()
    if chosen.make:
        print(json.dumps(make_root(Path(chosen.make), chosen.shards[0], chosen.per_file)))
        return
    folder = Path(chosen.root or tempfile.mkdtemp(prefix="functok-bench-")).absolute()
    try:
        found = {
            n: measure(folder / f"{n}-{chosen.per_file}", n, chosen.per_file, chosen.rounds)
            for n in chosen.shards
        }
    finally:
        if not chosen.root:
            shutil.rmtree(folder, ignore_errors=True)
    most = chosen.shards[-1]
    figures = [
        figure(
            f"{most:,} shards, {what}: seconds",
            found[most][what]["seconds"],
            "≤" * (what in SECONDS),
            SECONDS.get(what),
        )
        for what in COMMANDS
    ]
    report: dict[str, Any] = {"figures": figures, "shards": found}
    if len(chosen.shards) > 1:
        report["exponents"] = {
            what: exponent(chosen.shards, [found[n][what]["seconds"]["median"] for n in chosen.shards])
            for what in COMMANDS
        }
    emit("shards", report)


if __name__ == "__main__":
    main()
