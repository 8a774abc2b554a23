"""A small run of the experiment: a tiny model, a corpus of a few files, and configurations of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

from schemas.config import Config

LENGTH = 96

RETENTION: dict[str, Any] = {
    "policies": ["window", "streaming", "random", "h2o", "snapkv", "function", "str", "cmp"],
    "options": {"snapkv": {"window": 8}, "cmp": {"group": 2, "hot_share": 0.8}},
    "budgets": [0.4],
    "chunk": 8,
    "sequences": [{"length": LENGTH, "documents": 3}],
    "heldout_share": 0.6,
    "sinks": 2,
    "recent": 4,
    "resamples": 50,
}


def make_parts(folder: Path, architecture: str = "llama") -> Path:
    """A model and two corpus files in a folder."""
    tiny.save_model(folder / "model", architecture)
    tiny.write_jsonl(folder / "a.jsonl", tiny.texts(12, seed=1))
    tiny.write_jsonl(folder / "b.jsonl", tiny.texts(8, seed=2))
    return folder


def config(parts: Path, root: Path, files: tuple[str, ...] = ("a",), **retention: Any) -> Config:
    """A configuration over these parts; `retention` replaces keys of its section."""
    return Config.model_validate(
        {
            "corpus": {"urls": [f"{parts}/{name}.jsonl" for name in files]},
            "model": {"name": f"{parts}/model", "device": "cpu", "threads": 1},
            "windows": {"context_size": 64},
            "storage": {"root": str(root)},
            "retention": {**RETENTION, **retention},
        }
    )
