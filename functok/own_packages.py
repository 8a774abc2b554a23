"""functok's packages before all others of their names: people call folders of theirs `tasks` and `schemas` too.

The working directory, a script's folder and PYTHONPATH come before what is installed, so `import tasks` would find what
lies there. Whatever imports functok gets functok's own from then on (`put_first`): the command, a program that says
`import functok`, a Dask worker (`infra.cluster` has it loaded first). A child process of another kind begins with this
file (`infra.children.own_program`): `python …/functok/own_packages.py MODULE ARGUMENT…` runs a module of ours as
`python -m` would. It is a script, as `python -m functok…` would look in the working directory for `functok` itself.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

HOME = str(Path(__file__).resolve().parent.parent)
"""The folder that the packages lie in: site-packages, or a source checkout."""

PACKAGES = ("functok", "flows", "tasks", "infra", "schemas", "sql", "configs")


class OwnPackages(MetaPathFinder):
    """Finds functok's packages where functok is, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a package of ours is; None for every other module."""
        return PathFinder.find_spec(fullname, [HOME], target) if fullname in PACKAGES else None


def put_first() -> None:
    """From now on, in this process, let functok's packages be found before others of their names.

    Raises:
        ImportError: if another module of such a name is imported already.
    """
    for name in PACKAGES:
        found = sys.modules.get(name)
        if found is not None and HOME not in (folder := _folder_of(found)):
            raise ImportError(
                f"this program has imported a module called {name} (from {' or '.join(folder)}), and functok has a "
                "package of that name: import functok in a program without it, or run the command `functok`"
            )
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())


def _folder_of(module: ModuleType) -> list[str]:
    """The folders that a module was found in; several for a package without `__init__.py`."""
    places = list(getattr(module, "__path__", [])) or [module.__file__ or "nowhere"]
    return [str(Path(place).resolve().parent) for place in places]


def main() -> None:
    """Run the module that the command line names, with the arguments that follow it."""
    if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        # The script's folder: our modules are not to be found as `cli` or `query`.
        del sys.path[0]
    put_first()
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
