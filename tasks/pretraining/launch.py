"""Several processes on this machine: `accelerate launch` as a child, which starts `tasks.pretraining.worker`.

The child gets its configuration as a file; what it has done and why it failed come back as files, replaced whole.
It leads a session of its own and is ended with all that it started when the parent leaves, however it leaves;
workers whose parent was killed end themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from infra.children import end_processes, last_lines, own_program
from infra.progress import Progress
from infra.storage import Storage
from schemas import errors
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.pretraining.section import Series

REPORT, FAILURE = "progress.json", "failure.json"
_POLL_SECONDS = 0.5


def launch_training(
    config: Config, storage: Storage, series: Series, processes: int, progress: Progress
) -> None:
    """Train a series in that many processes.

    Raises:
        FunctokError: what the first process raised, or the end of what the child said.
    """
    with tempfile.TemporaryDirectory() as aside, tempfile.TemporaryFile() as log:
        place = Path(aside)
        (place / "config.json").write_text(as_written(config, storage).model_dump_json())
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
                *("--num_processes", str(processes), "--num_machines", "1", "--machine_rank", "0"),
                *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
                *(*own_program("tasks.pretraining.worker")[1:], str(place / "config.json"), series.name),
                *("--report", aside, "--parent", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        seen = None
        try:
            while child.poll() is None:
                seen = _pass_on(place, progress, seen)
                time.sleep(_POLL_SECONDS)
        finally:
            end_processes([child.pid])
        _pass_on(place, progress, seen)
        if child.returncode:
            raise _failure(place) or FunctokError(
                f"the processes that train series {series.name} ended with status {child.returncode}:\n"
                f"{last_lines(log)}",
                stage="checkpoints",
                hint="run again: it goes on from the last state",
            )


def as_written(config: Config, storage: Storage) -> Config:
    """The configuration before its tokenizer was resolved, so that it can be validated again."""
    root = config.storage.model_copy(update={"root": storage.root, "endpoint_url": storage.endpoint_url})
    update: dict[str, object] = {"storage": root}
    if config.vocabulary_size is not None:
        update["model"] = config.model.model_copy(update={"tokenizer": None})
    return config.model_copy(update=update)


def write_whole(path: Path, value: object) -> None:
    """Replace a small JSON file, so that a reader sees the old or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value))
    aside.replace(path)


def _pass_on(place: Path, progress: Progress, seen: str | None) -> str | None:
    """Report what is new since `seen`; returns what has been seen now."""
    try:
        told = (place / REPORT).read_text()
    except FileNotFoundError:
        return None
    if told != seen:
        progress(*json.loads(told))
    return told


def _failure(place: Path) -> FunctokError | None:
    try:
        told = json.loads((place / FAILURE).read_text())
    except FileNotFoundError:
        return None
    kind = getattr(errors, told["kind"], FunctokError)
    failure: FunctokError = kind(told["message"], hint=told["hint"], stage=told["stage"])
    return failure
