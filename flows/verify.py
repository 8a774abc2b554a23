"""Whether what is stored is what was written: everything under a root is read, and made anew where it is damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import get_run_logger

from flows.artifacts import show_damage
from flows.reproduce import reproduce
from flows.stage import open_storage, reported_progress, stage_flow, step
from infra.storage import REPAIR, Storage
from schemas.config import Config
from schemas.errors import DamagedError

if TYPE_CHECKING:
    from tasks.upkeep.verify import Verification


@stage_flow("verify", "verify {title}")
def verify(config: Config, repair: bool = False) -> None:
    """Read everything under the root and hold it against its hashes.

    Args:
        config: The whole configuration; without `repair`, `storage` alone matters.
        repair: Remove what is damaged and what was made from it, and make it anew.
    """
    from tasks.upkeep import verify as verification

    logger = get_run_logger()
    storage = open_storage(config)
    found = read_everything(config, storage)
    rows = [{"file": entry.name, "what": entry.why} for entry in found.damaged]
    rows += [{"file": folder, "what": "made from what is damaged"} for folder in found.suspects]
    show_damage(storage, rows, found.n_files, found.n_bytes)
    for row in rows:
        logger.error("%s: %s", row["file"], row["what"])
    if not found.damaged:
        logger.info("%d files under %s are as they were written", found.n_files, storage.root)
    elif repair:
        verification.repair(storage, found)
        reproduce(config)
    else:
        raise DamagedError(
            f"{len(found.damaged)} files under {storage.root} are damaged, {found.damaged[0].name} among them",
            hint=f"run this deployment with repair, or: {REPAIR}",
        )


@step("verify", "read everything")
def read_everything(config: Config, storage: Storage) -> Verification:
    """Hash every file and hold it against its manifest."""
    from tasks.upkeep import verify as verification

    with reported_progress("verify", config) as progress:
        return verification.verify_root(storage, progress)
