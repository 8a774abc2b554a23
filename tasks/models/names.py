"""Whether two names mean one model: hub ids, folders, GGUF files, and the short names that SAEs' makers use."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from schemas.config import Model
from tasks.models.files import IN_STORAGE, is_gguf

_QUANTIZATION = re.compile(r"[-._](?:i?q\d\w*|b?f16|fp?(?:16|32))$")
_HUB_CACHE = re.compile(r"models--.+?--(?P<name>[^/]+)/snapshots/")
_UNNAMED = ("", "unknown", "none", "custom")


def names_of(model: Model) -> tuple[str, ...]:
    """The names that a configured model goes by: as it is given, and as its folder calls itself."""
    if is_gguf(model) or model.name.startswith(IN_STORAGE):
        return (model.name,)
    folder = Path(model.name)
    if not folder.is_dir():
        return (model.name,)
    names = [folder.resolve().name]
    if match := _HUB_CACHE.search(f"{folder.resolve()}/"):
        names = [match["name"]]
    for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        try:
            own = json.loads((folder / file).read_bytes()).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if own:
            names.append(str(own))
    return tuple(dict.fromkeys(names))


def is_named(name: str | None, names: Sequence[str]) -> bool:
    """Whether a name is one of a model's, or says nothing.

    Owners, case, quantizations of GGUF files and TransformerLens' aliases (`gpt2-small` of `gpt2`) make no difference;
    instruction tuning, sizes and versions do.
    """
    if name is None or _plain(name) in _UNNAMED:
        return True
    ours = {_plain(own) for own in names}
    if _plain(name) in ours:
        return True
    return _official(_plain(name)) in {_official(own) for own in ours}


def _plain(name: str) -> str:
    last = name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1].lower()
    return _QUANTIZATION.sub("", last.removesuffix(".gguf")).replace("_", "-").removeprefix("meta-")


def _official(name: str) -> str:
    return _aliases().get(name, name)


@cache
def _aliases() -> dict[str, str]:
    """TransformerLens' official name of each of its aliases, both plain, from its list of names alone."""
    package = importlib.util.find_spec("transformer_lens")
    folders = package.submodule_search_locations if package is not None else None
    file = Path(next(iter(folders or ()), "")) / "supported_models.py"
    spec = importlib.util.spec_from_file_location("transformer_lens_supported_models", file)
    if not file.is_file() or spec is None or spec.loader is None:
        return {}
    # The package itself takes seconds to import.
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listed: dict[str, list[str]] = getattr(module, "MODEL_ALIASES", {})
    return {_plain(alias): _plain(official) for official, aliases in listed.items() for alias in aliases}
