"""functok's packages are found before what people have under the same names."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hostile import NAMES

from functok.own_packages import PACKAGES
from infra.children import own_program

pytestmark = pytest.mark.process
REPOSITORY = Path(__file__).parents[2]
RAISES = "raise SystemExit('not this one')\n"


def python(folder: Path, *arguments: str, path: str = "") -> str:
    """What a Python in a folder says, with what comes before functok on its path."""
    found = [path, str(REPOSITORY)] if path else [str(REPOSITORY)]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.fixture(params=["package", "module", "folder"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder in which every name of ours is somebody's."""
    for name in NAMES:
        if request.param == "module":
            (tmp_path / f"{name}.py").write_text(RAISES)
            continue
        (tmp_path / name).mkdir()
        if request.param == "package":
            (tmp_path / name / "__init__.py").write_text(RAISES)
    return tmp_path


def test_every_package_is_ours(project: Path) -> None:
    imports = ", ".join(NAMES)
    folders = f"{{Path(module.__file__).parents[1] for module in ({imports})}}"
    said = python(
        project, "-c", f"from pathlib import Path; import functok; import {imports}; print({folders})"
    )
    assert said.strip() == repr({REPOSITORY})


def test_the_command_and_its_children_start(project: Path) -> None:
    assert "Usage" in python(project, "-m", "functok", "--help")
    assert "usage" in python(project, *own_program("infra.web_server")[1:], "--help")
    assert "usage" in python(
        project, *own_program("tasks.pretraining.worker")[1:], "--help", path=str(project)
    )


def test_a_program_that_has_such_a_module_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    said = python(tmp_path, "-c", "import tasks, functok")
    assert f"has imported a module called tasks (from {tmp_path})" in said
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert python(elsewhere, "-c", "import tasks.engine, functok") == ""


def test_the_packages_are_those_that_are_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    installed = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.removesuffix("*") for name in installed} == set(PACKAGES)
