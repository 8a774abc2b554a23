"""What `functok status` says of reactivation and steering, from nothing to a finished run, without reading a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import run_of
from plain import finished

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, FunctokError
from schemas.steering.work import Steered
from tasks.corpus.tables import CorpusTables
from tasks.corpus.tokenization import TOKENIZE
from tasks.dictionaries.dictionaries import DICTIONARIES
from tasks.engine.checks import check, check_tables
from tasks.engine.run import Run, make, plan
from tasks.engine.tables import are_published, candidate, publish
from tasks.graph.feature_tables import FEATURE_TABLES
from tasks.graph.features import FEATURES
from tasks.graph.tables import GRAPH
from tasks.stages import is_up_to_date, open_run, plan_run, stages_of, table_groups, working_stages
from tasks.steering import EXPERIMENT, prompt_features, steering
from tasks.steering.reactivation import REACTIVATION
from tasks.steering.steering import STEERING
from tasks.steering.tables import STEERING_GROUP

CASES = """
[[case]]
name = "cities"
relation = "capital"
prompts = ["the river of Russia is that", "the river of Moscow is that"]
[[trait]]
name = "east"
positive = ["Tokyo was the", "all of Tokyo the", "Tokyo that is the"]
negative = ["London was the", "all of London the", "London that is the"]
[[steer]]
traits = ["east"]
prompt = "there was the"
target = " river"
"""
STEPS = ("reactivation", "steering")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae", "standard")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(20))
    return folder


@pytest.fixture
def config(parts: Path, tmp_path: Path) -> Config:
    (tmp_path / "cases.toml").write_text(CASES)
    return Config.model_validate(
        {
            "corpus": {"urls": [str(parts / "corpus.jsonl")]},
            "model": {"name": str(parts / "model")},
            "windows": {"context_size": 64},
            "sae": [{"layer": 1, "path": str(parts / "sae")}],
            "steering": {
                "cases": str(tmp_path / "cases.toml"),
                "strengths": [1.0],
                "modes": ["add"],
                "random_controls": 1,
                "max_new_tokens": 2,
                "resamples": 100,
            },
            "storage": {"root": str(tmp_path / "root")},
        }
    )


@pytest.fixture
def storage(config: Config) -> Storage:
    return Storage(config.storage.root)


def told(run: Run) -> dict[str, tuple[int, int | None]]:
    """Folders that are done and that are missing, looked for anew."""
    again = open_run(run.config, run.storage)
    return {one.stage: (one.done, one.missing) for one in plan(again, EXPERIMENT.stages)}


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model is read")


def test_stages_apply_where_cases_are_configured(config: Config) -> None:
    assert stages_of(config) == ("tokenize", "dictionaries", "features", *STEPS, "tables", "report")
    assert stages_of(config, start_from="steering") == ("steering", "tables", "report")
    assert working_stages(config)[3:] == [REACTIVATION, STEERING]
    assert STEERING_GROUP in table_groups(config)
    counting = config.model_copy(update={"steering": None})
    assert stages_of(counting) == ("tokenize", "dictionaries", "features", "tables", "report")
    assert STEERING_GROUP not in table_groups(counting)
    with pytest.raises(FunctokError, match=r"the stage steering does not apply .*configs/steering\.toml"):
        stages_of(counting, only="steering")


@pytest.mark.slow
def test_from_nothing_to_a_finished_run(
    config: Config, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [(plan.stage, plan.missing) for plan in plan_run(config, storage)] == [
        ("tokenize", 1),
        ("dictionaries", None),
        ("features", None),
        ("reactivation", None),
        ("steering", None),
        ("tables", None),
        ("report", None),
    ]
    run = finished(config, storage, DICTIONARIES)
    before = storage.sizes()
    # A case's tokens and its layer; a trait's layer and an experiment.
    assert told(run) == {"reactivation": (0, 2), "steering": (0, 2)}
    assert storage.sizes() == before
    read = make(run, REACTIVATION)
    assert told(run) == {"reactivation": (2, 0), "steering": (0, 2)}
    steered = make(run, STEERING)
    for stage in EXPERIMENT.stages:
        check(run, stage)

    monkeypatch.setattr(prompt_features, "load_model", no_model)
    monkeypatch.setattr(steering, "load_language_model", no_model)
    assert told(run) == {"reactivation": (2, 0), "steering": (2, 0)}
    again = open_run(config, storage)
    assert (again.result(REACTIVATION), again.result(STEERING)) == (read, steered)
    assert_changes_are_noticed(run)


def assert_changes_are_noticed(run: Run) -> None:
    config = run.config
    assert config.steering is not None
    more = config.steering.model_copy(update={"strengths": [0.0, 1.0, 3.0]})
    swept = open_run(config.model_copy(update={"steering": more}), run.storage)
    # The trait stays as it was found; the experiment is swept again.
    assert told(swept) == {"reactivation": (2, 0), "steering": (1, 1)}
    rough = config.model_copy(
        update={"activations": config.activations.model_copy(update={"mantissa_bits": 7})}
    )
    assert told(open_run(rough, run.storage)) == {"reactivation": (1, 1), "steering": (2, 0)}
    path = Path(config.steering.cases)
    path.write_text(CASES.replace("Moscow", "Zürich"))
    assert told(run) == {"reactivation": (0, 2), "steering": (2, 0)}
    path.write_text(CASES)


@pytest.mark.slow
def test_tables_are_current_until_their_results_change(config: Config, storage: Storage) -> None:
    run = finished(config, storage, FEATURES, REACTIVATION, STEERING)
    others = [CorpusTables([EXPERIMENT.facts]), GRAPH, FEATURE_TABLES]
    groups = [*others, STEERING_GROUP]
    assert not are_published(run, groups)
    publish(storage, candidate(storage, [group.build(run) for group in others]))
    assert not are_published(run, groups)
    catalog = candidate(storage, [group.build(run) for group in groups])
    check_tables(config, storage, catalog)
    publish(storage, catalog)
    assert are_published(run, groups)
    given = {stage: run.result(stage) for stage in (TOKENIZE, DICTIONARIES, FEATURES, REACTIVATION)}
    assert not are_published(run_of(config, storage, {**given, STEERING: Steered()}), groups)
    plans = plan_run(config, storage)
    assert {plan.stage: plan.missing for plan in plans}["tables"] == 0
    assert is_up_to_date(plans, ("tokenize", "dictionaries", "features", *STEPS, "tables"))


@pytest.mark.slow
def test_what_was_made_is_shown(config: Config, storage: Storage) -> None:
    run = finished(config, storage, REACTIVATION, STEERING)
    (cases,) = REACTIVATION.shown(run, run.result(REACTIVATION))
    prompts = ("the river of Russia is that", "the river of Moscow is that")
    assert (cases.name, [*cases.rows]) == (
        "cases",
        [{"case": "cities", "prompts": " / ".join(prompts), "tokens": run.result(REACTIVATION)[0].n_tokens}],
    )
    traits, texts = STEERING.shown(run, run.result(STEERING))
    assert (traits.name, texts.name) == ("traits", "steered-texts")
    assert {(row["trait"], row["layer"]) for row in traits.rows} == {("east", 1)}
    assert [row["place"] for row in traits.rows] == [*range(1, len(traits.rows) + 1)]
    assert 1 <= len(traits.rows) <= 5
    assert [(row["place"], row["strength"]) for row in texts.rows] == [
        ("last function token", 0.0),
        ("last function token", 1.0),
    ]
    assert texts.rows[0]["steered_text"] == texts.rows[0]["baseline_text"]
    assert "place: last function token" in texts.description


def test_run_info_says_what_was_asked(config: Config, storage: Storage) -> None:
    run = finished(config, storage, TOKENIZE)
    name = CorpusTables([EXPERIMENT.facts]).build(run).tables["run_info"]
    told = {row["key"]: row["value"] for row in storage.read_parquet(name).to_pylist()}
    assert config.steering is not None
    assert {key: value for key, value in told.items() if key.startswith("steering_")} == {
        "steering_cases": config.steering.cases,
        "steering_chat_template": "true",
        "steering_decomposition": "activations",
        "steering_features": "4",
        "steering_random_controls": "1",
        "steering_resamples": "100",
        "steering_seed": "0",
    }


def test_cases_that_cannot_be_used_are_refused_before_any_stage(config: Config, storage: Storage) -> None:
    assert config.steering is not None
    Path(config.steering.cases).write_text(CASES.replace("of Moscow", "of the Moscow"))
    with pytest.raises(ConfigError, match="equally many tokens") as caught:
        plan_run(config, storage)
    assert "'cities'" in str(caught.value)
    missing = config.steering.model_copy(update={"cases": "nowhere.toml"})
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        plan_run(config.model_copy(update={"steering": missing}), storage)
