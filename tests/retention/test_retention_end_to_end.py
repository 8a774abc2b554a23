"""Retention from corpus to report, as people run it: its flows under Prefect, with Dask workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
from plain import run_plain

from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config
from schemas.retention.tables import TABLES
from tasks.stages import is_up_to_date, plan_run, stages_of

pytestmark = pytest.mark.slow

POLICIES = ["window", "streaming", "random", "function", "content", "str", "str-gate", "cmp"]
OF_THE_MOMENT = {"tokens_per_second", "full_tokens_per_second", "speed_ratio"}


def config_for(parts: Path, root: Path, **dask: str) -> Config:
    config = small.config(
        parts,
        root,
        policies=POLICIES,
        options={"cmp": {"group": 2, "hot_share": 0.8}, "str-gate": {"policy": "str", "gate": True}},
        layers_every=3,
        gate_sequences=1,
        gate_length=64,
        speed={"policies": ["str"], "budgets": [0.4], "lengths": [64], "tokens": 2, "turns": 2},
        retrieval={"tasks": ["passkey"], "lengths": [80], "depths": [0.5], "n": 1, "policies": ["streaming"]},
    )
    return Config.model_validate({**config.model_dump(mode="json", exclude_defaults=True), "dask": dask})


def contents(storage: Storage) -> dict[str, Any]:
    """All rows of retention's tables, without speeds."""
    found = {}
    with connect(storage) as connection:
        for table in sorted({*TABLES} - {"retention_speed"}):
            columns = [name for name in TABLES[table].names if name not in OF_THE_MOMENT]
            found[table] = connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    return found


@pytest.mark.cluster
@pytest.mark.usefixtures("prefect_api")
def test_flows_and_workers_give_the_tables_of_a_plain_run(tmp_path: Path) -> None:
    from distributed import LocalCluster

    from flows.reproduce import reproduce

    parts = small.make_parts(tmp_path)
    here = run_plain(config_for(parts, tmp_path / "here"))
    with LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address=None) as cluster:
        there = config_for(parts, tmp_path / "there", scheduler=cluster.scheduler_address)
        reproduce(there)
    storage = Storage(there.storage.root)
    found = contents(storage)
    assert found == contents(here)
    assert all(found.values())
    assert is_up_to_date(plan_run(there, storage), stages_of(there))
    report = (tmp_path / "there" / "report.html").read_text()
    for title in (
        "Survival: str",
        "Error propagation: cmp",
        "Overhead and speed: str",
        "Coherence: str-gate",
    ):
        assert title in report
    assert "Function against content tokens" in report
