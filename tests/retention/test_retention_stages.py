"""The stages of retention on a tiny model: what is made, what is made again, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from builders import commit_again
from plain import finished
from pydantic import ValidationError

from infra.config_file import load_config
from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, ExpectationError, ModelError
from tasks.corpus.tables import CorpusTables
from tasks.engine import checks
from tasks.engine import tables as engine_tables
from tasks.engine.run import Run, plan
from tasks.report.bootstrap import bootstrap
from tasks.retention.gates import GATES, read_gate
from tasks.retention.readings import READINGS
from tasks.retention.setups import check_fit
from tasks.retention.speed import SPEEDS
from tasks.retention.tables import RETENTION_GROUP

POLICIES = ["streaming", "random", "cmp"]
LEAN: dict[str, Any] = {"policies": POLICIES, "layers_every": 3}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def root(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with finished readings, made once: tests add to it, or copy it."""
    root = tmp_path_factory.mktemp("run")
    finished(small.config(parts, root, **LEAN), None, READINGS, checked=True)
    return root


def lines(run: Run) -> dict[str, list[str]]:
    return {entry.stage: list(entry.details) for entry in plan(run, [READINGS, SPEEDS])}


def publish(run: Run) -> None:
    made = [CorpusTables([]).build(run), RETENTION_GROUP.build(run)]
    catalog = engine_tables.candidate(run.storage, made)
    checks.check_tables(run.config, run.storage, catalog)
    engine_tables.publish(run.storage, catalog)


def written(root: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in (root / "retention").rglob("*.parquet")}


@pytest.mark.slow
def test_a_policy_that_is_added_is_read_alone(parts: Path, root: Path) -> None:
    before = written(root)
    more = small.config(parts, root, **{**LEAN, "policies": [*POLICIES, "window"]})
    assert lines(finished(small.config(parts, root, **LEAN)))["retention"] == []
    assert lines(finished(more))["retention"] == ["window at 0.4, stream, 96 tokens: 3 sequences"]
    finished(more, None, READINGS)
    after = written(root)
    assert {name: after[name] for name in before} == before
    # `retention` at its largest: four files a reading.
    assert len(after) - len(before) == 3 * 4


@pytest.mark.slow
def test_readings_do_not_depend_on_what_is_read_beside_them(parts: Path, root: Path, tmp_path: Path) -> None:
    alone = finished(
        small.config(parts, tmp_path, **{**LEAN, "policies": ["cmp"], "at_once": 1}), None, READINGS
    )
    together = finished(small.config(parts, root, **LEAN))
    folders = {reading.folder for reading in together.result(READINGS)}
    for reading in alone.result(READINGS):
        assert reading.folder in folders
        for name in ("reading_sums", "reading_losses", "reading_layers", "reading_survival"):
            file = f"{reading.folder}/{name}.parquet"
            assert pq.read_table(tmp_path / file).equals(pq.read_table(root / file)), file


@pytest.mark.slow
def test_a_file_that_joins_brings_its_own_sequences(parts: Path, root: Path) -> None:
    wider = [{"length": small.LENGTH, "documents": 99}]
    one = finished(small.config(parts, root, **{**LEAN, "sequences": wider}), None, READINGS)
    before = {reading.sequence for reading in one.result(READINGS)}
    two = small.config(parts, root, files=("a", "b"), **{**LEAN, "sequences": wider})
    run = finished(two, None, READINGS)
    after = {reading.sequence for reading in run.result(READINGS)}
    assert before < after


def test_options_make_another_policy_under_a_name_of_its_own(parts: Path, root: Path) -> None:
    named = {
        "options": {
            **small.RETENTION["options"],
            "int4": {"policy": "cmp", "bits": 4, "group": 2, "hot_share": 0.8},
        }
    }
    config = small.config(parts, root, **{**LEAN, **named, "policies": [*POLICIES, "int4"]})
    assert lines(finished(config))["retention"] == ["int4 at 0.4, stream, 96 tokens: 3 sequences"]
    # The same options under two names are one reading.
    same = {
        "options": {**small.RETENTION["options"], "again": {"policy": "cmp", "group": 2, "hot_share": 0.8}}
    }
    config = small.config(parts, root, **{**LEAN, **same, "policies": [*POLICIES, "again"]})
    assert lines(finished(config))["retention"] == []


@pytest.mark.slow
def test_tables_are_sums_over_sequences(parts: Path, root: Path) -> None:
    run = finished(small.config(parts, root, **LEAN))
    publish(run)
    readings = run.result(READINGS)
    files = {
        reading: {
            name: pq.read_table(root / reading.folder / f"{name}.parquet").to_pylist()
            for name in ("reading_sums", "reading_losses", "reading_layers", "reading_survival")
        }
        for reading in readings
    }
    with connect(run.storage) as connection:
        found = {table: rows_of(connection, table) for table in RETENTION_GROUP.planned(run).tables}
    assert {row["policy"] for row in found["retention"]} == {"full", *POLICIES}
    for row in found["retention"]:
        own = [
            files[reading]["reading_sums"][0] for reading in readings if reading.setup.policy == row["policy"]
        ]
        n = sum(one["n"] for one in own)
        delta = np.array([[one["n"], (one["loss_units"] - one["full_loss_units"]) / 2**32] for one in own])
        assert (row["n_documents"], row["n_tokens"]) == (3, n)
        assert row["perplexity"] == pytest.approx(np.exp(sum(one["loss_units"] for one in own) / 2**32 / n))
        assert row["perplexity_ratio"] == pytest.approx(np.exp(delta[:, 1].sum() / n))
        low, high = bootstrap(delta, lambda sums: np.exp(sums[:, 1:] / sums[:, :1]), 50)[0]
        assert (row["perplexity_ratio_low"], row["perplexity_ratio_high"]) == pytest.approx((low, high))
        assert row["top1_agreement"] == pytest.approx(sum(one["agreed"] for one in own) / n)
        held = sum(one["hot_bytes"] + one["warm_bytes"] + one["state_bytes"] for one in own)
        mean = held / sum(one["chunks"] for one in own)
        assert row["kv_bytes_mean"] == pytest.approx(mean)
        assert row["kv_bytes_share"] == pytest.approx(mean / own[0]["full_bytes"])
        assert row["kv_bytes_peak"] == max(one["peak_bytes"] for one in own)
    for row in found["retention_layers"]:
        own = [
            layer
            for reading in readings
            if reading.setup.policy == row["policy"]
            for layer in files[reading]["reading_layers"]
            if layer["layer"] == row["layer"]
        ]
        for name in ("error", "local_error", "retained_mass", "attention_entropy", "key_similarity"):
            assert row[name] == pytest.approx(np.mean([one[name] for one in own]), abs=1e-8), name
        assert row["function_share"] == pytest.approx(
            sum(one["kept_function"] for one in own) / sum(one["kept"] for one in own)
        )
        if row["local_error"]:
            assert row["carried"] == pytest.approx(row["error"] / row["local_error"])
    check_survival(found["retention_survival"], readings, files)
    check_curves(found["retention_curves"], readings, files)
    check_losses(found, readings, files)


def check_survival(found: list[dict[str, Any]], readings: Any, files: Any) -> None:
    curves: dict[tuple[Any, ...], float] = {}
    for policy, tiers in (("full", ["hot"]), ("random", ["hot"]), ("cmp", ["hot", "warm", "cold"])):
        for layer in range(3):
            for kind in ("function", "content"):
                for tier in tiers:
                    survival = 1.0
                    for age in range(0, small.LENGTH, 8):
                        own = [
                            row
                            for reading in readings
                            if reading.setup.policy == policy
                            for row in files[reading]["reading_survival"]
                            if (row["layer"], row["kind"], row["tier"], row["age"])
                            == (layer, kind, tier, age)
                        ]
                        if not own:
                            break
                        died, at_risk = (sum(row[name] for row in own) for name in ("died", "at_risk"))
                        survival *= 1 - died / at_risk
                        curves[policy, layer, kind, tier, age] = survival
    told = {tuple(row[k] for k in ("policy", "layer", "kind", "tier", "age")): row for row in found}
    assert set(curves) == {key for key in told if key[0] in {"full", "random", "cmp"}}
    for key, survival in curves.items():
        assert told[key]["survival"] == pytest.approx(survival)
        # The full cache has another budget than any `random`.
        random = None if key[0] == "full" else curves.get(("random", *key[1:3], "hot", key[4]))
        expected = None if not random else survival / random
        assert told[key]["ratio_to_random"] == (None if expected is None else pytest.approx(expected))


def check_curves(found: list[dict[str, Any]], readings: Any, files: Any) -> None:
    """Layers together, and the bootstrap's ends, sequence by sequence."""
    kind, tier, ages = "content", "hot", range(0, small.LENGTH, 8)

    def counts(policy: str) -> np.ndarray[Any, Any]:
        own = [reading for reading in readings if reading.setup.policy == policy]
        made = np.zeros((len(own), 2, len(ages)))
        for sequence, reading in enumerate(own):
            for row in files[reading]["reading_survival"]:
                if (row["kind"], row["tier"]) == (kind, tier):
                    made[sequence, :, row["age"] // 8] += row["at_risk"], row["died"]
        return made

    def survivals(sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        at_risk, died = np.moveaxis(sums.reshape(len(sums), -1, 2, len(ages)), 2, 0)
        return np.prod(1 - died[..., :4] / at_risk[..., :4], axis=-1)

    both = np.stack([counts("streaming"), counts("random")], axis=1)
    flat = both.reshape(len(both), -1)
    (own, of_random) = survivals(flat.sum(0)[None])[0]
    ends = bootstrap(
        flat, lambda sums: (lambda s: np.stack([s[:, 0], s[:, 0] / s[:, 1]], 1))(survivals(sums)), 50
    )
    (row,) = (
        row
        for row in found
        if (row["policy"], row["kind"], row["tier"], row["age"]) == ("streaming", kind, tier, 24)
    )
    assert row["survival"] == pytest.approx(own)
    assert row["ratio_to_random"] == pytest.approx(own / of_random)
    told = [row[f"{name}_{end}"] for name in ("survival", "ratio_to_random") for end in ("low", "high")]
    assert told == pytest.approx(ends.ravel().tolist())


def check_losses(found: dict[str, list[dict[str, Any]]], readings: Any, files: Any) -> None:
    keys = ("policy", "bucket", "position_from")
    cells: dict[tuple[Any, ...], list[float]] = {}
    for reading in readings:
        for row in files[reading]["reading_losses"]:
            delta = (row["loss_units"] - row["full_loss_units"]) / 2**32
            for key in (
                (reading.setup.policy, row["bucket"], row["position_from"]),
                (reading.setup.policy, row["bucket"], None),
                (reading.setup.policy, None, row["position_from"]),
            ):
                cell = cells.setdefault(key, [0, 0.0])
                cell[0] += row["n"]
                cell[1] += delta
    told = {
        tuple(row[k] for k in keys): row
        for table in ("retention_losses", "retention_margins")
        for row in found[table]
    }
    assert set(told) == set(cells)
    for key, (n, delta) in cells.items():
        assert told[key]["n"] == n
        assert told[key]["delta_nll"] == pytest.approx(delta / n, abs=1e-9)
        if key[0] != "full" and n > 20:
            assert told[key]["delta_nll_low"] <= told[key]["delta_nll"] <= told[key]["delta_nll_high"]


def rows_of(connection: Any, table: str) -> list[dict[str, Any]]:
    found = connection.execute(f"SELECT * FROM {table}")
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


@pytest.mark.process
def test_a_killed_run_goes_on(parts: Path, root: Path, tmp_path: Path) -> None:
    config = small.config(parts, tmp_path / "run", **LEAN)
    toml = tmp_path / "small.toml"
    toml.write_text(_toml(config))
    program = Path(__file__).parents[1] / "plain.py"
    # The fifth write of a reading's file: one reading is whole, the next has begun.
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(program.parent), str(toml), "retention/", "7"],
        check=False,
        env=_environment(),
    )
    assert killed.returncode == -signal.SIGKILL
    (done,) = _plans(config)
    assert 0 < done.done < 12
    whole = written(tmp_path / "run")
    run = finished(config, None, READINGS, checked=True)
    again = written(tmp_path / "run")
    kept = [name for name in whole if again.get(name) == whole[name]]
    assert len(kept) >= 4 * done.done
    for reading in run.result(READINGS):
        file = f"{reading.folder}/reading_sums.parquet"
        assert pq.read_table(tmp_path / "run" / file).equals(pq.read_table(root / file))


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import plain
from infra.config_file import load_config
from tasks.retention.readings import READINGS
plain._killing(sys.argv[3], int(sys.argv[4]))
plain.finished(load_config(sys.argv[2]), None, READINGS)
"""


def _environment() -> dict[str, str]:
    here = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(here)}


def _toml(config: Config) -> str:
    section = config.model_dump(mode="json")["retention"]
    policies = ", ".join(f'"{name}"' for name in section["policies"])
    return (
        f'[corpus]\nurls = ["{config.corpus.urls[0]}"]\n[model]\nname = "{config.model.name}"\ndevice = "cpu"\n'
        f'threads = 1\n[windows]\ncontext_size = 64\n[storage]\nroot = "{config.storage.root}"\n[retention]\n'
        f"policies = [{policies}]\nbudgets = [0.4]\nchunk = 8\nheldout_share = 0.6\nsinks = 2\nrecent = 4\n"
        f"resamples = 50\nlayers_every = 3\n[[retention.sequences]]\nlength = {small.LENGTH}\ndocuments = 3\n"
        "[retention.options.cmp]\ngroup = 2\nhot_share = 0.8\n[retention.options.snapkv]\nwindow = 8\n"
    )


def _plans(config: Config) -> Any:
    return plan(finished(config), [READINGS])


@pytest.mark.slow
def test_a_gate_is_trained_on_documents_that_are_not_read(parts: Path, tmp_path: Path) -> None:
    options = {**small.RETENTION["options"], "gated": {"policy": "str", "gate": True}}
    config = small.config(
        parts,
        tmp_path,
        **{**LEAN, "policies": ["str", "gated"], "options": options, "gate_length": 48, "gate_sequences": 2},
        heldout_share=0.5,
        sequences=[{"length": 96, "documents": 1}],
    )
    run = finished(config, None, GATES, READINGS, checked=True)
    folder = run.result(GATES)
    assert folder is not None
    gate = read_gate(run.storage, folder)
    assert gate.weights.shape == (3, 2, 5)
    assert bool(gate.weights.isfinite().all())
    trained = {
        (piece.folder, piece.doc)
        for unit in run.find(GATES).units
        for s in unit.sequences
        for piece in s.pieces
    }
    read = {(piece.folder, piece.doc) for one in run.result(READINGS) for piece in one.sequence.pieces}
    assert trained
    assert not trained & read
    losses = {
        reading.setup.policy: pq.read_table(tmp_path / reading.folder / "reading_sums.parquet")["loss_units"][
            0
        ].as_py()
        for reading in run.result(READINGS)
    }
    assert len(set(losses.values())) == 3


@pytest.mark.slow
def test_speed_is_told_with_where_it_was_measured(parts: Path, root: Path) -> None:
    speed = {"policies": ["streaming", "cmp"], "budgets": [0.5], "lengths": [96], "tokens": 2, "turns": 3}
    run = finished(small.config(parts, root, **LEAN, speed=speed), None, READINGS, SPEEDS, checked=True)
    publish(run)
    with connect(run.storage) as connection:
        rows = rows_of(connection, "retention_speed")
    assert [(row["policy"], row["turns"], row["tokens"]) for row in rows] == [
        ("cmp", 3, 2),
        ("streaming", 3, 2),
    ]
    # 8 of 96 tokens are decoded; caches hold what came before, and half of it.
    full = {row["full_kv_bytes"] for row in rows}
    assert len(full) == 1
    for row in rows:
        assert 0.4 < row["kv_bytes"] / row["full_kv_bytes"] <= 0.51
        assert row["speed_ratio_low"] <= row["speed_ratio"] <= row["speed_ratio_high"]
        assert row["device"] == "cpu"


@pytest.mark.parametrize(
    ("file", "change", "expectation"),
    [
        ("reading_sums", {"most_slots": 10_000}, "budgets are kept"),
        ("reading_sums", {"loss_units": lambda n: n + 1}, "groups of losses add up"),
        ("reading_sums", {"kl_units": 5, "agreed": 3}, "the full cache equals itself"),
        ("reading_sums", {"peak_bytes": 1}, "bytes of tiers add up"),
        ("reading_sums", {"n": 0}, "sums of a reading are possible"),
        ("reading_layers", {"error": 0.5}, "the full cache has no error"),
        ("reading_layers", {"retained_mass": 1.5}, "figures of layers are possible"),
        ("reading_survival", {"died": lambda n: n + 10_000}, "lives end once"),
        ("reading_survival", {"age": 0}, "ages of a life table are unique"),
    ],
)
@pytest.mark.slow
def test_doctored_readings_are_found(
    parts: Path, tmp_path: Path, root: Path, file: str, change: dict[str, Any], expectation: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    config = small.config(parts, copy, **LEAN)
    run = finished(config)
    full = expectation.startswith("the full")
    policy = "full" if full else ("streaming" if "budgets" in expectation else "cmp")
    folder = next(one.folder for one in run.result(READINGS) if one.setup.policy == policy)
    place = copy / folder / f"{file}.parquet"
    table = pq.read_table(place)
    for name, new in change.items():
        values = [new(v) if callable(new) else new for v in table[name].to_pylist()]
        table = table.set_column(
            table.column_names.index(name), name, pa.array(values, table.schema.field(name).type)
        )
    pq.write_table(table, place)
    commit_again(run.storage, folder)
    # Both tell of the folder as it was: the index, and the check that was passed.
    for told in ("index", "validation"):
        shutil.rmtree(copy / told)
    with pytest.raises(ExpectationError, match=expectation):
        checks.check(finished(config), READINGS)


@pytest.mark.parametrize(
    ("table", "sql", "expectation"),
    [
        ("retention", "kv_bytes_most + 1e9::BIGINT AS kv_bytes_most", "budgets are kept in every row"),
        (
            "retention",
            "if(policy = 'full', 1.1, perplexity_ratio) AS perplexity_ratio",
            "the full cache is its own",
        ),
        ("retention", "warm_bytes_mean + 9 AS warm_bytes_mean", "bytes of all tensors add up"),
        ("retention_survival", "if(age = 40, 2.0, survival) AS survival", "survival falls with age"),
        ("retention_losses", "n + 1 AS n", "loss groups are all predictions"),
        ("retention_layers", "if(error > 0, 9.0, carried) AS carried", "layers are possible"),
    ],
)
@pytest.mark.slow
def test_doctored_tables_are_found(parts: Path, root: Path, table: str, sql: str, expectation: str) -> None:
    run = finished(small.config(parts, root, **LEAN))
    group = RETENTION_GROUP.build(run)
    catalog = engine_tables.merged(engine_tables._published(run.storage), CorpusTables([]).build(run), group)
    name = catalog.tables[table]
    whole = pq.read_table(root / name)
    try:
        column = sql.rsplit(" AS ", 1)[1]
        value = sql.rsplit(" AS ", 1)[0]
        made = duckdb.sql(f"SELECT * REPLACE ({value} AS {column}) FROM whole").to_arrow_table()
        pq.write_table(made.select(whole.column_names).cast(whole.schema), root / name)
        commit_again(run.storage, name.rsplit("/", 1)[0])
        with pytest.raises(ExpectationError, match=expectation):
            checks.check_tables(run.config, run.storage, catalog)
    finally:
        pq.write_table(whole, root / name)
        commit_again(run.storage, name.rsplit("/", 1)[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policies": ["h3o"]}, ConfigError, "there is no policy 'h3o'"),
        ({"options": {"streaming": {"window": 3}}}, ConfigError, "streaming has no option 'window'"),
        (
            {"budgets": [0.05]},
            ConfigError,
            r"streaming at 0.05.* leaves 4 tokens .* protection alone keeps 6",
        ),
        (
            {"sequences": [{"length": 1000, "documents": 1}]},
            ModelError,
            r"retention\.sequences: full at 1, .*: sequences of 1,000 tokens are longer than .* was built for",
        ),
        (
            {"speed": {"lengths": [64], "tokens": 16, "turns": 5}},
            ConfigError,
            "retention.speed decodes 96 tokens, which leaves none of 64",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_before_any_work(
    parts: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    policies = {"speed": ["streaming"]} if "speed" in changes else {}
    if policies:
        changes["speed"]["policies"] = ["streaming"]
    config = small.config(parts, tmp_path, **{**LEAN, "policies": ["streaming"], "options": {}, **changes})
    with pytest.raises(error, match=message):
        check_fit(config, Storage(str(tmp_path)), {})
    assert not list(tmp_path.iterdir())


def test_a_model_with_another_attention_is_refused(parts: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=400)).save_pretrained(
        tmp_path / "gpt2"
    )
    config = small.config(parts, tmp_path, **LEAN)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"name": str(tmp_path / "gpt2")})}
    )
    with pytest.raises(ModelError, match=r"gpt2.*is not known to work with a cache that evicts"):
        check_fit(config, Storage(str(tmp_path / "run")), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["full"]}, "full is always read"),
        ({"policies": ["str", "str"]}, "not all different"),
        ({"options": {"mine": {"policy": "str"}}}, "retention.options names 'mine', which"),
        (
            {"policies": ["str"], "options": {"str": {"gate": True}}, "heldout_share": 1},
            "a gate is trained on documents that heldout_share = 1 leaves none of",
        ),
        ({"budgets": [1.5]}, "a budget is a share above 0 and at most 1"),
        ({"sequences": [{"length": 96, "documents": 1, "policies": ["tova"]}]}, "names 'tova', which"),
        ({"protocols": ["prefill"], "prompt_share": 0.01}, "no prompt of whole chunks"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(
    parts: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        small.config(parts, tmp_path, **{**LEAN, **changes})


def test_a_section_is_named_once() -> None:
    values = {"corpus": {"urls": ["a.txt"]}, "model": {"name": "m"}, "retention": {"budgets": [1.5]}}
    with pytest.raises(ConfigError, match=r"^retention: a budget is a share"):
        load_config(values)


def test_too_few_held_out_documents_are_told(parts: Path, root: Path) -> None:
    config = small.config(
        parts, root, **{**LEAN, "heldout_share": 0.1, "sequences": [{"length": 128, "documents": 1}]}
    )
    with pytest.raises(CorpusError, match=r"which do not fill a sequence of 128|is held out by"):
        finished(config).find(READINGS)
