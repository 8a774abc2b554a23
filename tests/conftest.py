"""Fixtures for all tests. Nothing here may import functok: `FUNCTOK_CACHE` is read when it is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration (`tiny.toml`) and its finished run (`run`), to be left as it is."""
    import plain
    import tiny

    from infra.config_file import load_config

    folder = tmp_path_factory.mktemp("finished")
    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(20))
    (folder / "tiny.toml").write_text(
        f'[corpus]\nurls = ["{folder}/corpus.jsonl"]\n[model]\nname = "{folder}/model"\n'
        f'[windows]\ncontext_size = 64\n[[sae]]\nlayer = 1\npath = "{folder}/sae"\n[storage]\nroot = "{folder}/run"\n'
    )
    plain.run_plain(load_config(folder / "tiny.toml"))
    return folder
