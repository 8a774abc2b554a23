"""What `functok status` says of reactivation and steering, from nothing to a finished run, without reading a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from tasks.engine.plan import is_up_to_date, plan_run, stages_of

from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.steering.work import SteeringResults
from schemas.work import CorpusShards, Dictionary
from tasks.corpus import tokenization
from tasks.dictionaries import dictionaries
from tasks.engine import validation
from tasks.graph import extraction, features, tables
from tasks.steering import reactivation, steering
from tasks.steering.checks import check_reactivation, check_steering
from tasks.steering.results import find_steering_results, plan_steering, steering_stages
from tasks.steering.tables import build_steering_tables

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


Spine = tuple[CorpusShards, list[Dictionary]]


@pytest.fixture
def spine(config: Config, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Spine:
    extraction.forget_loaded()
    shards = tokenization.tokenize_corpus(config, storage)
    return shards, dictionaries.prepare_dictionaries(config, storage, shards)


def told(config: Config, storage: Storage, spine: Spine | None) -> dict[str, tuple[int, int | None]]:
    plans, _ = plan_steering(config, storage, *(spine or (None, None)))
    assert [plan.stage for plan in plans] == list(STEPS)
    return {plan.stage: (plan.done, plan.missing) for plan in plans}


def no_model(*_: Any, **__: Any) -> None:
    raise AssertionError("a model is read")


def test_stages_apply_where_cases_are_configured(config: Config) -> None:
    assert steering_stages(config) == STEPS
    assert stages_of(config) == ("tokenize", "dictionaries", "features", *STEPS, "tables", "report")
    assert stages_of(config, start_from="steering") == ("steering", "tables", "report")
    counting = config.model_copy(update={"steering": None})
    assert steering_stages(counting) == ()
    assert stages_of(counting) == ("tokenize", "dictionaries", "features", "tables", "report")


def test_from_nothing_to_a_finished_run(
    config: Config,
    storage: Storage,
    parts: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert told(config, storage, None) == {"reactivation": (0, None), "steering": (0, None)}
    assert [(plan.stage, plan.missing) for plan in plan_run(config, storage)] == [
        ("tokenize", 1),
        ("dictionaries", None),
        ("features", None),
        ("reactivation", None),
        ("steering", None),
        ("tables", None),
        ("report", None),
    ]
    spine: Spine = request.getfixturevalue("spine")
    shards, made = spine
    before = storage.sizes()
    assert told(config, storage, spine) == {"reactivation": (0, 1), "steering": (0, 2)}
    assert storage.sizes() == before
    assert find_steering_results(config, storage, shards, made) is None
    read = reactivation.compute_reactivations(config, storage, made)
    assert told(config, storage, spine) == {"reactivation": (1, 0), "steering": (0, 2)}
    assert find_steering_results(config, storage, shards, made) is None
    traits, steered = steering.run_steering(config, storage, shards, made)
    check_reactivation(config, storage, shards, made, read)
    check_steering(config, storage, made, traits, steered)

    for module in ("models.load_model", "reactivation.load_model", "traits.load_model"):
        monkeypatch.setattr(f"tasks.{module}", no_model)
    monkeypatch.setattr("tasks.steering.steering.load_language_model", no_model)
    assert told(config, storage, spine) == {"reactivation": (1, 0), "steering": (2, 0)}
    results = find_steering_results(config, storage, shards, made)
    assert results == SteeringResults(cases=tuple(read), traits=tuple(traits), experiments=tuple(steered))
    assert plan_steering(config, storage, *spine)[1] == results
    assert_changes_are_noticed(config, storage, spine)


def assert_changes_are_noticed(config: Config, storage: Storage, spine: Spine) -> None:
    assert config.steering is not None
    shards, made = spine
    more = config.steering.model_copy(update={"strengths": [0.0, 1.0, 3.0]})
    swept = config.model_copy(update={"steering": more})
    # The trait stays as it was found; the experiment is swept again.
    assert told(swept, storage, spine) == {"reactivation": (1, 0), "steering": (1, 1)}
    other = [Dictionary(**(vars(entry) | {"key": "other"})) for entry in made]
    assert told(config, storage, (shards, other)) == {"reactivation": (0, 1), "steering": (0, 2)}
    path = Path(config.steering.cases)
    path.write_text(CASES.replace("Moscow", "Zürich"))
    assert told(config, storage, spine) == {"reactivation": (0, 1), "steering": (2, 0)}
    path.write_text(CASES)


def test_tables_are_current_until_their_results_change(
    config: Config, storage: Storage, spine: Spine
) -> None:
    shards, made = spine
    activated = features.extract_features(config, storage, shards, made)
    reactivation.compute_reactivations(config, storage, made)
    steering.run_steering(config, storage, shards, made)
    results = find_steering_results(config, storage, shards, made)
    assert results is not None

    def current(found: SteeringResults | None, using: Sequence[Any] = (activated, made)) -> bool:
        return tables.find_tables(config, storage, shards, *using, steering=found)

    assert not current(results)
    catalog = tables.build_graph_tables(config, storage, shards, activated, made)
    tables.publish(storage, catalog)
    assert not current(results)
    tables.publish(storage, build_steering_tables(config, storage, shards, results, onto=catalog))
    assert current(results)
    assert not current(None)
    assert not current(SteeringResults(cases=results.cases))
    plans = {plan.stage: plan for plan in plan_run(config, storage)}
    assert plans["tables"].missing == 0
    assert is_up_to_date(list(plans.values()), ("tokenize", "dictionaries", "features", *STEPS, "tables"))
    validation.check_tables(
        config, storage, build_steering_tables(config, storage, shards, results, onto=catalog)
    )


def test_cases_that_cannot_be_used_are_refused_before_any_stage(config: Config, storage: Storage) -> None:
    assert config.steering is not None
    Path(config.steering.cases).write_text(CASES.replace("of Moscow", "of the Moscow"))
    with pytest.raises(ConfigError, match="equally many tokens") as caught:
        plan_run(config, storage)
    assert "'cities'" in str(caught.value)
    missing = config.steering.model_copy(update={"cases": "nowhere.toml"})
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        plan_run(config.model_copy(update={"steering": missing}), storage)
