"""SAELens without Weights & Biases.

SAELens imports wandb, which makes two temporary folders as it is imported (`tmp…wandb-media`, `tmp…wandb-artifacts`);
a process that is killed leaves them behind. Nothing here logs to it, so while SAELens is imported a stand-in takes its
place. It is taken away afterwards: who imports wandb gets wandb.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
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


class _LoaderWithoutWandb(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if "wandb" in sys.modules:
            self._loader.exec_module(module)
            return
        sys.modules["wandb"] = _StandIn()
        try:
            self._loader.exec_module(module)
        finally:
            del sys.modules["wandb"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


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
            spec.loader = _LoaderWithoutWandb(spec.loader)
        return spec


def keep_wandb_out() -> None:
    """From now on, let SAELens be imported without wandb."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
