"""Where models run, in which format, and who else runs them."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig

from infra import cluster
from infra.storage import Storage
from schemas.config import Dask, Model
from schemas.errors import ModelError
from tasks.models.devices import resolve_dtype, settle_dtype, usable_devices
from tasks.models.model import load_model, model_key


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose configuration says bfloat16."""
    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    configuration = AutoConfig.from_pretrained(folder)
    configuration.dtype = "bfloat16"
    configuration.save_pretrained(folder)
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within the block, this machine seems to have a GPU."""

    @contextmanager
    def here() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            yield

    return here


def test_auto_is_what_the_machine_chooses_until_a_run_begins(saved: Path, storage: Storage, gpu: Any) -> None:
    model = Model(name=str(saved))
    assert resolve_dtype(model, storage) == torch.float32
    with gpu():
        assert resolve_dtype(model, storage) == torch.bfloat16
        assert resolve_dtype(model.model_copy(update={"device": "cpu"}), storage) == torch.float32
    # A client without a GPU, whose workers have one.
    assert resolve_dtype(model.model_copy(update={"device": "cuda"}), storage) == torch.bfloat16
    assert not storage.sizes()


def test_what_was_begun_on_a_gpu_is_found_and_gone_on_with_on_a_cpu(
    saved: Path, storage: Storage, gpu: Any
) -> None:
    model = Model(name=str(saved))
    with gpu():
        settle_dtype(model, storage)
        key = model_key(model, storage)
    assert resolve_dtype(model, storage) == torch.bfloat16
    loaded = load_model(model, storage)
    assert (loaded.dtype, loaded.key) == (torch.bfloat16, key)
    assert load_model(model, Storage(f"{storage.root}/other")).dtype == torch.float32


def test_what_was_begun_on_a_cpu_goes_on_on_a_gpu_and_says_so(
    saved: Path, storage: Storage, gpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(name=str(saved))
    key = load_model(model, storage).key
    with gpu(), caplog.at_level(logging.WARNING):
        assert model_key(model, storage) == key
        assert settle_dtype(model, storage) == torch.float32
    assert "model.dtype = 'bfloat16'" in caplog.text
    named = model.model_copy(update={"dtype": "bfloat16"})
    assert settle_dtype(named, storage) == torch.bfloat16
    assert [*storage.sizes()] == ["dtype.json"]


def test_what_joins_later_runs_as_what_was_there(
    saved: Path, storage: Storage, gpu: Any, tmp_path: Path
) -> None:
    later = tiny.save_model(tmp_path / "later", seed=3)
    shutil.copy(saved / "config.json", later / "config.json")
    with gpu():
        settle_dtype(Model(name=str(saved)), storage)
    assert load_model(Model(name=str(later)), storage).dtype == torch.bfloat16


def test_a_choice_that_is_none_is_refused(saved: Path, storage: Storage) -> None:
    model = Model(name=str(saved))
    for wrong in (["cpu"], {"auto": "tpu"}, {}):
        storage.write_json("dtype.json", wrong)
        with pytest.raises(ModelError, match=r"names no kind of machine.*set model.dtype"):
            resolve_dtype(model, storage)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("2,3,5", ["2", "3"]), ("GPU-ab, MIG-c", ["GPU-ab", "MIG-c"])],
)
def test_workers_see_the_gpus_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster._gpu_names(2) == names


def test_devices_are_counted_only_where_this_machine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(address: str) -> Iterator[str]:
        yield f"client of {address}"

    monkeypatch.setattr(cluster, "_connected", connected)
    asked = Model(name="m", device="cuda")
    with pytest.raises(ModelError, match="no CUDA device"):
        usable_devices(asked)
    elsewhere = Dask(scheduler="tcp://10.0.0.1:8786")
    with cluster.extraction_client(elsewhere, lambda: usable_devices(asked), 3) as client:
        assert client == "client of tcp://10.0.0.1:8786"
    with cluster.extraction_client(Dask(), lambda: 1, 3) as client:
        assert client is None


def test_a_process_does_such_work_one_at_a_time() -> None:
    inside, most = [0], [0]
    started = threading.Barrier(4)

    @cluster.one_at_a_time
    def work(pause: threading.Event) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        pause.wait(0.05)
        inside[0] -= 1

    def begin() -> None:
        started.wait()
        work(threading.Event())

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
