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
from schemas.pretraining.section import Series, consolidation_of
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards
from tasks.corpus.tokenization import TOKENIZE
from tasks.engine.run import Run, make
from tasks.pretraining.checkpoints import CHECKPOINTS
from tasks.pretraining.tables import training_losses
from tasks.stages import open_run

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

    def run(self, config: Config) -> Run:
        """The configuration's run, as it stands now."""
        return open_run(config, self.storage)

    def shards(self) -> CorpusShards:
        """The tokenized corpus; tokenized where it is not yet."""
        shards: CorpusShards = plain.finished(self.config(), self.storage, TOKENIZE).result(TOKENIZE)
        return shards

    def train(self, config: Config, progress: Progress = silent) -> None:
        """Train the configuration's series; its corpus is tokenized anew where its tokenizer was changed."""

        def both(done: int, total: int, what: str) -> None:
            self.progress.append((done, total, what))
            progress(done, total, what)

        self.shards()
        self.progress.clear()
        make(self.run(config), CHECKPOINTS, both)

    def checkpoints(self, config: Config) -> list[Checkpoint] | None:
        """Its checkpoints, or None."""
        run = self.run(config)
        return run.result(CHECKPOINTS) if run.is_finished(CHECKPOINTS) else None

    def steps(self, config: Config) -> list[int] | None:
        """The steps of its checkpoints, or None."""
        found = self.checkpoints(config)
        return None if found is None else [checkpoint.step for checkpoint in found]

    def curve_file(self, config: Config) -> str:
        """Where the loss curve is."""
        return training_losses(self.run(config))[series_of(config).name]

    def curve(self, config: Config) -> dict[str, list[float]]:
        """The loss curve, columns by name."""
        return self.storage.read_parquet(self.curve_file(config)).to_pydict()

    def weights(self, config: Config) -> dict[str, torch.Tensor]:
        """The last checkpoint's."""
        from safetensors.torch import load_file

        found = self.checkpoints(config)
        assert found is not None
        folder = self.storage.local_folder(found[-1].model.name.removeprefix("storage:"))
        return load_file(folder / "model.safetensors")

    def states(self) -> list[str]:
        """Folders of states that are there."""
        return sorted({name.split("/")[2] for name in self.storage.sizes("training") if "/state-" in name})


def series_of(config: Config) -> Series:
    """The configuration's one series."""
    return consolidation_of(config).series[0]
