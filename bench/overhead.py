"""A whole `functok run` against the sum of its stages run without Prefect, and a run with nothing to do.

Both sides are programs of their own, started anew with an empty root and an empty cache each time, so that
imports, the model's conversion and hashing count alike. The side without Prefect is `run_plain` of
`tests/plain.py`: the same stages, Dask and expectations, no flow. A run with nothing to do is compared with
a program that imports the very modules which that run imported, in that order, and ends.
"""

from __future__ import annotations

import argparse
import json
import os
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
    from schemas.config import load_config
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


class Program:
    """Runs programs with a cache of their own, output kept for the case of a failure.

    Args:
        folder: Where roots, caches and scripts go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        environment = {**os.environ, "FUNCTOK_CACHE": f"{self.root}-cache"}
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
    arguments.set_defaults(rounds=2)
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as folder:
        emit("overhead", measure(arguments.parse_args(), Path(folder)))


if __name__ == "__main__":
    main()
