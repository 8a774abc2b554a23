"""`functok verify` and `functok gc`: what is damaged under a root, and what nothing reaches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from infra.storage import REPAIR, Storage
from infra.terminal import printable, terminal_progress
from schemas.config import Config
from schemas.errors import ConfigError, DamagedError

_SHOWN = 20


def verify(
    storage: Storage, config: Config | None, *, repair: bool, keep_suspects: bool, debug: bool = False
) -> None:
    """Read everything, tell what is damaged, and mend it where asked.

    Args:
        storage: The root.
        config: What is run to make anew what was removed; None: nothing is run.
        repair: Remove what is damaged, and what was made from it.
        keep_suspects: Keep what was made from it.
        debug: Show Prefect's own log.

    Raises:
        ConfigError: if nothing is stored there.
        DamagedError: if anything is damaged and `repair` is not asked for.
    """
    from tasks.upkeep import verify as verification

    with terminal_progress(plain=debug) as progress:
        found = verification.verify_root(storage, progress)
    if not found.n_files and not found.damaged:
        raise _nothing_at(storage)
    for entry in found.damaged:
        print(printable(f"damaged: {entry.name}: {entry.why}"))
    for folder in found.suspects:
        print(printable(f"made from what is damaged: {folder}"))
    if found.unknown:
        print(
            f"{len(found.unknown)} files that no hash is known of, {printable(found.unknown[0])} among them: what "
            "killed writers left (`functok gc`), or an older functok wrote"
        )
    print(
        f"{found.n_files:,} files, {found.n_bytes:,} bytes read under {storage.root}: {len(found.damaged)} damaged"
    )
    if not found.damaged:
        return
    if not repair:
        raise DamagedError(
            f"{len(found.damaged)} of {found.n_files} files under {storage.root} are damaged", hint=REPAIR
        )
    for name in verification.repair(storage, found, suspects=not keep_suspects):
        print(printable(f"removed: {name}"))
    if config is None:
        print("the next `functok run CONFIG` makes anew what it needs of that")
        return
    from functok.pipeline import run_pipeline

    run_pipeline(config, storage, only=None, start_from=None, debug=debug)


def collect(storage: Storage, configs: Sequence[Config], *, delete: bool, hours: float) -> None:
    """Tell what nothing reaches, and delete it where asked.

    Args:
        storage: The root.
        configs: What the root is used with; none: finished work is left alone.
        delete: Delete it.
        hours: What is younger is left alone.

    Raises:
        ConfigError: if nothing is stored there, or a configuration is of another root, or not finished.
        DamagedError: if the catalogue is damaged.
    """
    from tasks.upkeep.gc import delete_garbage, find_garbage

    found = find_garbage(storage, configs, older_than=3600 * hours)
    if not found and not storage.sizes():
        raise _nothing_at(storage)
    for why, group in groupby(found, key=lambda entry: entry.why):
        entries = list(group)
        print(f"{why}: {len(entries)}, {sum(entry.n_bytes for entry in entries):,} bytes")
        for entry in entries[:_SHOWN]:
            print(printable(f"  {entry.name} ({entry.n_bytes:,} bytes)"))
        if len(entries) > _SHOWN:
            print(f"  … and {len(entries) - _SHOWN} more")
    total = sum(entry.n_bytes for entry in found)
    if not delete:
        print(f"{len(found)} to delete, {total:,} bytes" + (": --delete does it" if found else ""))
        return
    removed = delete_garbage(storage, found)
    print(f"deleted {len(removed)}, {sum(entry.n_bytes for entry in removed):,} bytes")


def _nothing_at(storage: Storage) -> ConfigError:
    return ConfigError(f"there is nothing of functok's at {storage.root}", hint="give --root")
