"""The flows' wiring, on stand-ins for the stages: order, what is needed, what is retried, what Prefect shows."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from distributed import KilledWorker
from stand_in import TRAINED_TOKENIZER, StandIns, shard_file

from infra.addresses import title_of
from infra.catalog import CATALOG
from infra.storage import Storage
from schemas.config import Config, Model
from schemas.errors import ConfigError, CorpusError, ExpectationError, FunctokError, StorageError
from schemas.pretraining.work import Checkpoint
from schemas.steering.work import CaseFeatures, LayerFolder, Steered, SteeredPrompt, TraitFeatures
from tasks.steering.heat_maps import HeatMap, HeatPanel


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": ["data/a.txt"]},
            "model": {"name": "tiny"},
            "sae": [{"layer": 7, "path": "x"}, {"layer": 15, "path": "y"}],
            "storage": {"root": str(tmp_path / "root")},
        }
    )


@pytest.fixture
def counting(config: Config) -> Config:
    return config.model_copy(update={"sae": []})


CHECKPOINT = Checkpoint(series="small", step=7, model=Model(name="storage:checkpoints/k"), key="k", tokens=70)
CASE = CaseFeatures(
    case="c", folder="reactivation/c", layers=(LayerFolder(layer=7, folder="reactivation/c-7"),), n_tokens=8
)
TRAIT = TraitFeatures(
    trait="t", layers=tuple(LayerFolder(layer=layer, folder=f"traits/t-{layer}") for layer in (7, 15))
)
EXPERIMENT = SteeredPrompt(case="t", prompt="p", folder="steering/t")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(monkeypatch)


def steered(stages: StandIns) -> None:
    """Have the stages of cases give a case, a trait and an experiment, with what is shown of them."""
    stages.results |= {
        "reactivation": lambda config: [CASE],
        "steering": lambda config: Steered(traits=(TRAIT,), experiments=(EXPERIMENT,)),
    }
    prompts = [{"case": "c", "prompt": prompt, "position": 0} for prompt in ("of A", "of B")]
    stages.files["reactivation"] = [shard_file(CASE.folder, "prompt_tokens", prompts)]
    texts = [
        {"case": "t", "prompt": "p", "place": place, "control": control, "strength": strength}
        | {"mode": "add", "baseline_text": "Japan", "steered_text": f"日本 {strength}"}
        for place in ("last function token", "all positions")
        for control in ("trait", "random")
        for strength in (0.0, 2.0)
    ]
    stages.files["steering"] = [shard_file(EXPERIMENT.folder, "steering", texts)]
    for of_layer in TRAIT.layers:
        judged = [{"trait": "t", "layer": of_layer.layer, "separation": of_layer.layer / 10}]
        ranked = [
            {"trait": "t", "layer": of_layer.layer, "place": place, "feature_id": of_layer.layer + place}
            for place in range(1, 9)
        ]
        stages.files["steering"] += [
            shard_file(of_layer.folder, "trait_layers", judged),
            shard_file(of_layer.folder, "trait_features", ranked),
        ]
    stages.tables["steering"] = {
        "steering_effects": [
            {"mode": "add", "place": "last function token", "control": "trait", "strength": 2.0, "n": 1}
            | {"kl": 0.5, "advantage": float("nan")}
        ]
    }


HEAT_MAP = HeatMap(
    case="c",
    relation="capital",
    layer=7,
    share=0.5,
    prompts=2,
    panels=tuple(
        HeatPanel(
            prompt=prompt,
            tokens=("of", prompt[-1], "\n"),
            is_function=(True, False, True),
            in_place=(False, True, False),
            values=((0.0, 1.0, 0.5),),
        )
        for prompt in ("of A", "of B")
    ),
    features=(3,),
    owners=(0,),
    own=(1, 0),
)

WHOLE = [
    "tokenize",
    "check tokenize",
    "dictionaries",
    "check dictionaries",
    "features",
    "check features",
    "corpus tables",
    "graph tables",
    "features tables",
    "check tables",
    "publish",
    "report",
]


def artifacts(config: Config) -> dict[str, Any]:
    """What one root shows, by key without the root's name."""
    from prefect.client.orchestration import get_client

    ending = f"-{Storage(config.storage.root).name}"

    with get_client(sync_client=True) as client:
        response = client._client.post("/artifacts/latest/filter", json={"sort": "UPDATED_DESC"})
    found = response.raise_for_status().json()
    return {entry["key"].removesuffix(ending): entry for entry in found if entry["key"].endswith(ending)}


def last_runs(kind: str) -> list[dict[str, Any]]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        response = client._client.post(f"/{kind}/filter", json={"sort": "EXPECTED_START_TIME_DESC"})
    return list(response.raise_for_status().json())


@pytest.mark.usefixtures("prefect_api")
def test_reproduce_runs_every_stage_in_order_and_shows_results(config: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    reproduce(config)

    assert stages.journal == WHOLE
    shown = artifacts(config)
    coverage = json.loads(shown["coverage"]["data"])
    assert coverage == [{"rank": 1, "token": r"\n", "layer 7": "23.19%", "layer 15": "23.19%"}]
    [function_token] = json.loads(shown["function-tokens"]["data"])
    assert function_token["token"] == r"\n"
    assert function_token["share"] == "75.00%"
    assert "report.html" in shown["report"]["data"]
    assert "](" not in shown["report"]["data"], "the server of a run alone serves no report to link to"
    assert all(
        config.storage.root in shown[key]["description"] for key in ("coverage", "report", "catalogue")
    )
    assert any(
        run["name"] == f"tables of tiny in {Storage(config.storage.root).name}"
        for run in last_runs("flow_runs")
    )
    assert CATALOG in shown["catalogue"]["data"]
    assert f"functok explore --root {config.storage.root}" in shown["explorer"]["data"]
    for stage in ("tokenize", "dictionaries", "features", "tables", "report"):
        assert shown[f"progress-{stage}"]["data"] == 100.0
    names = {run["name"] for run in last_runs("task_runs")}
    assert {"tokenize: a.txt", "features: layer 7, 15", "tables: publish"} <= names


@pytest.mark.usefixtures("prefect_api")
def test_two_roots_do_not_overwrite_each_others_artifacts(config: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    root = config.storage.root
    other = config.model_copy(
        update={"storage": config.storage.model_copy(update={"root": f"{root}/other/root"})}
    )
    reproduce(config)
    reproduce(other)
    first, second = artifacts(config), artifacts(other)
    assert first.keys() == second.keys() >= {"coverage", "function-tokens", "catalogue", "progress-tables"}
    assert root in first["coverage"]["description"]
    assert f"{root}/other/root" in second["coverage"]["description"]


@pytest.mark.usefixtures("prefect_api")
def test_counting_only_has_no_graph(counting: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    reproduce(counting)

    assert stages.journal == [
        "tokenize",
        "check tokenize",
        "corpus tables",
        "check tables",
        "publish",
        "report",
    ]


@pytest.fixture
def pretraining(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "corpus": {"urls": ["data/a.txt"]},
            "storage": {"root": str(tmp_path / "root")},
            "consolidation": {
                "series": [{"name": "small", "shape": {"hidden_size": 8, "layers": 1, "heads": 2}}],
                "train": {"tokens": 100, "vocabulary_size": 300},
                "growth": {"layer": 0, "train": {"d_sae": 8, "k": 2}},
                "generations": {"prompts": ["a"]},
            },
        }
    )


CONSOLIDATION = [
    "tokenize",
    "check tokenize",
    *(
        name
        for stage in ("checkpoints", "losses", "growth", "generations")
        for name in (stage, f"check {stage}")
    ),
    "corpus tables",
    "consolidation tables",
    "check tables",
    "publish",
    "report",
]


@pytest.mark.usefixtures("prefect_api")
def test_checkpoints_of_pre_training_have_stages_of_their_own(pretraining: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    stages.results["checkpoints"] = lambda config: [CHECKPOINT]
    reproduce(pretraining)

    assert stages.journal == CONSOLIDATION
    assert stages.configs["checkpoints"].model.tokenizer == TRAINED_TOKENIZER
    [row] = json.loads(artifacts(pretraining)["checkpoints"]["data"])
    assert (row["model"], row["step"], row["source"]) == ("small", 7, "storage:checkpoints/k")
    assert {"checkpoints: small", "losses: check small"} <= {run["name"] for run in last_runs("task_runs")}
    stages.journal.clear()
    reproduce(pretraining, start_from="generations")
    assert stages.journal == CONSOLIDATION[CONSOLIDATION.index("check generations") :]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("flow", "done", "missing"),
    [
        ("checkpoints", (), "tokenize"),
        ("losses", ("tokenize",), "checkpoints"),
        ("growth", (), "tokenize"),
        ("generations", ("tokenize",), "checkpoints"),
    ],
)
def test_a_checkpoint_stage_alone_names_the_stage_it_lacks(
    pretraining: Config, stages: StandIns, flow: str, done: tuple[str, ...], missing: str
) -> None:
    from flows.reproduce import reproduce

    stages.finish(pretraining, *done)
    with pytest.raises(FunctokError, match=f"--only {missing}"):
        reproduce(pretraining, only=flow)
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
def test_tables_without_losses_publishes_the_corpus_then_fails(pretraining: Config, stages: StandIns) -> None:
    from flows.tables import tables

    stages.finish(pretraining, "checkpoints")
    with pytest.raises(FunctokError, match="--only losses"):
        tables(pretraining)
    assert stages.journal == ["corpus tables", "check tables", "publish"]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("flow", ["checkpoints", "losses", "growth", "generations"])
def test_a_checkpoint_stage_that_does_not_apply_says_so(config: Config, stages: StandIns, flow: str) -> None:
    with pytest.raises(ConfigError, match="no consolidation section"):
        getattr(importlib.import_module(f"flows.{flow}"), flow)(config)
    assert stages.journal == []


@pytest.fixture
def steering(config: Config) -> Config:
    return Config.model_validate(config.model_dump() | {"steering": {"cases": "assets/my-cases.toml"}})


STEERING = [
    *WHOLE[: WHOLE.index("corpus tables")],
    "reactivation",
    "check reactivation",
    "steering",
    "check steering",
    "corpus tables",
    "graph tables",
    "features tables",
    "steering tables",
    "check tables",
    "publish",
    "report",
]


@pytest.mark.usefixtures("prefect_api")
def test_reactivation_and_steering_have_stages_of_their_own(
    steering: Config, stages: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.reproduce import reproduce

    monkeypatch.setattr("tasks.steering.heat_maps.heat_maps", lambda connection, limit: [HEAT_MAP] * 2)
    steered(stages)
    reproduce(steering)

    assert stages.journal == STEERING
    shown = artifacts(steering)
    [case] = json.loads(shown["cases"]["data"])
    assert case == {"case": "c", "prompts": "of A / of B", "tokens": 8}
    traits = json.loads(shown["traits"]["data"])
    assert [(row["layer"], row["place"], row["feature_id"]) for row in traits] == [
        (15, place, 15 + place) for place in range(1, 6)
    ]
    texts = json.loads(shown["steered-texts"]["data"])
    assert {row["place"] for row in texts} == {"last function token"}
    assert [(row["strength"], row["baseline_text"], row["steered_text"]) for row in texts] == [
        (0.0, "Japan", "日本 0.0"),
        (2.0, "Japan", "日本 2.0"),
    ]
    assert "(place: last function token)" in shown["steered-texts"]["description"]
    [effect] = json.loads(shown["steering-effects"]["data"])
    assert (effect["strength"], effect["kl"], effect["advantage"]) == (2.0, 0.5, None)
    for place in (1, 2):
        assert shown[f"heat-map-{place}"]["type"] == "image"
        assert shown[f"heat-map-{place}"]["data"].startswith("data:image/png;base64,iVBOR")
    assert "of B" in shown["heat-map-2"]["description"]
    names = {run["name"] for run in last_runs("task_runs")}
    assert {"reactivation: my-cases.toml", "steering: check my-cases.toml", "tables: my-cases.toml"} <= names
    stages.journal.clear()
    reproduce(steering, start_from="steering")
    assert stages.journal == STEERING[STEERING.index("check steering") :]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("flow", ["reactivation", "steering"])
@pytest.mark.parametrize(("done", "missing"), [((), "tokenize"), (("tokenize",), "dictionaries")])
def test_a_stage_of_cases_alone_names_the_stage_it_lacks(
    steering: Config, stages: StandIns, flow: str, done: tuple[str, ...], missing: str
) -> None:
    from flows.reproduce import reproduce

    stages.finish(steering, *done)
    with pytest.raises(FunctokError, match=f"--only {missing}"):
        reproduce(steering, only=flow)
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("flow", ["reactivation", "steering"])
def test_a_stage_of_cases_that_does_not_apply_says_so(config: Config, stages: StandIns, flow: str) -> None:
    with pytest.raises(ConfigError, match="no steering section") as caught:
        getattr(importlib.import_module(f"flows.{flow}"), flow)(config)
    assert caught.value.stage == flow
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(("done", "missing"), [((), "reactivation"), (("reactivation",), "steering")])
def test_tables_without_steering_publishes_the_graph_then_fails(
    steering: Config, stages: StandIns, done: tuple[str, ...], missing: str
) -> None:
    from flows.tables import tables

    stages.finish(steering, "features", *done)
    with pytest.raises(FunctokError, match=f"{missing} is not finished") as caught:
        tables(steering)
    assert f"--only {missing}" in caught.value.hint
    assert stages.journal == ["corpus tables", "graph tables", "features tables", "check tables", "publish"]


@pytest.mark.usefixtures("prefect_api")
def test_cases_that_cannot_be_used_are_read_by_no_model(steering: Config, stages: StandIns) -> None:
    from flows.reactivation import reactivation

    stages.finish(steering, "dictionaries")
    stages.fail["prepare reactivation"] = ConfigError("[[case]] 'c': prompt 1 is empty")
    with pytest.raises(ConfigError, match="prompt 1 is empty") as caught:
        reactivation(steering)
    assert caught.value.stage == "reactivation"
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
def test_only_and_start_from(config: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    reproduce(config, only="tokenize")
    assert stages.journal == ["tokenize", "check tokenize"]
    reproduce(config, only="dictionaries")
    stages.journal.clear()
    reproduce(config, start_from="features")
    assert stages.journal == WHOLE[WHOLE.index("features") :]
    with pytest.raises(ConfigError, match="exclude each other"):
        reproduce(config, only="tables", start_from="report")


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("flow", "done", "missing"),
    [
        ("dictionaries", (), "tokenize"),
        ("features", (), "tokenize"),
        ("features", ("tokenize",), "dictionaries"),
        ("tables", (), "tokenize"),
        ("report", ("features",), "tables"),
    ],
)
def test_a_stage_alone_names_the_stage_it_lacks(
    config: Config, stages: StandIns, flow: str, done: tuple[str, ...], missing: str
) -> None:
    from flows.reproduce import reproduce

    stages.finish(config, *done)
    with pytest.raises(FunctokError, match=f"--only {missing}") as caught:
        reproduce(config, only=flow)
    assert caught.value.stage == missing
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("flow", ["dictionaries", "features"])
def test_a_stage_that_does_not_apply_says_so(counting: Config, stages: StandIns, flow: str) -> None:
    with pytest.raises(ConfigError, match="counts tokens only"):
        getattr(importlib.import_module(f"flows.{flow}"), flow)(counting)
    assert stages.journal == []


@pytest.mark.usefixtures("prefect_api")
def test_tables_without_features_publishes_the_corpus_then_fails(config: Config, stages: StandIns) -> None:
    from flows.tables import tables

    stages.finish(config, "dictionaries")
    with pytest.raises(FunctokError, match="--only features"):
        tables(config)
    assert stages.journal == ["corpus tables", "check tables", "publish"]
    assert list(Storage(config.storage.root).read_json(CATALOG)["lineage"]) == ["corpus"]


@pytest.mark.usefixtures("prefect_api")
def test_a_failure_reaches_the_caller_as_itself_and_stops_the_run(config: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce

    stages.fail["check features"] = failure = ExpectationError("edges.n is negative in 2 rows")
    with pytest.raises(ExpectationError) as caught:
        reproduce(config)
    assert caught.value is failure
    assert str(failure) == "[features] edges.n is negative in 2 rows"
    assert stages.journal[-1] == "check features"
    assert stages.journal.count("check features") == 1
    states = {run["name"]: run["state_type"] for run in last_runs("flow_runs")[:4]}
    assert states[f"reproduce with {title_of(config)}"] == "FAILED"
    assert states[f"features of {title_of(config)}"] == "FAILED"


def client_error(status: int) -> ClientError:
    return ClientError({"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def caused(error: FunctokError, cause: BaseException) -> FunctokError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (StorageError("gone"), True),
        (caused(StorageError("gone"), ConnectionResetError()), True),
        (caused(StorageError("closed"), PermissionError()), False),
        (caused(StorageError("bad URL"), ValueError()), False),
        (caused(StorageError("case: closed"), caused(StorageError("closed"), PermissionError())), False),
        (caused(StorageError("case: gone"), caused(StorageError("gone"), ConnectionResetError())), True),
        (OSError(28, "No space left on device"), True),
        (ConnectionError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (KilledWorker("task", None, 3), True),
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (client_error(503), True),
        (client_error(403), False),
        (ConfigError("wrong"), False),
        (CorpusError("empty"), False),
        (ExpectationError("broken"), False),
        (ValueError("bug"), False),
        (MemoryError(), False),
    ],
    ids=repr,
)
def test_what_is_worth_retrying(error: BaseException, again: bool) -> None:
    from flows.retry import is_transient

    assert is_transient(error) is again


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("failures", "tries", "error"),
    [
        ([StorageError("lost"), ConnectionError("lost")], 3, None),
        ([StorageError("lost")] * 9, 4, StorageError),
        ([ConfigError("wrong")] * 9, 1, ConfigError),
    ],
)
def test_steps_are_retried_by_type(
    config: Config, failures: list[Exception], tries: int, error: type[Exception] | None
) -> None:
    from prefect import flow

    from flows.stage import step

    calls: list[int] = []

    @step("features", "layer 7", first_delay=0.01)
    def flaky(config: Config) -> int:
        calls.append(1)
        if len(calls) <= len(failures):
            raise failures[len(calls) - 1]
        return len(calls)

    @flow
    def once(config: Config) -> int:
        return flaky(config)

    if error is None:
        assert once(config) == tries
    else:
        with pytest.raises(error):
            once(config)
    assert len(calls) == tries


@pytest.mark.usefixtures("prefect_api")
def test_what_was_made_before_a_failure_is_not_made_again(
    config: Config, stages: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.tokenize import tokenize

    monkeypatch.setattr("flows.stage.exponential_backoff", lambda seconds: 0)
    stages.units["tokenize"] = ("first half", "second half")
    stages.fail_once["second half"] = StorageError("lost")
    tokenize(config)
    assert stages.journal == ["first half", "second half", "second half", "check tokenize"]


@pytest.mark.usefixtures("prefect_api")
def test_progress_artifact_is_updated_at_most_once_a_second(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow

    from flows import stage

    now = [0.0]
    written: list[float] = []
    from prefect.artifacts import update_progress_artifact

    def counted(**kwargs: Any) -> Any:
        written.append(kwargs["progress"])
        return update_progress_artifact(**kwargs)

    monkeypatch.setattr(stage, "update_progress_artifact", counted)

    root = Storage(config.storage.root).name

    @flow
    def reporting() -> None:
        artifact = stage.ProgressArtifact("features", root, clock=lambda: now[0])
        for done in range(50):
            artifact(done, 50, "tokens")
            now[0] += 0.25
        artifact.finish()

    reporting()
    assert len(written) == 13
    assert written == sorted(written)
    assert artifacts(config)["progress-features"]["data"] == 100.0


@pytest.mark.usefixtures("prefect_api")
def test_steps_report_to_the_terminal_that_watches(config: Config, stages: StandIns) -> None:
    from flows.stage import watching
    from flows.tokenize import tokenize

    seen: list[tuple[int, int, str]] = []
    with watching(lambda done, total, what: seen.append((done, total, what))):
        tokenize(config)
    assert seen == [(0, 4, "tokenize parts"), (4, 4, "tokenize parts")]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    "change",
    [
        {"corpus": {"urls": ["https://me:hunter2@host/a.txt"]}},
        {"corpus": {"urls": ["zip://a.txt::https://host/a.zip?X-Amz-Signature=hunter2"]}},
        {"storage": {"root": "runs", "endpoint_url": "http://key:hunter2@localhost:9000"}},
        {"steering": {"cases": "https://host/cases.toml?X-Amz-Signature=hunter2"}},
        {"sae": [{"layer": 7, "train": {"d_sae": 8, "k": 2, "start_from": "https://host/sae?sig=hunter2"}}]},
        {"corpus": {"urls": ["https://hunter2@host/a.txt"]}},
    ],
)
def test_secrets_are_refused_before_prefect_sees_them(
    config: Config, stages: StandIns, change: dict[str, Any]
) -> None:
    from flows.reproduce import run

    leaky = Config.model_validate(config.model_dump() | change)
    with pytest.raises(ConfigError, match="a password, a token or a signature") as caught:
        run(leaky)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in json.dumps(last_runs("flow_runs"))


@pytest.mark.usefixtures("prefect_api")
def test_dictionary_parameters_are_validated(config: Config, stages: StandIns) -> None:
    from flows.tokenize import tokenize

    tokenize(json.loads(config.model_dump_json()))
    assert stages.journal == ["tokenize", "check tokenize"]


@pytest.mark.slow
def test_parameters_render_as_a_form() -> None:
    from prefect.utilities.callables import parameter_schema

    from flows.reproduce import reproduce

    form = parameter_schema(reproduce).model_dump()
    assert form["required"] == ["config"]
    assert form["properties"]["only"]["anyOf"][0]["enum"][0] == "tokenize"
    share = form["definitions"]["FunctionTokens"]["properties"]["share"]
    assert share["default"] == 0.40
    assert share["maximum"] == 1
    assert "Share of all occurrences" in share["description"]
    assert form["definitions"]["Config"]["additionalProperties"] is False


def test_run_calls_the_flow_on_the_api_that_is_set(
    prefect_api: str,
    config: Config,
    stages: StandIns,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from flows import reproduce

    stages.fail["features"] = ConfigError("no such layer")
    with pytest.raises(ConfigError, match="no such layer"):
        reproduce.run(config, start_from="tokenize")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "tokenize parts: 4 in 0 s" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.slow
def test_an_api_that_does_not_answer_is_an_error_of_ours(config: Config, stages: StandIns) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import reproduce

    with (
        temporary_settings({PREFECT_API_URL: "http://someone:hunter2@127.0.0.1:9/api"}),
        pytest.raises(FunctokError, match="does not answer") as caught,
    ):
        reproduce.run(config)
    assert "functok up" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert stages.journal == []


def test_runs_whose_process_is_gone_are_marked_as_crashed_with_their_subflows(prefect_api: str) -> None:
    from prefect import flow, task
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from infra.prefect_api import PROCESS, crash_dead_runs

    @flow
    def killed() -> None: ...

    @task
    def calling() -> None: ...

    gone = subprocess.Popen(["true"])
    gone.wait()
    here = socket.gethostname()
    with get_client(sync_client=True) as client:
        runs = {
            pid: client.create_flow_run(killed, state=Running())
            for pid in (f"{here}:{gone.pid}", f"{here}:{os.getpid()}", f"elsewhere:{gone.pid}")
        }
        for pid, run in runs.items():
            client.update_flow_run_labels(run.id, {PROCESS: pid})
        dead, alive, elsewhere = runs.values()
        call = client.create_task_run(calling, flow_run_id=dead.id, dynamic_key="0")
        subflow = client.create_flow_run(killed, state=Running(), parent_task_run_id=call.id)

        marked = crash_dead_runs(prefect_api, "the power went")

        assert set(marked) == {dead.name, subflow.name}
        states = [client.read_flow_run(run.id).state_name for run in (dead, subflow, alive, elsewhere)]
        assert states == ["Crashed", "Crashed", "Running", "Running"]
        state = client.read_flow_run(dead.id).state
        assert state is not None
        assert state.message == "the power went"


@pytest.mark.usefixtures("prefect_api")
def test_a_run_says_where_it_lives(counting: Config, stages: StandIns) -> None:
    from flows.reproduce import reproduce
    from infra.prefect_api import PROCESS

    reproduce(counting)
    [run, *_] = [
        run for run in last_runs("flow_runs") if run["name"] == f"reproduce with {title_of(counting)}"
    ]
    assert run["labels"][PROCESS] == f"{socket.gethostname()}:{os.getpid()}"


def test_the_watch_and_the_pools_are_made_once(prefect_api: str) -> None:
    from infra.prefect_api import prepare

    assert prepare(prefect_api, ["functok-test"]) == ["created the work pool functok-test"]
    assert prepare(prefect_api, ["functok-test"]) == []
    response = httpx.post(f"{prefect_api}/automations/filter", json={}).raise_for_status()
    [watch] = response.json()
    assert watch["trigger"]["within"] == 90
    assert watch["actions"][0]["state"] == "CRASHED"
