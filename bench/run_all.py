"""Run the benches one after another, keep their JSON, and write the table of `bench/README.md`.

`python -m bench.run_all` runs all; `python -m bench.run_all tokenization extraction` runs some;
`python -m bench.run_all --render` only writes the table from the JSON in `bench/results/`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BENCHES = (
    "tokenization",
    "sharing",
    "extraction",
    "peers",
    "encoding",
    "losses",
    "training",
    "overhead",
    "writing",
    "tables",
    "explore",
    "readers",
    "scale",
    "shards",
    "s3",
    "retention_peer",
)
_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"


def run(bench: str, options: Iterable[str] = ()) -> None:
    """Run one bench in a process of its own and keep what it prints as `results/<bench>.json`.

    Raises:
        SystemExit: if it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{bench}", *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bench.{bench} failed with status {done.returncode}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{bench}.json").write_text(
        json.dumps(json.loads(done.stdout), ensure_ascii=False, indent=2) + "\n"
    )


def rows(report: dict[str, Any]) -> list[str]:
    """The table's lines of one bench's JSON, one for each of its `figures`."""
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    lines = []
    for entry in report["figures"]:
        spread = f" ({entry['min']:.3g} … {entry['max']:.3g}, n = {entry['n']})" if entry["n"] > 1 else ""
        verdict = {True: "met", False: "**missed**", None: ""}[entry.get("met")]
        cells = (
            entry["what"],
            f"`python -m {' '.join(report['command'])}`",
            entry.get("target", ""),
            f"{entry['median']:.3g}{spread}",
            verdict,
            where,
            machine["date"],
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def render(readme: str, reports: Iterable[dict[str, Any]]) -> str:
    """The README with the table between its marks made anew.

    Raises:
        SystemExit: if the marks are not there.
    """
    head, begin, rest = readme.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        raise SystemExit(f"{README} has lost its marks {_BEGIN} and {_END}")
    table = [
        "| what | command | target | median (min … max) | verdict | machine | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(line for report in reports for line in rows(report)),
    ]
    return "\n".join([head + begin, *table, end + tail])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_all", description="Run benches, write the table."
    )
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--render", action="store_true", help="run nothing, write the table")
    arguments = parser.parse_args()
    unknown = set(arguments.benches) - set(BENCHES)
    if unknown:
        parser.error(f"no such bench: {', '.join(sorted(unknown))}")
    if not arguments.render:
        for bench in arguments.benches or [name for name in BENCHES if (HERE / f"{name}.py").exists()]:
            run(bench)
    kept = [RESULTS / f"{bench}.json" for bench in BENCHES]
    reports = [json.loads(path.read_text()) for path in kept if path.exists()]
    README.write_text(render(README.read_text(), reports))


if __name__ == "__main__":
    main()
