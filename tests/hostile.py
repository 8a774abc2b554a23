"""Folders that are called as functok's packages are, as people have them in their projects."""

from __future__ import annotations

from pathlib import Path

from functok.own_packages import PACKAGES

NAMES = [name for name in PACKAGES if name != "functok"]


def lay_out(folder: Path) -> Path:
    """Put packages, modules and plain folders of functok's names into a folder; importing one of theirs fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        if number % 3 == 2:
            (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')\n")
            continue
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("ours")
        if number % 3 == 1:
            (folder / name / "__init__.py").write_text(
                f"raise SystemExit('{name} of the working directory')\n"
            )
    return folder
