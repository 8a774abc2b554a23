"""functok as a Python library: the examples of its docstrings, and what it refuses."""

from __future__ import annotations

import doctest
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from s3 import S3Root

import functok
from functok import api
from infra.config_file import load_config
from infra.storage import Storage
from schemas.config import Config
from schemas.errors import ConfigError, DamagedError, StorageError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the examples have it: `my.toml`, and its finished run in `runs/demo`."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copytree(finished / "run", folder / "runs" / "demo")
    config = (finished / "tiny.toml").read_text().replace(f"{finished}/run", "runs/demo")
    (folder / "my.toml").write_text(config)
    return folder


@pytest.mark.parametrize("module", [functok, api])
@pytest.mark.slow
def test_the_examples_are_true(place: Path, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.chdir(place)
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [found for found in finder.find(module, extraglobs={"functok": functok}) if found.examples]
    assert {found.name for found in examples} >= {"functok"} if module is functok else len(examples) >= 6
    runner = doctest.DocTestRunner()
    for example in examples:
        said: list[str] = []
        assert runner.run(example, out=said.append).failed == 0, "".join(said)


@pytest.mark.process
def test_importing_it_is_light() -> None:
    heavy = ("torch", "prefect", "duckdb", "pyarrow", "pydantic", "transformers")
    program = f"import sys, functok; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_a_table_is_what_sql_says(place: Path) -> None:
    with functok.open(place / "runs" / "demo") as run:
        tokens = run.table("tokens")
        assert isinstance(tokens, pa.Table)
        assert tokens.to_pandas().token_id.tolist() == [
            row[0] for row in run.sql("SELECT token_id FROM tokens").fetchall()
        ]
        assert list(run.tables) == sorted(run.tables)
        assert run.sql("SELECT count(*) FROM tokens WHERE rank <= ?", [3]).fetchall() == [(3,)]
        with pytest.raises(ConfigError, match="no table 'token'; did you mean tokens"):
            run.table("token")
    assert functok.open(place / "runs" / "demo").sql("SELECT 1").fetchall() == [(1,)]


@pytest.mark.slow
def test_threads_open_a_root_each_for_itself(place: Path) -> None:
    root = place / "runs" / "demo"

    def count(_: int) -> list[tuple[int]]:
        # The relation outlives the run that it is of.
        counted: list[tuple[int]] = functok.open(root).sql("SELECT count(*) FROM activations").fetchall()
        return counted

    with functok.open(root) as run, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count, range(12))) == [[(run.table("activations").num_rows,)]] * 12


@pytest.mark.s3
def test_a_run_in_a_bucket_is_opened_as_one_on_disk(place: Path, moto_root: S3Root) -> None:
    here = place / "runs" / "demo"
    there = Storage(moto_root.url)
    for file in here.rglob("*"):
        if file.is_file():
            there.write_bytes(str(file.relative_to(here)), file.read_bytes())
    with functok.open(moto_root.url) as run, functok.open(here) as local:
        assert run.tables == local.tables
        assert run.table("activations").num_rows == local.table("activations").num_rows > 0
        assert run.report() == f"{moto_root.url}/report.html"


def test_what_is_not_published_is_refused_as_the_command_refuses_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished tables"):
        functok.open(tmp_path)
    with pytest.raises(ConfigError, match="holds no finished tables"):
        functok.OpenRun(tmp_path).report()
    (tmp_path / "my.toml").write_text("")
    with pytest.raises(StorageError, match="give a folder"):
        functok.open(tmp_path / "my.toml")
    with pytest.raises(TypeError, match="NoneType"):
        functok.open(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"tables": 3}', b"{broken"])
def test_a_damaged_catalogue_is_told(place: Path, tmp_path: Path, content: bytes) -> None:
    root = shutil.copytree(place / "runs" / "demo", tmp_path / "run")
    (root / "catalog.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"catalog\.json"):
        functok.open(root)


def test_a_damaged_table_is_told_however_it_is_asked_for(place: Path, tmp_path: Path) -> None:
    root = shutil.copytree(place / "runs" / "demo", tmp_path / "run")
    opened = functok.open(root)
    assert opened.table("coverage").num_rows
    (file,) = root.glob("tables/*/coverage.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    for run in (opened, functok.open(root)):
        with pytest.raises(DamagedError, match=r"coverage\.parquet"):
            run.table("coverage")
        with pytest.raises(DamagedError, match=r"coverage\.parquet"):
            run.sql("SELECT count(*) FROM coverage")
    file.unlink()
    with pytest.raises(DamagedError, match=r"coverage\.parquet"):
        functok.open(root)


def test_a_configuration_is_a_file_a_dictionary_or_a_config(place: Path) -> None:
    values = tomllib.loads((place / "my.toml").read_text())
    root = str(place / "runs" / "demo")
    loaded = load_config(place / "my.toml", root=root)
    plans = functok.status(place / "my.toml", root=root)
    assert plans == functok.status(values, root=root) == functok.status(loaded)
    assert {plan.missing for plan in plans} == {0}
    assert values["storage"]["root"] == "runs/demo"
    changed = functok.status(loaded, assignments=["windows.context_size=32"])
    assert changed == functok.status(values | {"windows": {"context_size": 32}}, root=root)
    assert {plan.stage for plan in changed if plan.missing} >= {"features"}
    assert changed == functok.status(values, root=Path(root), assignments="windows.context_size=32")
    for choice in ({"only": "feature"}, {"start_from": "feature"}):
        with pytest.raises(
            ConfigError, match=r"there is no stage 'feature' \(this configuration has tokenize"
        ):
            functok.run(loaded, **choice)
    with pytest.raises(ConfigError, match=r"^windows\.context_sice: no such key; did you mean context_size"):
        functok.status(values | {"windows": {"context_sice": 32}})
    secret = Config.model_validate(values | {"model": {"name": "https://me:secret@host/model"}})
    with pytest.raises(ConfigError, match=r"model\.name carries a password"):
        functok.run(secret)


def test_a_run_leaves_the_program_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = (signal.getsignal(signal.SIGINT), dict(os.environ))
    woken = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(woken)
    run = functok.run("my.toml")
    assert "nothing to do" in capfd.readouterr().out
    assert "coverage" in run.tables
    monkeypatch.setattr("functok.pipeline.run_pipeline", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        functok.run("my.toml")
    # Another Ctrl-C is the first one again, and not the second of a run that is over.
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(woken)) == (before[0], woken)
    changed = {name for name in before[1] if os.environ.get(name) != before[1][name]}
    assert not changed
