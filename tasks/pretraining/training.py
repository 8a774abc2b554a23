"""Pre-training of a series: its checkpoints, found or trained (PAPER 1.4).

Storage: `checkpoints/<key>/`, one a kept step, in Hugging Face format with the tokenizer, so that each loads by itself;
`training/<key>/losses.parquet`, the loss curve of every optimizer step; while it runs, `training/<key>/state-<step>/`.

Where several processes are asked for (`train.processes`, or several GPUs), they are started by `accelerate launch` as
children. A cluster starts them by itself, one command a machine, all on one storage, the corpus tokenized before:

    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --main_process_ip … --num_processes 16 \\
        --module tasks.pretraining.worker configs/paper.toml 8B
"""

from __future__ import annotations

from infra.manifest import load_all
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import FunctokError
from schemas.pretraining.section import Series
from schemas.pretraining.work import Checkpoint
from schemas.work import CorpusShards
from tasks.models.files import IN_STORAGE
from tasks.models.model import model_key
from tasks.pretraining.plan import TrainingPlan, plan_training
from tasks.pretraining.state import LOSSES, STAGE, finished_checkpoints, newest_state


def train_series(
    config: Config, storage: Storage, shards: CorpusShards, series: Series, progress: Progress = silent
) -> None:
    """Train a series with a shape, unless all that is wanted of it is there; a killed training goes on.

    Args:
        config: The configuration, its tokenizer resolved.
        storage: Where everything is kept.
        shards: The tokenized corpus.
        series: What is trained.
        progress: Called with tokens shown.

    Raises:
        ConfigError: if sizes do not fit each other.
        CorpusError: if there is too little text.
        TrainingError: if the training diverges; it names the step and the last good checkpoint.
        FunctokError: if a child process fails.
    """
    from tasks.models.tokenizers import load_tokenizer
    from tasks.pretraining.launch import launch_training
    from tasks.pretraining.loop import packed_rows, run_training
    from tasks.pretraining.trainer import launched_processes

    if find_trained(config, storage, shards, series) is not None:
        return
    plan = plan_training(config, shards, series)
    # Also where others train: the text is in the cache when they start.
    rows = packed_rows(config, storage, shards, plan, load_tokenizer(config.model, storage))
    if launched_processes() == 1:
        plan.warn_of_repeats(rows.epoch_length)
    if plan.processes > 1 and launched_processes() == 1:
        launch_training(config, storage, series, plan.processes, progress)
    else:
        run_training(config, storage, shards, plan, progress)
    if find_trained(config, storage, shards, series) is None:
        raise FunctokError(
            f"checkpoints of series {series.name} vanished while they were made",
            stage=STAGE,
            hint="run again",
        )


def find_trained(
    config: Config, storage: Storage, shards: CorpusShards, series: Series
) -> list[Checkpoint] | None:
    """All checkpoints of a series with a shape, steps ascending; None unless it is trained to its end."""
    from tasks.pretraining.checkpoints import layer_of

    plan = plan_training(config, shards, series)
    finished = finished_checkpoints(storage, plan)
    if len(finished) < len(plan.checkpoint_steps) or not load_all(storage, [plan.folder]):
        return None
    found = []
    for step in plan.checkpoint_steps:
        model = _model(config.model, plan, step)
        found.append(
            Checkpoint(
                series=series.name,
                step=step,
                model=model,
                key=model_key(model, storage),
                layer=layer_of(config, series),
                tokens=int(finished[step].stats["tokens"]),
                parameters=int(finished[step].stats["parameters"]),
            )
        )
    return found


def started_training(
    config: Config, storage: Storage, shards: CorpusShards, series: Series
) -> tuple[int, int]:
    """The optimizer step that a training goes on from (0: from the start), and its last one."""
    plan = plan_training(config, shards, series)
    return newest_state(storage, plan, finished_checkpoints(storage, plan)), plan.steps


def training_losses_file(config: Config, storage: Storage, shards: CorpusShards, series: Series) -> str:
    """Name of the finished training's loss curve (`SHARD_FILES["training_losses"]`) in the storage.

    Raises:
        FunctokError: if the series is not trained to its end.
    """
    plan = plan_training(config, shards, series)
    if not load_all(storage, [plan.folder]):
        raise FunctokError(
            f"series {series.name} is not trained yet", stage=STAGE, hint="run the stage checkpoints"
        )
    return f"{plan.folder}/{LOSSES}"


def _model(own: Model, plan: TrainingPlan, step: int) -> Model:
    """How a checkpoint is loaded; its folder holds the tokenizer too, unless another is named."""
    name = f"{IN_STORAGE}{plan.checkpoint_folder(step)}"
    return own.model_copy(update={"name": name, "revision": None})
