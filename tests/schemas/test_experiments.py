"""Experiments plug into the configuration and the schemas: a folder and one word in the list, and nobody names them."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from schemas.config import Config
from schemas.experiments import asked_for, experiment_rooms

SCHEMAS = Path(__file__).parents[2] / "schemas"
COUNTING = {"corpus": {"urls": ["a.txt"]}, "model": {"name": "m"}}
SERIES = {"series": [{"name": "small", "revisions": ["step1"]}], "heldout_share": 0.2}
GRAPH = {**COUNTING, "sae": [{"layer": 1, "path": "p"}]}

NOVEL = """
import pyarrow as pa
from pydantic import Field
from schemas.arrow import schema_of
from schemas.expectation import Rows
from schemas.room import Room
from schemas.sections import ExperimentSection

class Novel(ExperimentSection):
    share: float = 0.25

    @property
    def held_out(self):
        return self.share

MADE = schema_of(word=pa.string())
POSSIBLE = Rows(name="words are there", table="novelties", meaning="", must="word IS NOT NULL", show="word")
ROOM = Room(
    name="novel",
    sections={"novel": (Novel | None, Field(None, description="What is new."))},
    stages=("novelties",),
    shard_files={"novelty": MADE},
    group="novel",
    tables={"novelties": MADE},
    required=("novelties",),
    sharded={"shard_novelties": "f.word"},
    left_in_place=("novelties",),
    suites={"novelties": (POSSIBLE,)},
    table_expectations=(POSSIBLE,),
)
"""
TAKEN_UP = """
import pickle, sys
import schemas, schemas.experiments
schemas.__path__.append(sys.argv[1])
schemas.experiments.EXPERIMENTS += ("novel",)
from schemas.config import Config
from schemas.expectations import SUITES
from schemas.tables import LEFT_IN_PLACE, MEMBERS, SHARDED_SELECT, SHARD_FILES, TABLES, TOGETHER
from schemas.work import STAGES
config = Config.model_validate({"corpus": {"urls": ["a"]}, "model": {"name": "m"}, "novel": {}})
assert pickle.loads(pickle.dumps(config)) == config
assert schemas.experiments.asked_for(config) == ("novel",)
assert config.experiments == (config.novel,) and config.heldout_share == 0.25
assert "novel" in Config.model_json_schema()["properties"]
assert STAGES[-3:] == ("novelties", "tables", "report")
assert MEMBERS["novel"] == ("novelties",) and ("novel", ("novelties",)) in TOGETHER
assert "novelty" in SHARD_FILES and "novelties" in TABLES and "shard_novelties" in SHARDED_SELECT
assert "novelties" in LEFT_IN_PLACE and SUITES["novelties"][0] in SUITES["tables"]
"""


@pytest.mark.process
def test_a_new_experiment_is_a_folder_and_a_word_in_the_list(tmp_path: Path) -> None:
    (tmp_path / "novel").mkdir()
    (tmp_path / "novel" / "__init__.py").write_text(NOVEL)
    subprocess.run(
        [sys.executable, "-c", TAKEN_UP, str(tmp_path)], check=True, cwd=SCHEMAS.parent, timeout=60
    )


def test_what_the_spine_asks_of_experiments() -> None:
    counting = Config.model_validate(COUNTING)
    assert asked_for(counting) == ()
    assert counting.experiments == ()
    assert (counting.subject, counting.vocabulary_size, counting.heldout_share) == ("m", None, None)
    assert not counting.needs_head
    trained = Config.model_validate(
        {
            "corpus": {"urls": ["a.txt"]},
            "consolidation": {
                **SERIES,
                "series": [{"name": "a", "folder": "f"}, {"name": "b", "folder": "g"}],
            }
            | {"train": {"tokens": 10, "vocabulary_size": 400}},
        }
    )
    assert asked_for(trained) == ("pretraining",)
    assert (trained.subject, trained.vocabulary_size, trained.heldout_share) == ("a, b", 400, 0.2)
    both = Config.model_validate({**GRAPH, "consolidation": SERIES, "steering": {"cases": "c.toml"}})
    assert asked_for(both) == ("steering", "pretraining")
    assert both.experiments == (both.steering, both.consolidation, both.losses)
    assert both.needs_head
    assert both.subject == "m"


def test_a_configuration_is_pickled_by_name_for_workers() -> None:
    config = Config.model_validate({**GRAPH, "steering": {"cases": "c.toml"}})
    pickled = pickle.dumps(config)
    assert pickle.loads(pickled) == config
    assert b"schemas.config" in pickled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**COUNTING, "steering": {"cases": "c"}}, "steering needs dictionaries"),
        ({**GRAPH, "steering": {"cases": "c", "layer": 2}}, r"steering\.layer = 2 has no sae entry"),
        ({**COUNTING, "steering": {"case": "c"}}, r"steering\.case\b"),
        (
            {**COUNTING, "consolidation": {**SERIES, "train": {"tokens": 1, "vocabulary_size": 400}}},
            "leave model.name and model.tokenizer out",
        ),
        (
            {"corpus": {"urls": ["a"]}, "model": {"tokenizer": "t"}, "consolidation": SERIES},
            "revisions of which model",
        ),
    ],
)
def test_an_experiments_section_is_checked_against_the_rest(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)


def test_the_lowest_floor_names_no_experiment() -> None:
    names = {
        name
        for room in experiment_rooms()
        for name in (room.name, room.group, *room.sections, *room.stages, *room.tables)
    }
    shared = [*SCHEMAS.glob("*.py")]
    shared += [path for room in ("corpus", "dictionaries", "graph") for path in (SCHEMAS / room).glob("*.py")]
    shared += [*(SCHEMAS.parent / "infra").glob("*.py")]
    word = re.compile(rf"""["'`.](?:{"|".join(sorted(names))})["'`.\s]""")
    found = {
        path.relative_to(SCHEMAS.parent).as_posix(): word.findall(path.read_text("utf-8"))
        for path in shared
        if path.name != "experiments.py"
    }
    assert {name: words for name, words in found.items() if words} == {}
