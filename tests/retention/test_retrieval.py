"""The stage `retrieval`: units, rows, the table, and that a policy added asks that policy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import small
from builders import commit_again
from plain import finished

from infra.storage import Storage
from schemas.errors import ConfigError, ExpectationError, ModelError
from schemas.retention.tables import SHARD_FILES, TABLES
from sql import read_sql
from tasks.engine import checks
from tasks.engine.run import make
from tasks.retention.readings import READINGS
from tasks.retention.retrieval import RETRIEVAL, file_of
from tasks.retention.setups import check_fit

ASKED: dict[str, Any] = {"tasks": ["passkey"], "lengths": [110], "depths": [0.0, 1.0], "n": 2}
POLICIES = ["streaming", "function", "cmp"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = small.make_parts(tmp_path_factory.mktemp("parts"))
    # Random weights do not know how many positions they were made for.
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    config.max_position_embeddings = 512
    config.save_pretrained(folder / "model")
    return folder


def config(parts: Path, root: Path, **changed: Any) -> Any:
    return small.config(
        parts, root, **{"policies": POLICIES, "options": {"cmp": {"group": 2, "hot_share": 0.8}}, **changed}
    )


@pytest.mark.slow
def test_answers_become_a_table_and_a_policy_added_is_asked_alone(parts: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path, retrieval={**ASKED, "policies": ["streaming", "function"]})
    run = finished(asked, None, RETRIEVAL, checked=True)
    result = run.result(RETRIEVAL)
    assert [(unit.policy, unit.budget, unit.n) for unit in result] == [
        ("full", 1.0, 4),
        ("streaming", 0.4, 4),
        ("function", 0.4, 4),
    ]
    made: list[tuple[int, int, str]] = []
    more = finished(
        config(parts, tmp_path, retrieval=ASKED),
        None,
        RETRIEVAL,
        checked=True,
        progress=lambda *told: made.append(told),
    )
    found = more.result(RETRIEVAL)
    assert [unit.folder for unit in found[:3]] == [unit.folder for unit in result]
    assert max(total for _, total, measure in made if measure == RETRIEVAL.measure) == 4
    storage = Storage(str(tmp_path))
    rows = [row for unit in found for row in pq.read_table(tmp_path / file_of(unit.folder)).to_pylist()]
    assert {name for row in rows for name in row} == set(SHARD_FILES["retrieval_answers"].names)
    connection = duckdb.connect()
    tables = [storage.root + "/" + file_of(unit.folder) for unit in found]
    connection.execute(f"CREATE VIEW shard_retrieval_answers AS SELECT * FROM read_parquet({tables})")
    table = connection.execute(read_sql("retention_retrieval")).to_arrow_table()
    assert table.column_names == TABLES["retention_retrieval"].names
    assert table.num_rows == 4 * 2
    for row in table.to_pylist():
        here = [
            r
            for r in rows
            if all(r[name] == row[name] for name in ("policy", "budget", "task", "length", "depth"))
        ]
        full = [r for r in rows if r["policy"] == "full" and r["depth"] == row["depth"]]
        assert row["n"] == 2
        assert row["exact_match"] == sum(r["exact_match"] for r in here) / 2
        assert row["answer_logprob"] == pytest.approx(sum(r["answer_logprob"] for r in here) / 2)
        assert row["full_answer_logprob"] == pytest.approx(sum(r["answer_logprob"] for r in full) / 2)
        assert row["counts"] == (sum(r["exact_match"] for r in rows if r["policy"] == "full") >= 3.6)
    assert len({row["answer_logprob"] for row in rows}) > 4


def test_what_is_not_asked_for_has_no_units(parts: Path, tmp_path: Path) -> None:
    run = finished(config(parts, tmp_path), None)
    assert not RETRIEVAL.applies(run.config)
    assert RETRIEVAL.units(run) == []
    assert "[retention.retrieval]" in RETRIEVAL.refuse(run.config).hint


def test_contexts_that_are_too_short_are_refused_before_work(parts: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path, retrieval={**ASKED, "lengths": [20]})
    with pytest.raises(ConfigError, match="a context of 20 tokens has no room for the task passkey"):
        finished(asked, None, RETRIEVAL)
    assert not (tmp_path / "retrieval").exists()
    with pytest.raises(ConfigError, match="a context of 20 tokens has no room for the task passkey"):
        finished(asked, None, READINGS)
    assert not (tmp_path / "retention").exists()


def test_contexts_without_room_for_a_choice_or_a_question_are_refused_before_work(
    parts: Path, tmp_path: Path
) -> None:
    asked = config(parts, tmp_path, budgets=[0.4], retrieval={**ASKED, "budgets": [0.05]})
    with pytest.raises(ConfigError, match="leaves 5 tokens in each head"):
        check_fit(asked, Storage(str(tmp_path)), {})
    asked = config(parts, tmp_path, retrieval={**ASKED, "lengths": [500]})
    check_fit(asked, Storage(str(tmp_path)), {})
    with pytest.raises(ModelError, match="with its question and answer, more than"):
        finished(asked, None, RETRIEVAL)


@pytest.mark.slow
def test_missing_answers_are_told(parts: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path, retrieval={**ASKED, "policies": ["streaming"]})
    run = finished(asked, None, RETRIEVAL)
    folder = make(run, RETRIEVAL)[1].folder
    name = tmp_path / file_of(folder)
    pq.write_table(pq.read_table(name).slice(1), name)
    commit_again(run.storage, folder)
    with pytest.raises(ExpectationError, match="all prompts are answered"):
        checks.check(run, RETRIEVAL)
