"""The command line as a person meets it: every command, its errors, and its exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import hostile
import pyarrow.parquet as pq
import pytest

from functok import cli
from infra.config_file import load_config
from schemas.config import Config
from schemas.errors import ConfigError, whole_message

REPOSITORY = Path(__file__).parents[2]


class Done:
    """What a command printed and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


def functok(capfdbinary: Any, *arguments: object) -> Done:
    status = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capfdbinary.readouterr()
    return Done(status, captured.out.decode(errors="replace"), captured.err.decode())


def test_every_command_explains_itself(capfdbinary: Any) -> None:
    overview = functok(capfdbinary, "--help")
    assert overview.status == 0
    for command in ("run", "query", "catalog", "report", "status", "up"):
        assert command in overview.out
        shown = functok(capfdbinary, command, "--help")
        assert shown.status == 0
        assert "--root" in shown.out
        assert "--debug" in shown.out


def test_a_finished_run_has_nothing_to_do_and_shows_its_coverage(finished: Path, capfdbinary: Any) -> None:
    done = functok(capfdbinary, "run", finished / "tiny.toml")
    assert done.status == 0, done.err
    assert "nothing to do" in done.out
    assert "layer 1" in done.out
    assert "report.html" in done.out


def test_status_says_what_would_run_and_why(finished: Path, capfdbinary: Any, tmp_path: Path) -> None:
    current = functok(capfdbinary, "status", finished / "tiny.toml")
    assert current.status == 0
    assert "all feature shards are there" in " ".join(current.out.split())
    fresh = functok(capfdbinary, "status", finished / "tiny.toml", "--root", tmp_path)
    assert "tokenize: tokenize" in fresh.out
    stale = functok(capfdbinary, "status", finished / "tiny.toml", "--set", "windows.context_size=32")
    assert "layers 1" in " ".join(stale.out.split())


@pytest.mark.slow
def test_query_in_every_format(finished: Path, capfdbinary: Any, tmp_path: Path) -> None:
    sql = "SELECT token_id, token, rank FROM tokens ORDER BY rank LIMIT 3"
    root = ["--root", finished / "run"]
    as_json = json.loads(functok(capfdbinary, "query", sql, *root, "--format", "json").out)
    assert [row["rank"] for row in as_json] == [1, 2, 3]
    as_csv = list(
        csv.DictReader(io.StringIO(functok(capfdbinary, "query", sql, *root, "--format", "csv").out))
    )
    assert [int(row["token_id"]) for row in as_csv] == [row["token_id"] for row in as_json]
    file = tmp_path / "result.parquet"
    assert functok(capfdbinary, "query", sql, *root, "--format", "parquet", "-o", file).status == 0
    assert pq.read_table(file).to_pylist() == as_json
    assert as_json[0]["token"].strip() in functok(capfdbinary, "query", sql, *root).out
    assert json.loads(functok(capfdbinary, "query", f"{sql[:-1]}0", *root, "--format", "json").out) == []
    tables = functok(capfdbinary, "query", "SHOW TABLES", *root, "--format", "csv").out
    for table in ("documents", "rejects", "tokens", "occurrences", "activations", "edges", "coverage"):
        assert table in tables
    odd = functok(capfdbinary, "query", "SELECT 'inf'::DOUBLE AS a, [1.5] AS b", *root, "--format", "json")
    assert json.loads(odd.out) == [{"a": None, "b": [1.5]}]
    sql = (
        "SELECT [1, NULL, 3] AS ids, {'a': 'é, \"', 'b': 'inf'::DOUBLE} AS pair, MAP{'k': 'inf'::DOUBLE} AS map, "
        "[1, 2]::INT[2] AS fixed, [[1.5]] AS deep, 7 AS n "
        "UNION ALL SELECT NULL, NULL, NULL, NULL, NULL, NULL ORDER BY n"
    )
    nested = functok(capfdbinary, "query", sql, *root, "--format", "csv")
    assert nested.status == 0
    first, nothing = csv.DictReader(io.StringIO(nested.out))
    assert {name: json.loads(text) for name, text in first.items()} == {
        "ids": [1, None, 3],
        "pair": {"a": 'é, "', "b": None},
        "map": [["k", None]],
        "fixed": [1, 2],
        "deep": [[1.5]],
        "n": 7,
    }
    assert set(nothing.values()) == {""}
    assert json.loads(functok(capfdbinary, "query", sql, *root, "--format", "json").out)[0]["map"] == [
        ["k", None]
    ]
    sql = "SELECT union_value(k := 1) AS a"
    refused = functok(
        capfdbinary, "query", sql, *root, "--format", "parquet", "-o", tmp_path / "union.parquet"
    )
    assert refused.status == 1
    assert "CAST(" in refused.err
    escape = functok(capfdbinary, "query", "SELECT chr(27) || '[31mred' AS a", *root)
    assert "\x1b[31mred" not in escape.out
    assert "␛[31mred" in escape.out
    doubled = functok(capfdbinary, "query", "SELECT 1 AS a, 2 AS a", *root)
    assert "1" in doubled.out
    assert "2" in doubled.out


def test_a_damaged_file_is_named_with_the_way_out(finished: Path, capfdbinary: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(finished / "run", tmp_path / "run")
    damaged = next(copy.glob("features/*/activations.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    done = functok(capfdbinary, "query", "SELECT sum(activation) FROM activations", "--root", copy)
    assert done.status == 1
    assert str(damaged) in done.err
    assert "functok verify CONFIG --repair" in done.err


@pytest.mark.process
def test_the_prompt_reads_statements_to_their_semicolon(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "functok", "query", "--root", str(finished / "run")],
        input=".tables\nSELECT count(*) AS n\nFROM documents;\nSELECT nonsense;\n.quit\n",
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0
    assert "coverage" in done.stdout
    assert "20" in done.stdout
    assert "the query failed" in done.stdout


def test_catalog_opens_in_any_client(finished: Path, capfdbinary: Any, tmp_path: Path) -> None:
    path = tmp_path / "here.duckdb"
    assert functok(capfdbinary, "catalog", path, "--root", finished / "run").status == 0
    connection = duckdb.connect(str(path), read_only=True)
    views = {
        row[0] for row in connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    }
    assert {
        "documents",
        "tokens",
        "occurrences",
        "activations",
        "edges",
        "coverage",
        "graph_summary",
    } <= views
    assert connection.sql("SELECT count(*) FROM documents").fetchall() == [(20,)]
    assert connection.sql("SELECT sum(n) = (SELECT count(*) FROM activations) FROM edges").fetchall() == [
        (True,)
    ]


@pytest.mark.slow
def test_report_is_written_again(finished: Path, capfdbinary: Any) -> None:
    report = finished / "run" / "report.html"
    before = report.read_bytes()
    report.unlink()
    done = functok(capfdbinary, "report", "--root", finished / "run")
    assert done.out.strip() == str(report)
    assert report.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "cannot read the configuration nowhere.toml"),
        (["run", "{}/tiny.toml", "--set", "corpus.typo=1"], "corpus.typo"),
        (["run", "{}/tiny.toml", "--set", "nonsense"], "key.path=value"),
        (["run", "{}/tiny.toml", "--set", "sae.3.path='x'"], "no index"),
        (["run", "{}/tiny.toml", "--only", "report", "--from", "tables"], "exclude each other"),
        (["run", "{}/tiny.toml", "--set", "corpus.urls=['{}/none.jsonl']"], "none.jsonl"),
        (["run", "{}/tiny.toml", "--set", "model.name='{}/none'"], "none"),
        (["run", "{}/tiny.toml", "--set", "corpus.text_feild=x"], "did you mean text_field"),
        (["run", "{}/tiny.toml", "--set", "corpus.urls=['{}/model']"], "is a folder"),
        (["status", "{}/tiny.toml", "--set", "sae.0.layer=9"], "layer 9"),
        (
            ["status", "{}/tiny.toml", "--set", "sae.0.path='https://me@host/sae'"],
            "sae.0.path carries a password",
        ),
        (["status", "{}/tiny.toml", "--set", "windows.context_size=4096"], "more than"),
        (["run", "{}/tiny.toml", "--set", "storage.root="], "storage.root"),
        (["catalog", "{}/tiny.toml", "--root", "{}/run"], "is no DuckDB file"),
        (["query", " ", "--root", "{}/run"], "the query is empty"),
        (["query", "SELECT 1", "--root", "{}/empty"], "holds no finished tables"),
        (["query", "SELECT nonsense", "--root", "{}/run"], "the query failed"),
        (["catalog", "x.duckdb", "--root", "{}/empty"], "holds no finished tables"),
        (["report", "--root", "{}/empty"], "holds no finished tables"),
    ],
)
def test_errors_are_one_line_on_stderr_with_a_way_out(
    finished: Path, capfdbinary: Any, arguments: list[str], message: str
) -> None:
    done = functok(capfdbinary, *(argument.replace("{}", str(finished)) for argument in arguments))
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.err.startswith("error")


@pytest.mark.process
def test_nothing_follows_an_error(tmp_path: Path) -> None:
    """Prefect's daemon threads keep DuckDB alive in a failed run, whose bindings then report leaks at exit."""
    program = (
        "import sys, threading, time, duckdb\n"
        "def hold(connection=duckdb.connect()):\n"
        "    time.sleep(600)\n"
        "threading.Thread(target=hold, daemon=True).start()\n"
        "from functok import cli\n"
        "sys.argv = ['functok', 'report', '--root', sys.argv[1]]\n"
        "cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "error in the configuration",
        "  way out",
    ]


@pytest.mark.process
def test_libraries_show_no_progress_of_their_own(finished: Path) -> None:
    program = (
        "import contextlib, sys\n"
        "from functok import cli\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main(['--help'])\n"
        "from transformers import AutoModelForCausalLM\n"
        "from tqdm.auto import tqdm\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "list(tqdm(range(3)))\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TQDM", "HF_HUB_DIS"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(finished / "model")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_library_says_is_told_whole() -> None:
    error = ValueError("Some weights are missing:\n  model.embed\n  lm_head\n")
    assert whole_message(error) == "Some weights are missing: model.embed lm_head"
    assert whole_message(error, with_type=True).startswith("ValueError: Some")
    assert whole_message(KeyError()) == "KeyError"
    quoted = RuntimeError("Traceback (most recent call last):\n  File x\nOSError: no space left")
    assert whole_message(quoted) == "OSError: no space left"
    assert whole_message(ValueError("\udce9")) == "\\udce9"
    assert len(whole_message(ValueError("long " * 10_000))) < 1_100


def test_an_unexpected_error_is_told_whole(capfdbinary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Some weights are missing:\nmodel.embed")

    monkeypatch.setattr(cli, "_published", fail)
    assert "RuntimeError: Some weights are missing: model.embed\n" in functok(capfdbinary, "report").err


def test_debug_shows_the_traceback(finished: Path) -> None:
    with pytest.raises(ConfigError):
        cli.main(["run", "nowhere.toml", "--debug"])


def test_values_of_set_are_toml_or_text(finished: Path) -> None:
    config = load_config(
        finished / "tiny.toml",
        [
            "graph.rarefaction_m=7",
            "model.dtype=float32",
            "corpus.urls=['a.txt']",
            "sae.0.layer=2",
            "duckdb.threads=1",
        ],
        root="elsewhere",
    )
    assert (config.graph.rarefaction_m, config.model.dtype, config.corpus.urls) == (7, "float32", ["a.txt"])
    assert (config.sae[0].layer, config.duckdb.threads, config.storage.root) == (2, 1, "elsewhere")


CONFIGURATIONS = {path.name for path in (REPOSITORY / "configs").glob("*.toml")} - {
    "cases.toml",
    "cases-chat.toml",
}


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_shipped_configurations_are_valid(name: str) -> None:
    assert isinstance(load_config(REPOSITORY / "configs" / name), Config)


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ([{"layer": 1}], "exactly one"),
        ([{"layer": 1, "release": "x"}], "go together"),
        ([{"layer": 1, "path": "a", "train": {"d_sae": 8, "k": 2}}], "exactly one"),
        ([{"layer": 1, "path": "a"}, {"layer": 1, "path": "b"}], "one entry a layer"),
    ],
)
def test_contradictions_are_refused(sae: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"corpus": {"urls": ["a.txt"]}, "model": {"name": "m"}, "sae": sae})


@pytest.mark.server
def test_functok_run_needs_no_server(finished: Path, tmp_path: Path, capfdbinary: Any) -> None:
    arguments = ["run", str(finished / "tiny.toml"), "--root", str(tmp_path / "run")]
    command = [sys.executable, "-m", "functok", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    # A project may have folders called as ours are: neither the run nor its server and workers take them for ours.
    project = hostile.lay_out(tmp_path / "project")
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Coverage" in done.stdout
    assert "distributed" not in done.stderr
    assert "nothing to do" in functok(capfdbinary, *arguments).out
