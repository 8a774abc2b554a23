"""Great Expectations as judge: one batch and one checkpoint a stage, Data Docs in the run's folder.

DuckDB has counted the rows that offend; the batch has one row and one column an expectation, holding that
count, which must be 0. So Great Expectations costs half a second a stage (after its import, 4 s), whatever the
size of the tables. The project is a temporary folder: it gets what Data Docs' index needs to show the other
stages, and what it makes is put into the storage, wherever that is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from infra.manifest import MANIFEST, Manifest, commit, forget, manifests_of
from infra.storage import Storage, StoredFile
from schemas.errors import DamagedError
from schemas.expectation import Expectation

DATA_DOCS = "data_docs"
RESULTS_FOLDER = "validation/results"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one expectation.

    Attributes:
        expectation: What was asked.
        count: Rows that offend.
        rows: Some of them, column name to value.
    """

    expectation: Expectation
    count: int
    rows: tuple[dict[str, Any], ...] = ()


def rows_text(rows: Sequence[dict[str, Any]]) -> str:
    """Offending rows for people: `{doc: 3, position: 7}; …`."""
    return "; ".join("{" + ", ".join(f"{key}: {value}" for key, value in row.items()) + "}" for row in rows)


def judge(storage: Storage, stage: str, findings: Sequence[Finding]) -> dict[str, bool]:
    """Validate a stage's findings and show them in Data Docs.

    Returns:
        Expectation name to whether it is met, as Great Expectations judged.

    Raises:
        StorageError: if Data Docs cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="functok-expectations-") as folder:
        site, results = Path(folder) / "site", Path(folder) / "gx" / "uncommitted" / "validations"
        forget(storage, DATA_DOCS)
        there, known = storage.sizes(DATA_DOCS), _hashes(storage, DATA_DOCS)
        _fetch(storage, DATA_DOCS, site, [name for name in there if "/validations/" in name], but=stage)
        _fetch(storage, RESULTS_FOLDER, results, list(storage.sizes(RESULTS_FOLDER)), but=stage)
        judged = _run_checkpoint(Path(folder), stage, findings)
        # Fonts, styles and images never change: they are put there once.
        kept = [
            StoredFile(name=name, size=there[name], sha256=digest)
            for name, digest in known.items()
            if name.startswith(f"{DATA_DOCS}/static/") and name in there
        ]
        if kept:
            shutil.rmtree(site / "static", ignore_errors=True)
        storage.delete(f"{RESULTS_FOLDER}/{stage}")
        storage.delete(f"{DATA_DOCS}/validations/{stage}")
        made = Manifest(stage="validation", inputs={})
        folder_of_results = f"{RESULTS_FOLDER}/{stage}"
        commit(storage, folder_of_results, made, storage.upload(results / stage, folder_of_results))
        commit(storage, DATA_DOCS, made, [*kept, *storage.upload(site, DATA_DOCS)])
    return judged


def _fetch(storage: Storage, prefix: str, folder: Path, names: list[str], but: str) -> None:
    kept = [name for name in names if f"/{but}/" not in name and not name.endswith(f"/{MANIFEST}")]
    folders = {name[: len(prefix) + 1] + name[len(prefix) + 1 :].split("/", 1)[0] for name in kept}
    hashes = _hashes(storage, prefix, *folders)
    for name, content in storage.read_many(kept).items():
        # What is damaged is shown no longer: the record of the stage's check says what was found.
        if hashes.get(name) not in {None, hashlib.sha256(content).hexdigest()}:
            continue
        target = folder / name[len(prefix) + 1 :]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _hashes(storage: Storage, *folders: str) -> dict[str, str]:
    """SHA-256 by name of the files of those folders that have a manifest."""
    found: dict[str, str] = {}
    for folder in folders:
        with suppress(DamagedError):
            manifest = manifests_of(storage, [folder]).get(folder)
            found |= {
                f"{folder}/{name}": digest for name, digest in (manifest.hashes if manifest else {}).items()
            }
    return found


def _run_checkpoint(folder: Path, stage: str, findings: Sequence[Finding]) -> dict[str, bool]:
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import pandas as pd
    from great_expectations.data_context.types.base import ProgressBarsConfig

    _compile_once()
    context = gx.get_context(mode="file", project_root_dir=folder)
    context.enable_analytics(False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    context.update_data_docs_site(
        "local_site",
        {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(folder / "site"),
            },
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "site_section_builders": {"expectations": "None", "profiling": "None"},
        },
    )
    suite = gx.ExpectationSuite(
        name=stage,
        expectations=[
            gx.expectations.ExpectColumnMaxToBeBetween(
                column=_column(finding), max_value=0, description=_description(finding)
            )
            for finding in findings
        ],
    )
    batch = (
        context.data_sources.add_pandas("functok")
        .add_dataframe_asset(stage)
        .add_batch_definition_whole_dataframe("rows that offend")
    )
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=stage, data=batch, suite=context.suites.add(suite))
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=stage,
            validation_definitions=[definition],
            actions=[gx.checkpoint.UpdateDataDocsAction(name="data docs")],
        )
    )
    frame = pd.DataFrame({_column(finding): [finding.count] for finding in findings})
    outcome = checkpoint.run(batch_parameters={"dataframe": frame})
    met = {
        str(result.expectation_config.kwargs["column"]): bool(result.success)
        for validation in outcome.run_results.values()
        for result in validation.results
    }
    return {finding.expectation.name: met[_column(finding)] for finding in findings}


@cache
def _compile_once() -> None:
    """Keep compiled templates: Data Docs make an environment for each page, which compiles the same ones again."""
    from great_expectations.render.view import view
    from jinja2 import BytecodeCache
    from jinja2.bccache import Bucket

    class Compiled(BytecodeCache):
        def __init__(self) -> None:
            self._code: dict[str, bytes] = {}

        def load_bytecode(self, bucket: Bucket) -> None:
            if bucket.key in self._code:
                bucket.bytecode_from_string(self._code[bucket.key])

        def dump_bytecode(self, bucket: Bucket) -> None:
            self._code[bucket.key] = bucket.bytecode_to_string()

    view.Environment = partial(view.Environment, bytecode_cache=Compiled())


def _column(finding: Finding) -> str:
    return f"{finding.expectation.table}: {finding.expectation.name}"


def _description(finding: Finding) -> str:
    # GE reads a $ as the start of a parameter.
    shown = f" Not so: {rows_text(finding.rows)}" if finding.rows else ""
    return (finding.expectation.meaning + shown).replace("$", "＄")
