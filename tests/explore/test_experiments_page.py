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

from functok.explorer.experiments import EXPERIMENTS
from infra.config_file import load_config
from infra.duck import connect
from infra.storage import Storage
from schemas.experiments import asked_for, experiment_rooms
from schemas.room import Room
from schemas.sections import ExperimentSection
from tasks.explore import not_run
from tasks.explore.vocabulary import Facts, Findings, Missing
from tasks.stages import experiment

NAMES = [room.name for room in experiment_rooms()]


def page(connection: Any) -> Any:
    return built((EXPERIMENTS,), "/experiments", connection)


def test_without_any_all_say_how_to_ask_for_them() -> None:
    missing = of(page(duckdb.connect()), Missing)
    assert [one.what.split(":")[0].lower() for one in missing] == NAMES


def test_one_that_was_run_has_its_findings_and_pages(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steering_catalogue.built(storage)
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
