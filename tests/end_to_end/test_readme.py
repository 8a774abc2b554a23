"""Every command of the README runs, on a tiny finished run in the place of the demo's."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from functok import cli
from schemas.config import Config
from schemas.steering.section import Cases

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The command lines of all bash blocks, comments left out."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [
        " ".join(shlex.split(line, comments=True)) and line
        for line in lines
        if shlex.split(line, comments=True)
    ]


FUNCTOK = [line for line in commands() if "functok " in line and " up" not in line.split("#")[0]]
MAKE = [line for line in commands() if line.startswith("make ")]


CASES = """
[[case]]
name = "where"
relation = "places"
prompts = ["who was in Russia when the river of", "who was in Moscow when the river of"]
[[trait]]
name = "Moscow"
positive = ["Moscow said the", "in Moscow the river was the"]
negative = ["Russia said the", "in Russia the river was the"]
[[steer]]
traits = ["Moscow"]
prompt = "what is the"
target = " Moscow"
"""
"""What the README's cases are to the demo's model, for a tiny one."""


RETENTION = """
[retention]
policies = ["streaming", "str"]
chunk = 8
sinks = 2
recent = 4
heldout_share = 0.6
sequences = [{ length = 64, documents = 2 }]
"""


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as the README's reader has it: `my.toml`, and a finished run in `runs/demo`."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(finished / "run", folder / "runs" / "demo")
    config = (finished / "tiny.toml").read_text()
    config = config.replace(f"{finished}/run", f"{folder}/runs/demo")
    (folder / "my.toml").write_text(config)
    steering = 'cases = "elsewhere.toml"\nstrengths = [2.0]\nmodes = ["add"]\nrandom_controls = 1\nmax_new_tokens = 2'
    (folder / "my-steering.toml").write_text(f"{config}[steering]\n{steering}\n")
    (folder / "my-cases.toml").write_text(CASES)
    (folder / "my-retention.toml").write_text(f"{config}{RETENTION}")
    return folder


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("line", FUNCTOK)
def test_a_command_of_the_readme_runs(
    place: Path, line: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    _, *arguments = shlex.split(line.replace("layer = 15", "layer = 1"), comments=True)
    monkeypatch.chdir(place)
    # Where a command asks for SQL.
    monkeypatch.setattr("sys.stdin", io.StringIO(".tables\n"))
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capfdbinary.readouterr()
    assert not ended.value.code, said.err.decode()
    assert said.out.strip()


@pytest.mark.usefixtures("prefect_api")
def test_the_python_of_the_readme_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (program,) = blocks("python")
    monkeypatch.chdir(place)
    exec(program, {})
    assert "finished in" in capfd.readouterr().out


def test_the_readme_shows_the_commands_that_there_are() -> None:
    assert len(FUNCTOK) >= 8
    assert MAKE
    shown = {shlex.split(line, comments=True)[1] for line in FUNCTOK}
    assert shown == {"run", "status", "query", "catalog", "report", "verify", "gc"}
    assert "functok up" in README
    assert "functok explore" in README


@pytest.mark.parametrize("line", MAKE)
def test_a_make_target_of_the_readme_exists(line: str) -> None:
    make = shutil.which("make")
    assert make, "the tests are started by make"
    target = shlex.split(line, comments=True)[1]
    done = subprocess.run([make, "-n", target], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_the_configuration_of_the_readme_is_valid() -> None:
    text = blocks("toml")[0]
    assert len(Config.model_validate(tomllib.loads(text)).sae) == 3


def test_the_series_of_the_readme_are_valid() -> None:
    series = tomllib.loads(blocks("toml")[2])["consolidation"]["series"]
    values = {"corpus": {"urls": ["a.txt"]}, "model": {"tokenizer": "t"}}
    consolidation = Config.model_validate(
        {**values, "consolidation": {"series": series, "train": {"tokens": 1000}}}
    ).consolidation
    assert consolidation is not None
    assert [entry.name for entry in consolidation.series] == ["mine", "pythia", "ours"]


def test_the_cases_of_the_readme_are_valid() -> None:
    cases = Cases.model_validate(tomllib.loads(blocks("toml")[1]))
    assert (len(cases.case), len(cases.trait), len(cases.steer)) == (1, 2, 1)


def test_files_that_the_readme_points_to_exist() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "DESIGN.md" in targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target
