"""Fixtures for all tests. Nothing here may import functok: `FUNCTOK_CACHE` is read when it is imported."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

_CACHE = tempfile.mkdtemp(prefix="functok-test-cache-")
os.environ["FUNCTOK_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
# Prefect's empty database takes 10 s to make: all processes share it, and so does the next session.
_DATABASES = Path(__file__).parents[1] / ".pytest_cache" / "prefect"
_DATABASES.mkdir(parents=True, exist_ok=True)
Path(_CACHE, "prefect").symlink_to(_DATABASES)
# No test asks a hub: without this, a name that is nowhere is retried for most of a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nobody pulls the plug during a test; a kill loses nothing that was written. A sync waits for the disk, 4 ms and more.
os.fsync = lambda handle: None
# Threads that wait by spinning take the cores from the other processes of the suite.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, settings  # noqa: E402
from prefect_home import prefect_api, prefect_database  # noqa: E402
from s3 import ceph_server, moto_root, moto_server, s3_root  # noqa: E402
from s3_proxy import s3_proxy  # noqa: E402
from suite import Groups, Starts, arrange  # noqa: E402

# A busy machine is no failure.
settings.register_profile("functok", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("functok")

__all__ = [
    "ceph_server",
    "moto_root",
    "moto_server",
    "prefect_api",
    "prefect_database",
    "s3_proxy",
    "s3_root",
]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Starts(), "functok-starts")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    arrange(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups | None:
    return Groups(config, log) if config.getvalue("dist") == "loadfile" else None


_loaded = 0


def pytest_runtest_setup() -> None:
    """Leave libraries out of the garbage collector: looking through them takes 0.4 s whenever a model is freed."""
    global _loaded
    if len(sys.modules) != _loaded:
        gc.collect()
        gc.freeze()
        _loaded = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _judged_by_count() -> Iterator[None]:
    """Expectations are asked, but Great Expectations judges and shows what is found only where it is the subject."""
    from tasks.engine import checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "judge", lambda storage, stage, findings: by_count(findings))
        yield


def by_count(findings: Sequence[Any]) -> dict[str, bool]:
    """What `judge` says of findings, without the half second of Great Expectations, and the 4 s of its import."""
    return {finding.expectation.name: finding.count == 0 for finding in findings}


@pytest.fixture
def great_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Great Expectations judges in this test, and makes Data Docs."""
    from tasks.engine import checks, data_docs

    monkeypatch.setattr(checks, "judge", data_docs.judge)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration (`tiny.toml`) and its finished run (`run`), Data Docs too, to be left as it is."""
    import plain
    import tiny

    from infra.config_file import load_config
    from tasks.engine import checks, data_docs

    folder = tmp_path_factory.mktemp("finished")
    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(20))
    (folder / "tiny.toml").write_text(
        f'[corpus]\nurls = ["{folder}/corpus.jsonl"]\n[model]\nname = "{folder}/model"\n'
        f'[windows]\ncontext_size = 64\n[[sae]]\nlayer = 1\npath = "{folder}/sae"\n[storage]\nroot = "{folder}/run"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "judge", data_docs.judge)
        plain.run_plain(load_config(folder / "tiny.toml"))
    return folder
