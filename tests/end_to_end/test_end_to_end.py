"""From a corpus file to every table, against the slow, obvious way; through a kill, a cluster and S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import reference
import tiny
from s3 import S3Root

from infra.duck import connect
from infra.storage import Storage
from schemas.config import Config

pytestmark = pytest.mark.slow
TABLES = {
    *("documents", "rejects", "tokens", "occurrences", "activations", "edges"),
    *("token_degree", "feature_degree", "coverage", "graph_summary"),
}
SAES = {0: "jumprelu", 2: "topk"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_model(folder / architecture, architecture)
    for layer, kind in SAES.items():
        tiny.save_sae(folder / f"sae-{layer}", kind, seed=layer)
    documents = [*tiny.texts(14, longest=80), "a <eos> b <bos> the river", "x"]
    tiny.write_jsonl(folder / "corpus" / "a.jsonl", documents[:9])
    tiny.write_jsonl(folder / "corpus" / "b.jsonl", documents[9:])
    return folder


def values_for(parts: Path, root: Path | str, architecture: str = "llama", **corpus: Any) -> dict[str, Any]:
    return {
        "corpus": {"urls": [f"{parts}/corpus/*.jsonl"], "shard_tokens": 200, **corpus},
        "model": {"name": str(parts / architecture)},
        "windows": {"context_size": 32},
        "sae": [{"layer": layer, "path": str(parts / f"sae-{layer}")} for layer in SAES],
        "activations": {"batch_tokens": 256},
        "graph": {"rarefaction_m": 5},
        "storage": {"root": str(root)},
    }


def config_for(parts: Path, root: Path | str, **arguments: Any) -> Config:
    return Config.model_validate(values_for(parts, root, **arguments))


def contents(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, in one order."""
    connection = connect(storage)
    views = [
        row[0] for row in connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    ]
    found = {view: connection.sql(f"SELECT * FROM {view}").fetchall() for view in sorted(TABLES & set(views))}
    connection.close()
    return {table: sorted(rows, key=repr) for table, rows in found.items()}


def rows_of(storage: Storage, sql: str) -> list[tuple[Any, ...]]:
    connection = connect(storage)
    rows: list[tuple[Any, ...]] = connection.sql(sql).fetchall()
    connection.close()
    return rows


@pytest.mark.usefixtures("great_expectations")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_table_is_what_python_sets_give(parts: Path, tmp_path: Path, architecture: str) -> None:
    from sae_lens import SAE

    storage = plain.run_plain(config_for(parts, tmp_path, architecture=architecture))
    lines = [line for name in "ab" for line in (parts / "corpus" / f"{name}.jsonl").read_text().splitlines()]
    documents = [json.loads(line)["text"] for line in lines]
    ids, special = reference.tokenize(parts / architecture, documents)
    tokens = reference.tokens_table(ids, special, 0.4)

    found_tokens = {
        row[0]: row[1:]
        for row in rows_of(storage, "SELECT token_id, count, doc_count, rank, is_function FROM tokens")
    }
    assert found_tokens == {token: tuple(row.values()) for token, row in tokens.items()}
    n_kept = [sum(token not in special for token in document) for document in ids]
    assert rows_of(storage, "SELECT doc_id, n_chars, n_tokens FROM documents ORDER BY doc_id") == [
        (index, len(text), n) for index, (text, n) in enumerate(zip(documents, n_kept, strict=True))
    ]
    assert rows_of(storage, "SELECT doc_id, position, token_id FROM occurrences ORDER BY ALL") == [
        (d, p, t) for d, document in enumerate(ids) for p, t in enumerate(document) if t not in special
    ]

    saes = {layer: SAE.load_from_disk(str(parts / f"sae-{layer}")) for layer in SAES}
    expected = reference.activations(parts / architecture, saes, ids, special, 32, True)
    activated = {
        row[:5]: row[5]
        for row in rows_of(
            storage, "SELECT layer, doc_id, position, token_id, feature_id, activation FROM activations"
        )
    }
    assert len(set(activated) ^ set(expected)) <= len(expected) / 10_000
    assert all(
        activated[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)
        for key in set(activated) & set(expected)
    )

    # From here on the reference works on the published activations: a flip at the threshold is not an error.
    edges = reference.edges(activated)
    found_edges = {
        row[:3]: row[3:]
        for row in rows_of(
            storage, "SELECT layer, token_id, feature_id, n, max_activation, sum_activation FROM edges"
        )
    }
    assert set(found_edges) == set(edges)
    for edge, (n, largest, total) in edges.items():
        assert found_edges[edge][:2] == (n, pytest.approx(largest, rel=1e-6))
        assert found_edges[edge][2] == pytest.approx(total, rel=1e-6)

    ranked = sorted(tokens, key=lambda token: tokens[token]["rank"])
    for layer in SAES:
        mine = {edge: values[0] for edge, values in edges.items() if edge[0] == layer}
        degree = {
            token: (len(counts), reference.rarefied_degree(counts, tokens[token]["count"], 5))
            for token in ranked
            for counts in [[n for (_, of, _), n in mine.items() if of == token]]
        }
        found_degree = {
            row[0]: row[1:]
            for row in rows_of(
                storage,
                f"SELECT token_id, degree, rarefied_degree, count, m FROM token_degree WHERE layer = {layer}",
            )
        }
        assert set(found_degree) == set(ranked)
        for token, (n, rarefied) in degree.items():
            assert found_degree[token][0] == n
            assert found_degree[token][1] == (None if rarefied is None else pytest.approx(rarefied, rel=1e-9))
            assert found_degree[token][2:] == (tokens[token]["count"], 5)
        found_coverage = rows_of(
            storage,
            f"SELECT token_id, new_features, cumulative_features, coverage, dictionary_coverage FROM coverage "
            f"WHERE layer = {layer} ORDER BY rank",
        )
        expected_coverage = reference.coverage(set(mine), ranked, layer)
        total = expected_coverage[-1][2]
        assert found_coverage == [(*row, row[2] / total, row[2] / 96) for row in expected_coverage]
        features = {feature for _, _, feature in mine}
        summary = rows_of(
            storage,
            f"SELECT dictionary_size, activated_features, n_tokens, n_edges, mean_l0 FROM graph_summary "
            f"WHERE layer = {layer}",
        )
        assert summary == [
            (96, len(features), sum(n_kept), len(mine), pytest.approx(sum(mine.values()) / sum(n_kept)))
        ]
        found_features = rows_of(
            storage,
            f"SELECT feature_id, degree, n, density FROM feature_degree WHERE layer = {layer} ORDER BY 1",
        )
        assert found_features == [
            (
                feature,
                sum(f == feature for _, _, f in mine),
                n := sum(count for (_, _, f), count in mine.items() if f == feature),
                pytest.approx(n / sum(n_kept)),
            )
            for feature in sorted(features)
        ]
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_running_twice_changes_nothing_and_has_nothing_to_do(
    parts: Path, fresh: Path, tmp_path: Path
) -> None:
    from tasks.stages import is_up_to_date, plan_run, stages_of

    config = config_for(parts, tmp_path)
    storage = Storage(str(tmp_path))
    assert not is_up_to_date(plan_run(config, storage), stages_of(config))
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    assert [plan.missing for plan in plan_run(config, storage)] == [0, 0, 0, 0, 0]
    before = {name: Path(storage.full(name)).stat().st_mtime_ns for name in storage.sizes("features")}
    first = contents(storage)
    plain.run_plain(config)
    assert contents(storage) == first
    assert {name: Path(storage.full(name)).stat().st_mtime_ns for name in storage.sizes("features")} == before


def test_a_file_that_joins_gives_the_tables_of_a_fresh_run(parts: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name in "ab":
        tiny.write_jsonl(corpus / f"{name}.jsonl", []).write_bytes(
            (parts / "corpus" / f"{name}.jsonl").read_bytes()
        )
    urls = {"urls": [f"{corpus}/*.jsonl"]}
    storage = plain.run_plain(config_for(parts, tmp_path / "grown", **urls))
    kept = {name: Path(storage.full(name)).stat().st_mtime_ns for name in storage.sizes("features")}
    tiny.write_jsonl(corpus / "aa.jsonl", tiny.texts(6, seed=5))
    plain.run_plain(config_for(parts, tmp_path / "grown", **urls))
    fresh = plain.run_plain(config_for(parts, tmp_path / "fresh", **urls))
    assert contents(storage) == contents(fresh)
    assert {name: Path(storage.full(name)).stat().st_mtime_ns for name in kept} == kept


KILLS = {
    "tokenizers/": 1,
    "tokens/": 9,
    "dictionaries/": 2,
    "features/": 6,
    "tables/": 2,
    "catalog.json": 1,
    "report.html": 1,
}
"""What a run was writing when it was killed: a prefix, and the how manieth file of it."""


@pytest.fixture(scope="module")
def killed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A root for each kill, as the run left it."""
    roots = {prefix: tmp_path_factory.mktemp("killed") for prefix in KILLS}
    kills = []
    for prefix, root in roots.items():
        toml = root.with_suffix(".toml")
        toml.write_text(_as_toml(values_for(parts, root)))
        kills.append([str(toml), prefix, KILLS[prefix]])
    program = [sys.executable, plain.__file__, json.dumps(kills)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(plain.__file__).parent.parent)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(kills), done.stderr[-2000:]
    return roots


@pytest.mark.parametrize("prefix", KILLS)
def test_kill_9_in_a_stage_then_a_run_ends_with_the_same_tables(
    parts: Path, killed: dict[str, Path], fresh_tables: dict[str, Any], prefix: str
) -> None:
    storage = Storage(str(killed[prefix]))
    # What a reader sees after the kill is nothing, or all.
    assert contents(storage) in ({}, fresh_tables)
    plain.run_plain(config_for(parts, killed[prefix]))
    assert contents(storage) == fresh_tables
    assert (killed[prefix] / "report.html").exists()


@pytest.fixture(scope="module")
def fresh(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run, to be left as it is."""
    root = tmp_path_factory.mktemp("fresh")
    plain.run_plain(config_for(parts, root), checked=False)
    return root


@pytest.fixture(scope="module")
def fresh_tables(fresh: Path) -> dict[str, Any]:
    return contents(Storage(str(fresh)))


def _as_toml(values: dict[str, Any]) -> str:
    lines = []
    for name, section in values.items():
        for entry in section if isinstance(section, list) else [section]:
            lines.append(f"[[{name}]]" if isinstance(section, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
    return "\n".join(lines)


@pytest.mark.cluster
def test_workers_of_a_running_scheduler_give_the_same_tables(
    parts: Path, tmp_path: Path, fresh_tables: dict[str, Any]
) -> None:
    from distributed import LocalCluster

    # Each worker imports for seconds. Two files are tokenized side by side, a model serves one shard at a time.
    with LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address=None) as cluster:
        values = {**values_for(parts, tmp_path), "dask": {"scheduler": cluster.scheduler_address}}
        storage = plain.run_plain(Config.model_validate(values), checked=False)
    assert contents(storage) == fresh_tables


@pytest.mark.s3
def test_a_run_on_s3_gives_the_same_tables(
    parts: Path, s3_root: S3Root, fresh_tables: dict[str, Any]
) -> None:
    corpus = Storage(f"{s3_root.url}/corpus files")
    for name in "ab":
        corpus.write_bytes(f"{name}.jsonl", (parts / "corpus" / f"{name}.jsonl").read_bytes())
    values = values_for(parts, f"{s3_root.url}/run")
    values["corpus"]["urls"] = [f"{s3_root.url}/corpus files/*.jsonl"]
    storage = plain.run_plain(Config.model_validate(values))
    found = contents(storage)
    sources = {row[1] for row in found["documents"]}
    assert sources == {f"{s3_root.url}/corpus files/{name}.jsonl" for name in "ab"}
    local = {**fresh_tables, "documents": sorted((r[0], *r[2:]) for r in fresh_tables["documents"])}
    assert {**found, "documents": sorted((r[0], *r[2:]) for r in found["documents"])} == local


def test_sharding_changes_no_table_but_for_flips_at_the_threshold(
    parts: Path, tmp_path: Path, fresh_tables: dict[str, Any]
) -> None:
    whole = contents(plain.run_plain(config_for(parts, tmp_path, shard_tokens=100_000), checked=False))
    for table in ("documents", "rejects", "tokens", "occurrences"):
        assert whole[table] == fresh_tables[table]
    keys = [{row[:5] for row in tables["activations"]} for tables in (whole, fresh_tables)]
    assert len(keys[0] ^ keys[1]) <= len(keys[0]) / 10_000


def test_a_corpus_only_run_publishes_the_corpus_tables(parts: Path, tmp_path: Path) -> None:
    values = values_for(parts, tmp_path, keep_occurrences=False)
    values["sae"] = []
    found = contents(plain.run_plain(Config.model_validate(values)))
    assert set(found) == {"documents", "rejects", "tokens"}
    assert (tmp_path / "report.html").exists()
