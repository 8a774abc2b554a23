"""Pre-training of a series, in this process or in several (PAPER 1.4).

Storage: `checkpoints/<key>/`, one a kept step, in Hugging Face format with the tokenizer, so that each loads by itself;
`training/<key>/losses.parquet`, the loss curve of every optimizer step; while it runs, `training/<key>/state-<step>/`.

Where several processes are asked for (`train.processes`, or several GPUs), `accelerate launch` is started as a child,
which starts `tasks.pretraining.worker`. The child gets its configuration as a file; what it has done and why it failed
come back as files, replaced whole. It leads a session of its own and is ended with all that it started when the parent
leaves, however it leaves; workers whose parent was killed end themselves. A cluster starts them by itself, one command
a machine, all on one storage, the corpus tokenized before:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --main_process_ip … --num_processes 16 \\
        --module tasks.pretraining.worker configs/paper.toml 8B
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
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas import errors
from schemas.config import Config
from schemas.errors import FunctokError
from schemas.pretraining.section import consolidation_of
from schemas.work import CorpusShards
from tasks.models.tokenizers import load_tokenizer
from tasks.pretraining.loop import packed_rows, run_training
from tasks.pretraining.plan import TrainingPlan
from tasks.pretraining.state import STAGE
from tasks.pretraining.trainer import launched_processes

REPORT, FAILURE = "progress.json", "failure.json"
_POLL_SECONDS = 0.5


def train_series(
    config: Config, storage: Storage, shards: CorpusShards, plan: TrainingPlan, progress: Progress = silent
) -> None:
    """Train a series to its end, telling tokens shown; a training that was killed goes on.

    Raises:
        CorpusError: if there is too little text.
        TrainingError: if the training diverges; it names the step and the last good checkpoint.
        FunctokError: if a child process fails.
    """
    # Also where others train: the text is in the cache when they start.
    rows = packed_rows(config, storage, shards, plan, load_tokenizer(config.model, storage))
    if launched_processes() == 1:
        plan.warn_of_repeats(rows.epoch_length)
    if plan.processes > 1 and launched_processes() == 1:
        _launch(config, storage, plan, progress)
    else:
        run_training(config, storage, shards, plan, progress)


def _launch(config: Config, storage: Storage, plan: TrainingPlan, progress: Progress) -> None:
    """Train in as many processes as are asked for; raises what the first raised, or the end of what the child said."""
    with tempfile.TemporaryDirectory() as aside, tempfile.TemporaryFile() as log:
        place = Path(aside)
        (place / "config.json").write_text(as_written(config, storage).model_dump_json())
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
                *("--num_processes", str(plan.processes), "--num_machines", "1", "--machine_rank", "0"),
                *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
                *(*own_program("tasks.pretraining.worker")[1:], str(place / "config.json"), plan.series),
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
                f"the processes that train series {plan.series} ended with status {child.returncode}:\n"
                f"{last_lines(log)}",
                stage=STAGE,
                hint="run again: it goes on from the last state",
            )


def as_written(config: Config, storage: Storage) -> Config:
    """The configuration before its tokenizer was resolved, so that it can be validated again."""
    root = config.storage.model_copy(update={"root": storage.root, "endpoint_url": storage.endpoint_url})
    update: dict[str, object] = {"storage": root}
    if consolidation_of(config).trains_tokenizer:
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
