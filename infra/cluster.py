"""Dask clusters: the local one of this machine, or a running one by its address."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from schemas.config import Dask
from schemas.errors import ConfigError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PRELOAD = ["functok", "infra.worker_preload"]
"""What a worker imports before anything else: functok first, so that it finds functok's packages (`own_packages`)."""

_device = threading.RLock()


@contextmanager
def tokenization_client(settings: Dask, n_parts: int) -> Iterator[Any]:
    """A Dask client for `n_parts` files, or parts of large files.

    The local cluster has one process a core, but no more than there are parts; where there are fewer parts
    than cores, the tokenizer's own threads use the rest.
    """
    if settings.scheduler:
        with _connected(settings.scheduler) as client:
            yield client
        return
    cores = available_cores()
    workers = min(settings.workers or cores, n_parts)
    threads = max(1, cores // workers)
    with _local(workers, {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}) as client:
        yield client


@contextmanager
def extraction_client(settings: Dask, count_devices: Callable[[], int], n_parts: int) -> Iterator[Any]:
    """A Dask client whose workers own a device each, or None where this process does as well.

    Args:
        settings: Names a running scheduler, or none.
        count_devices: Tells how many devices this machine has; not asked where others work, as it may have none.
        n_parts: Independent pieces of work.
    """
    if settings.scheduler:
        with _connected(settings.scheduler) as client:
            yield client
    elif n_parts > 1 and (n_workers := min(count_devices(), n_parts)) > 1:
        with _one_worker_per_gpu(n_workers) as client:
            yield client
    else:
        yield None


@contextmanager
def running_cluster(settings: Dask) -> Iterator[Any]:
    """A Dask client of the scheduler that `settings` name; None where they name none."""
    if settings.scheduler:
        with _connected(settings.scheduler) as client:
            yield client
    else:
        yield None


def one_at_a_time(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a process do such work one at a time: a Dask worker may have several threads, but one model and one device.

    Two threads would read each other's hooks on the shared model, and draw from each other's random numbers.
    """

    @wraps(work)
    def alone(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _device:
            return work(*args, **kwargs)

    return alone


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, timeout="20s")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"dask.scheduler = {address} does not answer: {error}",
            hint="start it with `dask scheduler`, or leave dask.scheduler empty for a local cluster",
        ) from error
    with client:
        client.wait_for_workers(1, timeout=120)
        yield client


@contextmanager
def _local(workers: int, environment: dict[str, str]) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    # Prefect turns every logger on; the cluster's chatter is nobody's news.
    logging.getLogger("distributed").setLevel(logging.ERROR)
    quiet = {"logging.distributed": "error", "distributed.worker.memory.terminate": False}
    with (
        dask.config.set(quiet),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            env=environment,
            preload=PRELOAD,
            silence_logs="ERROR",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _one_worker_per_gpu(devices: int) -> Iterator[Any]:
    from distributed import Client, Nanny, Scheduler, SpecCluster

    workers = {
        index: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "host": "127.0.0.1",
                "env": {"CUDA_VISIBLE_DEVICES": name},
                "preload": PRELOAD,
            },
        }
        for index, name in enumerate(_gpu_names(devices))
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": None}}
    with (
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs="ERROR") as cluster,
        Client(cluster) as client,
    ):
        yield client


def _gpu_names(n: int) -> list[str]:
    """What CUDA calls the first `n` GPUs that this process may use: others' stay hidden from its workers too."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:n] if visible else [str(index) for index in range(n)]
