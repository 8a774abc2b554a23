"""The pipeline without Prefect: the stages, one after another, as the flows make them.

As a program, `python tests/plain.py KILLS` makes a run for each `[CONFIG, PREFIX, NTH]` of a JSON list, in a process
that kills itself with SIGKILL in the middle of the NTH write of a file whose name begins with PREFIX; it prints how
each ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any

from infra.config_file import load_config
from infra.progress import Progress, silent
from infra.storage import Storage
from schemas.config import Config


def run_plain(config: Config, storage: Storage | None = None, *, checked: bool = True) -> Storage:
    """Every stage of a configuration; returns the storage.

    Args:
        config: The configuration.
        storage: Where; default: its own root.
        checked: Also validate at the stage boundaries.
    """
    from tasks import stages
    from tasks.engine import checks, tables

    run = finished(config, storage, *stages.working_stages(config), checked=checked)
    made = [group.build(run) for group in stages.table_groups(config)]
    catalog = tables.candidate(run.storage, made)
    if checked:
        checks.check_tables(run.config, run.storage, catalog, stages.beside(run.storage, catalog))
    tables.publish(run.storage, catalog)
    stages.write_report(run.storage, config)
    return run.storage


def finished(
    config: Config,
    storage: Storage | None = None,
    *stages: Any,
    checked: bool = False,
    progress: Progress = silent,
) -> Any:
    """A `Run` of which these stages are finished, and those that they need.

    Args:
        config: The configuration.
        storage: Where; default: its own root.
        stages: Stages (`tasks.engine.stage.Stage`).
        checked: Also hold each against its expectations.
        progress: Told of the making of each.
    """
    from tasks.engine import checks
    from tasks.engine.run import make
    from tasks.stages import open_run

    storage = storage or Storage(config.storage.root, config.storage.endpoint_url)
    done: list[Any] = []

    def finish(stage: Any) -> None:
        for needed in stage.needs:
            finish(needed)
        if stage not in done:
            # Opened anew for each, as the flows do: a tokenizer may have been trained meanwhile.
            run = open_run(config, storage)
            make(run, stage, progress)
            if checked:
                checks.check(run, stage)
            done.append(stage)

    for stage in stages:
        finish(stage)
    return open_run(config, storage)


def there(run: Any, stage: Any) -> Any:
    """What a stage made, if it is finished; None if anything of it is missing, changed or refused. Makes nothing."""
    return run.result(stage) if run.is_finished(stage) else None


def _killing(prefix: str, nth: int) -> None:
    write, count = Storage.write, [0]

    @contextmanager
    def deadly(self: Storage, name: str) -> Iterator[IO[bytes]]:
        with write(self, name) as file:
            if name.startswith(prefix):
                count[0] += 1
                if count[0] == nth:
                    file.write(b"half a file")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            yield file

    Storage.write = deadly  # type: ignore[method-assign]


def _main() -> None:
    from tasks import stages

    # One process imports, and those that die are copies of it: importing takes longer than such a run.
    for library in {library for stage in stages.spine() for library in stage.libraries}:
        import_module(library)
    for config, prefix, nth in json.loads(sys.argv[1]):
        if (child := os.fork()) == 0:
            _killing(prefix, nth)
            run_plain(load_config(config), checked=False)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _main()
