"""A whole `functok run` against the sum of its stages run without Prefect, one of one line, and one with nothing to do.

Both sides are programs of their own, started anew with an empty root and an empty cache each time, so that
imports, the model's conversion and hashing count alike. The side without Prefect is `run_plain` of
`tests/plain.py`: the same stages, Dask and expectations, no flow. A run with nothing to do is compared with
a program that imports the very modules which that run imported, in that order, and ends.

The run of one line has its model converted and Prefect's empty database made by a run before it; where its seconds go
is noted by a program that wraps what it measures: planning, imports, the wait for Prefect's server, the bodies of the
stages' steps, what Prefect adds around them, and the rest (Python's start, results). CPU seconds are those of the whole
tree of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import Side, alternate, emit, figure, parser, ratio, say, spread

HERE = Path(__file__).resolve().parents[1]

# Dask's workers import the program that started them: without the guard each would run the pipeline.
_PLAIN = """
import sys
sys.path[:0] = [{here!r}, {tests!r}]
if __name__ == "__main__":
    from plain import run_plain
    from infra.config_file import load_config
    run_plain(load_config({config!r}, {assignments!r}, {root!r}))
"""
_LISTING = """
import atexit, json, sys
sys.path.insert(0, {here!r})
if __name__ == "__main__":
    from functok.cli import main
    def listing():
        with open({listing!r}, "w") as file:
            json.dump(list(sys.modules), file)
    atexit.register(listing)
    main({arguments!r})
"""
_IMPORTS = """
import importlib, json, sys
sys.path.insert(0, {here!r})
for name in json.load(open({listing!r})):
    if name not in sys.modules and name != "__main__":
        try:
            importlib.import_module(name)
        except Exception:
            print(name, file=sys.stderr)
"""
_BREAKDOWN = """
import functools, json, sys, time
began = time.perf_counter()
sys.path.insert(0, {here!r})
spent = dict.fromkeys(("planning", "imports", "server", "flow", "stages"), 0.0)
def timed(owner, name, part):
    inner = getattr(owner, name)
    @functools.wraps(inner)
    def outer(*arguments, **options):
        started = time.perf_counter()
        try:
            return inner(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - started
    setattr(owner, name, outer)
if __name__ == "__main__":
    import functok.pipeline, infra.temporary_server
    timed(functok.pipeline, "plan_run", "planning")
    timed(infra.temporary_server.TemporaryServer, "wait_until_ready", "server")
    started = time.perf_counter()
    import flows.reproduce, prefect.task_engine
    spent["imports"] += time.perf_counter() - started
    steps = flows.reproduce.imports
    def imports(stages):
        modules = steps(stages)
        while True:
            started = time.perf_counter()
            module = next(modules, None)
            spent["imports"] += time.perf_counter() - started
            if module is None:
                return
            yield module
    flows.reproduce.imports = imports
    timed(flows.reproduce, "reproduce", "flow")
    timed(prefect.task_engine.SyncTaskRunEngine, "call_task_fn", "stages")
    from functok.cli import main
    try:
        main({arguments!r})
    except SystemExit as ended:
        if ended.code:
            raise
    spent["prefect"] = spent.pop("flow") - spent["stages"]
    spent["rest"] = time.perf_counter() - began - sum(spent.values())
    with open({listing!r}, "w") as file:
        json.dump(spent, file)
"""


class Program:
    """Runs programs with a cache of their own, output kept for the case of a failure.

    Args:
        folder: Where roots, caches and scripts go.
        cache: One cache for all of them; each root has its own if None.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder, self.cache = folder, cache
        self.number = 0
        self.root = folder / "root-0"

    def fresh(self) -> None:
        """Choose an empty root and cache for the next run."""
        self.number += 1
        self.root = self.folder / f"root-{self.number}"

    def run(self, *command: str) -> None:
        """Run it to its end.

        Raises:
            SystemExit: with the end of its output, if it fails.
        """
        environment = {**os.environ, "FUNCTOK_CACHE": str(self.cache or f"{self.root}-cache")}
        done = subprocess.run(
            command, cwd=Path.cwd(), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{command[-1]} failed:\n{(done.stdout + done.stderr)[-4000:]}")

    def script(self, name: str, text: str) -> str:
        """Write a script; returns its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


def measure_one_line(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A `functok run` of one line of text: seconds on the clock, CPU seconds, and where they go."""
    corpus = folder / "one-line.jsonl"
    corpus.write_text('{"text": "The only line of this corpus is not a long one."}\n')
    source = (
        [f"model.name={json.dumps(arguments.one_line_model)}"] if arguments.one_line_model is not None else []
    )
    assignments = [f"corpus.urls=[{json.dumps(str(corpus))}]", "corpus.text_field=text", "sae=[]", *source]
    if arguments.one_line_sae:
        layer, _, path = arguments.one_line_sae.partition("=")
        assignments[2] = f"sae=[{{layer={layer}, path={json.dumps(path)}}}]"
    options = [part for assignment in assignments for part in ("--set", assignment)]
    program = Program(folder, cache=folder / "one-line-cache")
    listing = folder / "breakdown.json"
    parts: dict[str, list[float]] = {}
    cpu: list[float] = []

    def command() -> list[str]:
        return ["run", arguments.config, *options, "--root", str(program.root)]

    def whole() -> None:
        before = _cpu_of_children()
        program.run(sys.executable, "-m", "functok", *command())
        cpu.append(_cpu_of_children() - before)

    def in_parts() -> None:
        text = _BREAKDOWN.format(here=str(HERE), arguments=command(), listing=str(listing))
        program.run(sys.executable, program.script("breakdown.py", text))
        for part, spent in json.loads(listing.read_text()).items():
            parts.setdefault(part, []).append(spent)

    program.fresh()
    say("one line: a run that converts the model and makes Prefect's empty database")
    program.run(sys.executable, "-m", "functok", *command())
    seconds = alternate(
        [
            Side(name="one_line", run=whole, prepare=program.fresh),
            Side(name="one_line_in_parts", run=in_parts, prepare=program.fresh),
        ],
        arguments.idle_rounds,
    )
    return {
        "figures": [
            figure(
                "functok run of one line, model converted before: seconds",
                spread(seconds["one_line"]),
                "≤",
                15,
            ),
            figure("the same: CPU seconds of all its processes", spread(cpu)),
        ],
        "seconds": {name: spread(values) for name, values in seconds.items()}
        | {f"one_line: {part}": spread(values) for part, values in parts.items()},
    }


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare on one configuration; everything is written under `folder`."""
    program = Program(folder)
    assignments = list(arguments.assignments)
    options = [part for assignment in assignments for part in ("--set", assignment)]

    def cli() -> list[str]:
        return ["run", arguments.config, *options, "--root", str(program.root)]

    def with_prefect() -> None:
        program.run(sys.executable, "-m", "functok", *cli())

    def without_prefect() -> None:
        text = _PLAIN.format(
            here=str(HERE),
            tests=str(HERE / "tests"),
            config=arguments.config,
            assignments=assignments,
            root=str(program.root),
        )
        program.run(sys.executable, program.script("plain_run.py", text))

    whole = alternate(
        [
            Side(name="without_prefect", run=without_prefect, prepare=program.fresh),
            Side(name="functok_run", run=with_prefect, prepare=program.fresh),
        ],
        arguments.rounds,
    )
    # The last root is that of a finished `functok run`.
    listing = str(folder / "modules.json")
    say("listing the modules that a run with nothing to do imports")
    script = program.script("listing.py", _LISTING.format(here=str(HERE), listing=listing, arguments=cli()))
    program.run(sys.executable, script)
    imports = program.script("imports.py", _IMPORTS.format(here=str(HERE), listing=listing))
    idle = alternate(
        [
            Side(name="nothing_to_do", run=with_prefect),
            Side(name="imports_alone", run=lambda: program.run(sys.executable, imports)),
        ],
        arguments.idle_rounds,
    )
    after = [a - b for a, b in zip(idle["nothing_to_do"], idle["imports_alone"], strict=True)]
    extra = [a - b for a, b in zip(whole["functok_run"], whole["without_prefect"], strict=True)]
    return {
        "figures": [
            figure(
                "functok run: time over its stages without Prefect",
                ratio(whole["functok_run"], whole["without_prefect"]),
                "≤",
                1.1,
            ),
            figure("functok run with nothing to do: seconds after imports", spread(after), "≤", 5),
        ],
        "seconds": {name: spread(values) for name, values in (whole | idle).items()}
        | {"functok_run_minus_without_prefect": spread(extra)},
        "input": {
            "config": arguments.config,
            "assignments": assignments,
            "modules_imported_when_idle": len(json.loads(Path(listing).read_text())),
        },
        "limits": (
            "what functok run adds is fixed, not a share: a temporary Prefect server started while libraries are "
            "imported, five subflows, artifacts; a longer run brings the ratio nearer to 1"
        ),
    }


def main() -> None:
    """Command line."""
    arguments = parser("overhead", __doc__)
    arguments.add_argument("config", nargs="?", default="bench/overhead.toml", help="TOML file of the run")
    arguments.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="as functok run",
    )
    arguments.add_argument("--idle-rounds", type=int, default=5, help="repetitions with nothing to do")
    arguments.add_argument("--one-line-only", action="store_true", help="measure the run of one line alone")
    arguments.add_argument("--one-line-model", metavar="NAME", help="its model; default: the configuration's")
    arguments.add_argument(
        "--one-line-sae",
        metavar="LAYER=PATH",
        help="a saved dictionary for it; without one it counts tokens only",
    )
    arguments.set_defaults(rounds=2)
    parsed = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as folder:
        report = measure_one_line(parsed, Path(folder))
        if not parsed.one_line_only:
            whole = measure(parsed, Path(folder))
            report = {
                **whole,
                "figures": [*whole["figures"], *report["figures"]],
                "seconds": whole["seconds"] | report["seconds"],
            }
        emit("overhead", report)


if __name__ == "__main__":
    main()
