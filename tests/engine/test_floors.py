"""Who may know whom: nothing beneath an experiment, beside it or above it names it; `lint-imports` holds the floors."""

from __future__ import annotations

import io
import keyword
import re
import token
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.experiments import EXPERIMENTS, experiment_rooms

ROOT = Path(__file__).resolve().parents[2]
WORDS_OF_THEIR_OWN = {
    ("tasks/engine/data_docs.py", "checkpoints"),
    ("tasks/models/language_model.py", "losses"),
    ("tasks/models/language_model.py", "token_losses"),
    ("tasks/models/loading.py", "losses"),
}
"""Great Expectations has checkpoints too, and every language model has losses."""

THE_LIST = ROOT / "schemas" / "experiments.py"


def own_names() -> set[str]:
    """What an experiment is known by: its name, sections, stages, files, views and tables."""
    names: set[str] = set(EXPERIMENTS)
    for room in experiment_rooms():
        names |= {room.group, *room.sections, *room.stages, *room.tables, *room.shard_files, *room.sharded}
    return names


def shared_files() -> list[Path]:
    """Everything that is installed, but for the rooms and the flows of experiments."""
    flows = {f"{stage}.py" for room in experiment_rooms() for stage in room.stages}
    found = []
    for package in ("functok", "flows", "tasks", "schemas", "infra", "sql"):
        for file in sorted((ROOT / package).rglob("*")):
            is_own = bool({*EXPERIMENTS} & {*file.relative_to(ROOT).parts})
            is_flow = package == "flows" and file.name in flows
            if file.suffix in {".py", ".sql", ".j2"} and not is_own and not is_flow:
                found.append(file)
    return found


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Names in the code and words in its strings, with their lines; comments and docstrings are prose."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        for line, content in enumerate(text.splitlines(), 1):
            yield from ((line, word) for word in re.findall(r"[A-Za-z_]+", content))
        return
    begins = True
    for kind, content, (line, _), _, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind == token.NAME and not keyword.iskeyword(content):
            yield line, content
        elif kind == token.STRING and not (begins and content.startswith(('"""', 'r"""'))):
            yield from ((line, word) for word in re.findall(r"[A-Za-z_]+", content))
        if kind not in {token.COMMENT, token.NL}:
            begins = kind in {token.NEWLINE, token.INDENT, token.DEDENT}


@pytest.mark.slow
def test_nothing_but_the_list_knows_an_experiment() -> None:
    known = own_names()
    told = [
        f"{file.relative_to(ROOT)}:{line}: {word}"
        for file in shared_files()
        if file != THE_LIST
        for line, word in words(file)
        if word in known and (str(file.relative_to(ROOT)), word) not in WORDS_OF_THEIR_OWN
    ]
    assert told == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_its_rooms(name: str) -> None:
    for place in ("tasks", "schemas", "sql", "tests"):
        assert (ROOT / place / name).is_dir(), place
    (room,) = [room for room in experiment_rooms() if room.name == name]
    assert all((ROOT / "flows" / f"{stage}.py").is_file() for stage in room.stages)


def test_experiments_do_not_know_each_other() -> None:
    """`lint-imports` says so of those that it is told; this of all."""
    for name in EXPERIMENTS:
        others = {
            f"{place}.{other}" for place in ("tasks", "schemas") for other in EXPERIMENTS if other != name
        }
        for place in ("tasks", "schemas"):
            for file in sorted((ROOT / place / name).rglob("*.py")):
                imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE)
                known = {".".join(module.split(".")[:2]) for module in imported}
                assert not known & others, file


def test_the_words_of_code_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        '"""losses"""\nx = growth["steering"]  # generations\ndef f():\n    """cases"""\n    return "a b"\n'
    )
    assert [word for _, word in words(file)] == ["x", "growth", "steering", "f", "a", "b"]
