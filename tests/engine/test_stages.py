"""All stages of a configuration: their order, what of them a run would do now, and why."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import make_config

from infra.catalog import CATALOG, read_catalog
from infra.config_file import load_config
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, DictionaryError, FunctokError
from schemas.work import StagePlan
from tasks.report.report import REPORT
from tasks.stages import (
    is_up_to_date,
    open_run,
    plan_run,
    stage_named,
    stages_of,
    table_groups,
    unit_folders,
    working_stages,
)

SPINE = ("tokenize", "dictionaries", "features", "tables", "report")


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(finished: Path, root: Path) -> Config:
    return load_config(finished / "tiny.toml", root=str(root))


def told(config: Config) -> list[tuple[str, int, int | None, str]]:
    plans = plan_run(config, Storage(config.storage.root))
    return [(plan.stage, plan.done, plan.missing, plan.reason) for plan in plans]


def with_more(config: Config, tmp_path: Path) -> Config:
    """One file more."""
    tiny.write_jsonl(tmp_path / "more.jsonl", tiny.texts(3, seed=8))
    urls = [*config.corpus.urls, f"file://{tmp_path}/more.jsonl"]
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"urls": urls})})


# ---- which stages there are


def test_a_run_walks_through_the_stages_that_apply(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    config, counting = make_config(storage), make_config(storage, layers=())
    assert stages_of(config) == SPINE
    assert stages_of(counting) == ("tokenize", "tables", "report")
    assert [stage.name for stage in working_stages(counting)] == ["tokenize"]
    assert [group.name for group in table_groups(config)] == ["corpus", "graph", "features"]
    assert [group.name for group in table_groups(counting)] == ["corpus"]
    assert stages_of(config, only="features") == ("features",)
    assert stages_of(config, start_from="features") == ("features", "tables", "report")
    # A place in the order, whether or not there is anything to do at it.
    assert stages_of(counting, start_from="features") == ("tables", "report")
    with pytest.raises(ConfigError, match="exclude each other"):
        stages_of(config, only="tables", start_from="tables")


@pytest.mark.parametrize("name", ["dictionaries", "features"])
def test_a_stage_that_does_not_apply_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    counting = make_config(Storage(str(tmp_path)), layers=())
    with pytest.raises(
        FunctokError, match=f"the stage {name} does not apply to this configuration"
    ) as caught:
        stages_of(counting, only=name)
    assert caught.value.hint.startswith("it has tokenize, tables, report; ")
    assert "[[sae]]" in caught.value.hint
    error = stage_named(name).refuse(counting)
    assert (error.stage, "no sae entry" in error.message) == (name, True)


def test_stages_are_known_by_name_and_tell_where_their_folders_lie() -> None:
    assert stage_named("features").name == "features"
    with pytest.raises(KeyError):
        stage_named("tables")
    assert unit_folders() >= {
        *("tokens", "tokenizers", "models", "heldout", "dictionaries", "residuals", "features", "tables"),
    }


# ---- what a run would do


def test_a_finished_run_has_nothing_to_do_and_says_so(config: Config, root: Path) -> None:
    before = Storage(str(root)).listing()
    assert told(config) == [
        ("tokenize", 1, 0, "all token shards are there"),
        ("dictionaries", 1, 0, "all dictionaries are there"),
        ("features", 1, 0, "all feature shards are there"),
        ("tables", 1, 0, "the published tables are current"),
        ("report", 1, 0, "the report is of these tables"),
    ]
    assert Storage(str(root)).listing() == before
    plans = plan_run(config, Storage(str(root)), verify=True)
    assert is_up_to_date(plans, SPINE)


def test_a_fresh_root_knows_no_more_than_its_files(config: Config, root: Path) -> None:
    shutil.rmtree(root)
    files = "token shards: files are new or changed, or what tokenization reads of the configuration is"
    assert told(config) == [
        ("tokenize", 0, 1, files),
        ("dictionaries", 0, None, "known once tokenize is done"),
        ("features", 0, None, "known once tokenize and dictionaries are done"),
        ("tables", 0, None, "known once the shards are there"),
        ("report", 0, None, "known once the tables are there"),
    ]
    assert not root.exists()


def test_a_file_that_joins_is_named(config: Config, tmp_path: Path) -> None:
    more = with_more(config, tmp_path)
    tokenize, dictionaries, *_ = plan_run(more, Storage(config.storage.root))
    assert (tokenize.done, tokenize.missing) == (1, 1)
    assert tokenize.details == (f"tokenize file://{tmp_path}/more.jsonl",)
    assert dictionaries.missing is None
    assert not is_up_to_date([tokenize, dictionaries], SPINE)


@pytest.mark.parametrize(
    ("top", "place", "expected"),
    [
        ("dictionaries", 1, (0, 1, "dictionaries: a layer's is new, or what makes it changed")),
        (
            "features",
            2,
            (
                0,
                1,
                "feature shards: they are new or damaged, or their model, windows or dictionary changed",
            ),
        ),
    ],
)
def test_what_is_gone_is_to_do_and_what_follows_is_not_known(
    config: Config, root: Path, top: str, place: int, expected: tuple[Any, ...]
) -> None:
    shutil.rmtree(root / top)
    found = told(config)
    assert found[place][1:] == expected
    after = [missing for _, _, missing, _ in found[place + 1 :]]
    assert after == [None] * len(after)
    (details,) = plan_run(config, Storage(str(root)))[place].details
    assert ("layer 1" in details) or details.endswith(": layers 1")


def test_tables_and_report_follow_what_is_published(config: Config, root: Path) -> None:
    (root / REPORT).unlink()
    assert told(config)[4][1:] == (0, 1, "the report is missing or of other tables")
    share = config.function_tokens.model_copy(update={"share": 0.9})
    other = told(config.model_copy(update={"function_tokens": share}))
    assert [missing for _, _, missing, _ in other] == [0, 0, 0, 1, 1]
    storage = Storage(str(root))
    storage.delete(read_catalog(storage).tables["coverage"].rpartition("/")[0])
    assert told(config)[3][1:] == (0, 1, "the published tables are missing or of other shards")
    (root / CATALOG).unlink()
    assert told(config)[4][1:] == (0, 1, "the tables will change")


def test_what_does_not_fit_is_said_before_anything_is_looked_for(config: Config) -> None:
    sae = [config.sae[0].model_copy(update={"layer": 99})]
    wrong = config.model_copy(update={"sae": sae})
    with pytest.raises(DictionaryError, match="99"):
        plan_run(wrong, Storage(config.storage.root))
    # The stage itself says it too, for whoever makes it without asking before.
    with pytest.raises(DictionaryError, match="99"):
        open_run(wrong, Storage(config.storage.root)).find(stage_named("dictionaries"))


def test_a_limit_leaves_the_files_behind_it_alone(config: Config, tmp_path: Path) -> None:
    def limited(documents: int) -> StagePlan:
        more = with_more(config, tmp_path)
        corpus = more.corpus.model_copy(update={"max_documents": documents})
        return plan_run(more.model_copy(update={"corpus": corpus}), Storage(config.storage.root))[0]

    # The first file has 20 documents; what the second gives is known where it is asked for.
    assert (limited(20).done, limited(20).missing) == (2, 0)
    assert (limited(21).done, limited(21).missing) == (1, 1)
