"""Pre-training in processes of their own: killed and gone on, shared by two, sharded over two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from trained import BATCH_TOKENS, STEPS, Training

from schemas.config import Config
from tasks.pretraining.training import as_written

pytestmark = pytest.mark.process
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Training:
    made = Training.prepare(tmp_path_factory.mktemp("training"))
    made.train(made.config())
    return made


@pytest.fixture
def untrained(prepared: Training, tmp_path: Path) -> Training:
    made = prepared.copy(tmp_path / "copy")
    for folder in ("training", "checkpoints"):
        made.storage.delete(folder)
    return made


def run_program(
    training: Training, config: Config, *options: str, launch: bool = False
) -> subprocess.CompletedProcess[str]:
    path = training.folder / "config.json"
    path.write_text(as_written(config, training.storage).model_dump_json())
    done = subprocess.run(
        [
            sys.executable,
            *(LAUNCH if launch else ()),
            "tests/training_program.py",
            str(path),
            "small",
            *options,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0 or "--die" in " ".join(options), done.stderr[-3000:]
    return done


def assert_same(training: Training, other: Training) -> None:
    curves = [made.curve(made.config()) for made in (training, other)]
    assert curves[0] == curves[1]
    weights = [made.weights(made.config()) for made in (training, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_killed_training_goes_on_bit_for_bit(prepared: Training, untrained: Training) -> None:
    config = untrained.config()
    killed = run_program(untrained, config, "--die-at-step", "8", "--die-at-write", "2")
    assert killed.stdout.splitlines() == [
        # Between states: those of steps 4 and 7 (a checkpoint's) were saved, 8 was not.
        "-9 state-00000007",
        # In the middle of writing the state of step 8 (its files: curve, state, manifest).
        "-9 state-00000007 state-00000008",
    ]
    assert untrained.steps(config) is None
    untrained.train(config)
    assert untrained.progress[0][:2] == (7 * BATCH_TOKENS, STEPS * BATCH_TOKENS)
    assert untrained.states() == []
    assert untrained.steps(config) == [1, 3, 7, 20]
    assert_same(prepared, untrained)


def test_two_processes_train_as_one(
    prepared: Training, untrained: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile.lay_out(tmp_path / "project"))
    config = untrained.config(processes=2, micro_batch_tokens=96)
    untrained.train(config)
    assert_close(prepared, untrained)
    assert untrained.progress[-1][:2] == (STEPS * BATCH_TOKENS, STEPS * BATCH_TOKENS)
    assert untrained.steps(config) == [1, 3, 7, 20]


def test_two_processes_share_a_sharded_model_and_go_on_after_a_kill(
    prepared: Training, untrained: Training
) -> None:
    config = untrained.config(processes=2, fsdp=True)
    assert run_program(untrained, config, "--sharded", "--die-at-step", "10", launch=True).returncode != 0
    assert untrained.states() == ["state-00000008"]
    run_program(untrained, config, "--sharded", launch=True)
    assert_close(prepared, untrained)


def assert_close(one: Training, other: Training) -> None:
    curves = [made.curve(made.config()) for made in (one, other)]
    for name in curves[0]:
        np.testing.assert_allclose(curves[1][name], curves[0][name], rtol=1e-4, err_msg=name)
    # Not the very same sums: several processes were at work.
    assert curves[0]["loss"] != curves[1]["loss"]
    weights = [made.weights(made.config()) for made in (one, other)]
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-2, atol=1e-3)
