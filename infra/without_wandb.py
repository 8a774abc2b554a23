"""SAELens without Weights & Biases.

SAELens imports wandb, which makes two temporary folders as it is imported (`tmp…wandb-media`, `tmp…wandb-artifacts`);
a process that is killed leaves them behind. Nothing here logs to it, so while SAELens is imported a stand-in takes its
place. It is taken away afterwards: who imports wandb gets wandb.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_LIBRARY = "sae_lens"


class _StandIn(ModuleType):
    """What SAELens gets for wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"functok keeps wandb out of SAELens: wandb.{name} is not there")


def _execute(exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
    if "wandb" in sys.modules:
        exec_module(module)
        return
    sys.modules["wandb"] = _StandIn()
    try:
        exec_module(module)
    finally:
        del sys.modules["wandb"]


class _Finder(MetaPathFinder):
    _is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIBRARY or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is not None and spec.loader is not None:
            # Of this loader alone: it is the one that will run the package.
            spec.loader.exec_module = partial(_execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def keep_wandb_out() -> None:
    """From now on, let SAELens be imported without wandb."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
