"""A tiny corpus, tokenized, and configurations that train a tiny model on it; for the tests of pre-training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import plain
import tiny
import torch

from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.pretraining.section import Series
from schemas.work import CorpusShards
from tasks.corpus import tokenization
from tasks.pretraining.training import find_trained, train_series, training_losses_file

BATCH_TOKENS = 256
STEPS = 20


class Training:
    """A folder with a corpus, its tokenizer, and a storage where the corpus is tokenized."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(str(folder / "run"))
        self.progress: list[tuple[int, int, str]] = []

    @classmethod
    def prepare(cls, folder: Path, n_documents: int = 80) -> Training:
        """Make the folder."""
        tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(n_documents))
        tiny.save_tokenizer(folder / "tokenizer")
        made = cls(folder)
        made.shards()
        return made

    def copy(self, folder: Path) -> Training:
        """The same in another folder, with all that was trained."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Training(folder)

    def config(
        self, *, shape: dict[str, Any] | None = None, sections: dict[str, Any] | None = None, **train: Any
    ) -> Config:
        """Four checkpoints (steps 1, 3, 7 and 20) and a state every four steps, unless told otherwise."""
        size = {"hidden_size": 32, "layers": 2, "heads": 2, **(shape or {})}
        values = {
            "tokens": STEPS * BATCH_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "checkpoints": 4,
            "state_every": 4,
            "learning_rate": 1e-2,
            **train,
        }
        return Config.model_validate(
            {
                "corpus": {"urls": [str(self.folder / "corpus.jsonl")]},
                "model": {"tokenizer": str(self.folder / "tokenizer"), "device": "cpu", "threads": 1},
                "windows": {"context_size": 32},
                "storage": {"root": self.storage.root},
                "consolidation": {
                    "series": [{"name": "small", "shape": size}],
                    "train": values,
                    "heldout_share": 0.1,
                },
                **(sections or {}),
            }
        )

    def shards(self) -> CorpusShards:
        """The tokenized corpus; tokenized in this process where it is not yet."""
        watched = tokenization._Watched
        tokenization._Watched = plain.InThisProcess  # type: ignore[misc, assignment]
        try:
            return tokenization.tokenize_corpus(self.config(), self.storage)
        finally:
            tokenization._Watched = watched  # type: ignore[misc]

    def train(self, config: Config, progress: Progress = silent) -> None:
        """Train the configuration's series."""

        def both(done: int, total: int, what: str) -> None:
            self.progress.append((done, total, what))
            progress(done, total, what)

        self.progress.clear()
        train_series(config, self.storage, self.shards(), series_of(config), both)

    def steps(self, config: Config) -> list[int] | None:
        """The steps of its checkpoints, or None."""
        found = find_trained(config, self.storage, self.shards(), series_of(config))
        return None if found is None else [checkpoint.step for checkpoint in found]

    def curve(self, config: Config) -> dict[str, list[float]]:
        """The loss curve, columns by name."""
        name = training_losses_file(config, self.storage, self.shards(), series_of(config))
        return self.storage.read_parquet(name).to_pydict()

    def weights(self, config: Config) -> dict[str, torch.Tensor]:
        """The last checkpoint's."""
        from safetensors.torch import load_file

        found = find_trained(config, self.storage, self.shards(), series_of(config))
        assert found is not None
        folder = self.storage.local_folder(found[-1].model.name.removeprefix("storage:"))
        return load_file(folder / "model.safetensors")

    def states(self) -> list[str]:
        """Folders of states that are there."""
        return sorted({name.split("/")[2] for name in self.storage.sizes("training") if "/state-" in name})


def series_of(config: Config) -> Series:
    """The configuration's one series."""
    assert config.consolidation is not None
    return config.consolidation.series[0]
