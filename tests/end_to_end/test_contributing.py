"""The experiment of CONTRIBUTING.md, put into a copy of the project: its own files, and one line elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"^`(?P<file>[\w/]+\.(?:py|sql))`:.*?\n```\w+\n(?P<content>.*?)\n```$", re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the experiment in it."""
    copy = tmp_path_factory.mktemp("project")
    for package in ("functok", "flows", "tasks", "schemas", "infra", "sql", "configs"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    written = {
        match["file"]: match["content"] for match in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text())
    }
    assert len(written) == 4
    for name, content in written.items():
        assert not (copy / name).exists()
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(content + "\n")
    the_list = copy / "schemas" / "experiments.py"
    before = the_list.read_text()
    after = re.sub(r"(EXPERIMENTS: .*?)\)$", r'\1, "letters")', before, count=1, flags=re.MULTILINE)
    assert after != before
    the_list.write_text(after)
    return copy


PAGES = """
import json, sys
from functok.explorer.experiments import INDEX
from infra.duck import connect
from infra.storage import Storage
from tasks.explore.vocabulary import Asked, Facts, Findings, Grid
from tasks.report.queries import tables_of
from tasks.stages import experiment

(page,) = experiment("letters").pages
connection = connect(Storage(sys.argv[1]))
asked = Asked(connection=connection, tables=frozenset(tables_of(connection)))
(grid,) = page.build(asked).panels
facts, findings, *_ = INDEX.build(asked).panels
(missing,) = page.build(Asked(connection=connection, tables=frozenset())).panels
shown = [asked.rows(grid.query), [facts.title, *facts.facts], findings.findings[0].title, missing.way]
print(json.dumps(shown))
"""
"""What the explorer shows of it."""


PROGRAM = """
import json, sys
from functok import cli
for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
    print(chr(0), end="", flush=True)
"""
"""Command lines one after another, in one process: importing takes longer than most of them."""


def functok(project: Path, *lines: list[str]) -> list[str]:
    """What each of them prints."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(lines)]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    ran = subprocess.run(program, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *told, rest = ran.stdout.split("\0")
    assert (len(told), rest) == (len(lines), "")
    return told


@pytest.mark.server
def test_one_line_adds_an_experiment(project: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished / "run", root)
    config = tmp_path / "letters.toml"
    config.write_text((finished / "tiny.toml").read_text() + "[letters]\nlower = true\n")

    of_config, of_root = [str(config), "--root", str(root)], ["--root", str(root), "--format", "json"]
    status, ended, letters, asked, again = functok(
        project,
        ["status", *of_config],
        ["run", *of_config],
        ["query", "SELECT * FROM letters", *of_root],
        ["query", "SELECT stage FROM expectations", *of_root],
        ["run", *of_config],
    )
    assert re.search(r"letters\s*│\s*0\s*│\s*1\s*│", status)
    assert "First letters: OWN. Most tokens that begin with a letter" in ended
    counted = json.loads(letters)
    words = [json.loads(line)["text"] for line in (finished / "corpus.jsonl").read_text().splitlines()]
    assert counted
    assert {row["letter"] for row in counted} <= {letter.lower() for letter in "".join(words)}
    assert "letters" in {row["stage"] for row in json.loads(asked)}
    assert "First letters" in (root / "report.html").read_text()
    assert again.startswith("nothing to do")
