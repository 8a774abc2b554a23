"""The benches run on tiny inputs and print what the table of bench/README.md is made of. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny

from bench import run_all
from bench.overhead import Program
from bench.scale import TIMES, WORK, exponent
from schemas.work import STAGES

ROOT = Path(__file__).resolve().parents[2]
RunBench = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    tiny.save_model(folder / "model")
    tiny.write_jsonl(folder / "corpus.jsonl", tiny.texts(30))
    return folder


@pytest.fixture
def run_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunBench:
    """Runs a bench as `python -m bench.<name>` does, in this process: importing takes longer than it."""

    def run(bench: str, *options: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [bench, *options])
        # A bench sets what holds for its process.
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
        import_module(f"bench.{bench}").main()
        return checked(bench, capsys.readouterr().out)

    return run


def checked(bench: str, said: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(said)
    assert report["bench"] == bench
    assert {"cpu", "cores", "versions", "date"} <= set(report["machine"])
    assert report["limits"]
    for figure in report["figures"]:
        assert figure["min"] <= figure["median"] <= figure["max"]
        # What does not grow has an exponent of 0.
        assert figure["min"] > 0 or (bench == "scale" and figure["min"] == 0)
    return report


@pytest.mark.slow
def test_tokenization(data: Path, run_bench: RunBench) -> None:
    report = run_bench(
        "tokenization",
        *("--model", str(data / "model"), "--corpus", str(data / "corpus.jsonl"), "--rounds", "2"),
    )
    documents = tiny.texts(30)
    assert report["input"]["documents"] == 30
    assert report["input"]["characters"] == sum(map(len, documents))
    assert report["figures"][0]["target"] == "≥ 0.9"
    assert all(len(run_all.rows(report)[0].split(" | ")) == 7 for _ in report["figures"])


@pytest.mark.slow
@pytest.mark.cluster
def test_sharing(data: Path, run_bench: RunBench) -> None:
    given = ("--model", str(data / "model"), "--corpus", str(data / "corpus.jsonl"))
    report = run_bench("sharing", *given, "--rounds", "1", "--megabytes", "5")
    assert report["input"]["bytes"] > 5 << 20
    assert set(report["seconds"]) == set(report["cpu_seconds"])
    assert len(report["figures"]) == 8


@pytest.mark.slow
def test_extraction(data: Path, run_bench: RunBench) -> None:
    report = run_bench(
        "extraction",
        *("--model", str(data / "model"), "--corpus", str(data / "corpus.jsonl"), "--rounds", "1"),
        *("--tokens", "1500", "--context-size", "64", "--layers", "0", "1", "--d-sae", "64", "--l0", "8"),
    )
    assert [figure.get("target") for figure in report["figures"]] == ["≥ 0.9", "≥ 1.5", None, "≤ 4", "≤ 3"]
    assert 0 < report["input"]["tokens"] <= 1500
    assert 4 < report["sizes"]["mean_l0"] < 16
    assert report["flops"]["encode"] == 2 * 2 * tiny.D_MODEL * 64
    assert report["flops"]["up_to_deepest"] < report["flops"]["whole"]


@pytest.mark.slow
def test_losses(data: Path, run_bench: RunBench) -> None:
    report = run_bench(
        "losses",
        *("--model", str(data / "model"), "--corpus", str(data / "corpus.jsonl"), "--rounds", "1"),
        *("--tokens", "1500", "--context-size", "64"),
    )
    assert [figure.get("target") for figure in report["figures"]] == ["≥ 0.9", None]
    assert 0 < report["input"]["predictions"] < report["input"]["tokens"] <= 1500


@pytest.mark.process
def test_training(data: Path) -> None:
    options = (
        *("--corpus", str(data / "corpus.jsonl"), "--rounds", "1", "--steps", "2", "--vocabulary", "300"),
        *(
            "--hidden-size",
            "32",
            "--layers",
            "1",
            "--heads",
            "2",
            "--context-size",
            "32",
            "--batch-tokens",
            "128",
        ),
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.training", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = checked("training", done.stdout)
    assert [figure.get("target") for figure in report["figures"]] == ["≥ 0.9", None]
    assert report["last_loss"]["ours"] == pytest.approx(report["last_loss"]["bare_loop"], rel=1e-4)
    assert report["input"]["tokens"] == 256
    # One block of 4 x 32 x 32 and 3 x 32 x 96 weights, and the tied matrix of 300 tokens.
    assert report["flops"]["per_token"] == 6 * (4 * 32 * 32 + 3 * 32 * 96 + 300 * 32) + 12 * 32 * 32


@pytest.mark.slow
def test_explore(tmp_path: Path, run_bench: RunBench) -> None:
    report = run_bench("explore", "--root", str(tmp_path / "root"), "--activations", "60000", "--rounds", "1")
    assert report["input"]["activations"] >= 60000
    assert [figure["what"] for figure in report["figures"]] == [
        f"explore: seconds of {page}" for page in report["input"]["addresses"]
    ]
    assert all(figure["target"] == "≤ 2" for figure in report["figures"])


@pytest.mark.parametrize("power", [0.5, 1, 1.5, 2])
@pytest.mark.parametrize("constant", [0, 7])
def test_an_exponent_is_found_whatever_the_constant(power: float, constant: float) -> None:
    assert exponent([constant + 3 * work**power for work in TIMES], 0.01) == pytest.approx(power, abs=1e-3)


def test_an_exponent_of_what_has_a_floor_or_does_not_grow() -> None:
    assert exponent([5, 5.0001, 20], 0.01) == 1
    assert exponent([5, 5, 5.005], 0.01) == 0
    assert exponent([5, 6, 5], 0.01) == 0


@pytest.mark.process
def test_scale(run_bench: RunBench) -> None:
    steps = ["tokenize", "tables of corpus", "status"]
    report = run_bench("scale", "--share", "0.05", "--steps", *steps)
    assert list(report["grown"]) == steps
    for of in report["grown"].values():
        assert all(len(entry["at"]) == 3 and min(entry["at"]) > 0 for entry in of.values())
    assert [figure["target"] for figure in report["figures"]] == ["≤ 1.1"] * 3


def test_scale_has_every_stage() -> None:
    """But for dictionaries, of which it trains one, and speeds, which are a measurement themselves."""
    assert {*STAGES} - {"tables", "dictionaries", "retention_speed"} <= {*WORK}


@pytest.mark.process
def test_programs_of_the_overhead_bench_fail_loudly(tmp_path: Path) -> None:
    program = Program(tmp_path)
    program.fresh()
    with pytest.raises(SystemExit, match="no way"):
        program.run(sys.executable, program.script("bad.py", "raise ValueError('no way')"))


def test_table_replaces_what_is_between_the_marks() -> None:
    figure = {"what": "a|b", "median": 0.95, "min": 0.9, "max": 1.0, "n": 3, "target": "≥ 0.9", "met": True}
    report = {
        "command": ["bench.x", "--rounds", "3"],
        "machine": {"cpu": "C", "cores": 2, "date": "2026-01-01"},
        "figures": [figure, figure | {"median": 0.5, "met": False}],
    }
    readme = run_all.README.read_text(encoding="utf-8")
    once = run_all.render(readme, [report])
    assert run_all.render(once, [report]) == once
    assert (
        "| a\\|b | `python -m bench.x --rounds 3` | ≥ 0.9 | 0.95 (0.9 … 1, n = 3) | met | C, 2 cores |"
        in once
    )
    assert "**missed**" in once
    assert once.startswith(readme.partition("<!-- results")[0])
