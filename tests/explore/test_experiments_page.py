"""The page of all experiments: findings of those that were run, TOML for those that were not, and no name known."""

from __future__ import annotations

import tomllib
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import pytest
import steering_catalogue
from page_reading import built, of
from pydantic import Field
from starlette.testclient import TestClient
from steering_catalogue import Made

from functok.explorer.app import build_app
from functok.explorer.experiments import INDEX
from infra.catalog import Catalog
from infra.config_file import load_config
from infra.duck import connect, create_views
from infra.storage import Storage
from schemas.experiments import asked_for, experiment_rooms
from schemas.room import Room
from schemas.sections import ExperimentSection
from tasks.explore import not_run
from tasks.explore.vocabulary import Facts, Findings, Missing
from tasks.stages import experiment

NAMES = [room.name for room in experiment_rooms()]


def page(connection: Any) -> Any:
    return built((INDEX,), "/experiments", connection)


def test_without_any_all_say_how_to_ask_for_them() -> None:
    missing = of(page(duckdb.connect()), Missing)
    assert [one.what.split(":")[0].lower() for one in missing] == NAMES


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Cases and steering, with hostile names, prompts and texts; nothing else was run."""
    made = Storage(str(tmp_path_factory.mktemp("root")))
    steering_catalogue.built(made, Made(relations=("capitals", "<script>document.write(1)</script>")))
    return made


@pytest.fixture(scope="module")
def client(storage: Storage) -> TestClient:
    return TestClient(build_app(storage), base_url="http://127.0.0.1")


@pytest.mark.parametrize(
    "path", ["/experiments", *(one.path for name in NAMES for one in experiment(name).pages)]
)
def test_pages_come_out_whether_they_have_something_to_show_or_not(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert "<script>document" not in answer.text


@pytest.mark.parametrize(
    "path", ["/steering/case", "/steering/texts?strength=4", "/steering/texts?prompt=<script>"]
)
def test_hostile_texts_stay_text(client: TestClient, path: str) -> None:
    answer = client.get(path).text
    assert "&lt;script&gt;" in answer
    assert "<script>document" not in answer


def test_what_nobody_asks_for_is_not_opened(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of a table on S3 reads a footer: looking which tables there are must not open all."""
    opened: list[str] = []

    def noting(database: Any, storage: Storage, catalog: Catalog, **how: Any) -> None:
        opened.extend([*catalog.tables, *catalog.sharded])
        create_views(database, storage, catalog, **how)

    monkeypatch.setattr("functok.explorer.tables.create_views", noting)
    assert (
        TestClient(build_app(storage), base_url="http://127.0.0.1").get("/steering/traits").status_code == 200
    )
    assert set(opened) <= {"trait_layers", "trait_features"}


def test_one_that_was_run_has_its_findings_and_pages(storage: Storage) -> None:
    with closing(connect(storage)) as connection:
        made = page(connection)
        steering = experiment("steering")
        (facts,), (findings,) = of(made, Facts), of(made, Findings)
        assert list(findings.findings) == steering.report.findings(connection)
        assert [to for _, _, to in facts.facts if to] == [one.path for one in steering.pages]
        assert len(of(made, Missing)) == len(NAMES) - 1


@pytest.mark.parametrize("room", experiment_rooms(), ids=NAMES)
def test_what_is_to_be_added_asks_for_it(room: Room) -> None:
    """It is what a configuration has that works, and names it, for a model may have to be another one too."""
    way = not_run.configuration(room)
    file = Path(__file__).parents[2] / way.splitlines()[0].removeprefix("# as in ")
    whole = tomllib.loads(file.read_text())
    assert tomllib.loads(way) == {key: whole[key] for key in whole if key in room.sections} != {}
    assert room.name in asked_for(load_config(str(file)))


def test_one_that_no_file_asks_for_is_told_from_its_schema() -> None:
    class Letters(ExperimentSection):
        lower: bool = Field(description="Count a and A together.")
        upper: bool = False

    room = Room(
        name="letters",
        sections={"letters": (Letters | None, Field(None, description="Tokens by their first letter."))},
        group="letters",
        tables={},
    )
    assert not_run.configuration(room) == "[letters]\nlower = …  # Count a and A together."
    assert not_run.answers(room) == "Tokens by their first letter."
