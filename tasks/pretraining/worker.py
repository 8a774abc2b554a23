"""One process of several that train a series; `accelerate launch --module tasks.pretraining.worker CONFIG SERIES`."""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import psutil

from infra.config_file import load_config
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, FunctokError
from schemas.pretraining.section import consolidation_of
from tasks.corpus.tokenization import TOKENIZE
from tasks.corpus.tokenizer_training import with_tokenizer
from tasks.engine.run import Run
from tasks.pretraining.plan import plan_training
from tasks.pretraining.state import is_trained
from tasks.pretraining.training import FAILURE, REPORT, train_series, write_whole

_WATCH_SECONDS = 2.0


def work(config: Config, name: str, progress: Progress = silent) -> None:
    """Train a series of a configuration whose corpus is tokenized, as one process of a launch."""
    found = [
        series
        for series in consolidation_of(config).series
        if series.name == name and series.shape is not None
    ]
    if not found:
        raise ConfigError(f"there is no series {name} with a shape", hint="see consolidation.series")
    storage = Storage(config.storage.root, config.storage.endpoint_url)
    resolved = with_tokenizer(config, storage)
    run = None if resolved is None else Run(resolved, storage)
    if run is None or not run.is_finished(TOKENIZE):
        raise FunctokError("the corpus is not tokenized yet", hint="functok run --only tokenize comes first")
    shards = run.result(TOKENIZE)
    plan = plan_training(run.config, shards, found[0])
    if not is_trained(storage, plan):
        train_series(run.config, storage, shards, plan, progress)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tasks.pretraining.worker", description=__doc__)
    parser.add_argument("config", type=Path, help="TOML, or JSON as pydantic dumps it")
    parser.add_argument("series", help="name of a series with a shape")
    parser.add_argument("--report", type=Path, help="folder for progress and failure")
    parser.add_argument("--parent", type=int, help="process without which this one ends")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        _end_with(arguments.parent)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if arguments.config.suffix == ".json":
            config = Config.model_validate_json(arguments.config.read_text())
        else:
            config = load_config(arguments.config)
        work(config, arguments.series, _reporter(arguments.report) if is_first else silent)
    except FunctokError as error:
        if arguments.report is not None and is_first:
            told = {"message": error.message, "hint": error.hint, "stage": error.stage}
            write_whole(arguments.report / FAILURE, {"kind": type(error).__name__, **told})
        raise SystemExit(str(error)) from error
    finally:
        _leave_group()


def _reporter(folder: Path | None) -> Progress:
    if folder is None:
        return silent
    return lambda done, total, what: write_whole(folder / REPORT, [done, total, what])


def _end_with(parent: int) -> None:
    """End this process when that one has."""
    try:
        born = psutil.Process(parent).create_time()
    except psutil.NoSuchProcess:
        os._exit(1)

    def is_there() -> bool:
        try:
            return bool(psutil.Process(parent).create_time() == born)
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while is_there():
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
