"""How many requests S3 is asked a shard: of a first run, of one with nothing to do, and when one file joins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from plain import run_plain
from s3 import BUCKET, Server
from s3_proxy import Faults, Proxy

from infra.duck import connect
from infra.index import index_name
from infra.storage import Storage
from schemas.config import Config
from schemas.work import StagePlan
from tasks.stages import is_up_to_date, plan_run, stages_of

pytestmark = pytest.mark.s3

FEW, MANY = 4, 16
"""Files of a corpus, each of one shard."""


@pytest.fixture(scope="module")
def proxy(s3_proxy: Proxy, moto_server: Server) -> Iterator[Proxy]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto_server.environment().items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL")
        s3fs.S3FileSystem.clear_instance_cache()
        yield s3_proxy
    s3fs.S3FileSystem.clear_instance_cache()


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Requests by kind, of each number of files and of what was asked."""

    counts: dict[int, dict[str, Counter[str]]]
    configs: dict[int, Config]

    def a_shard(self, what: str) -> dict[str, float]:
        """By how many requests of each kind one more shard raises the number."""
        few, many = self.counts[FEW][what], self.counts[MANY][what]
        return {kind: (many[kind] - few[kind]) / (MANY - FEW) for kind in sorted(few | many)}


def config_of(folder: Path, endpoint: str, n_files: int) -> Config:
    """A configuration of one layer, whose corpus has `n_files` files of one shard each."""
    corpus = folder / f"corpus-{n_files}"
    for place in range(n_files):
        write_file(corpus, place)
    return Config.model_validate(
        {
            "corpus": {"urls": [f"{corpus}/*.jsonl"]},
            "model": {"name": str(folder / "model")},
            "sae": [{"layer": 1, "path": str(folder / "sae")}],
            "windows": {"context_size": 32},
            "graph": {"rarefaction_m": 5},
            "storage": {"root": f"s3://{BUCKET}/requests-{n_files}", "endpoint_url": endpoint},
        }
    )


def write_file(corpus: Path, place: int) -> None:
    tiny.write_jsonl(corpus / f"{place:03d}.jsonl", tiny.texts(4, seed=place, longest=30))


def opened(config: Config) -> Storage:
    return Storage(config.storage.root, config.storage.endpoint_url)


def plans_of(config: Config, **options: bool) -> list[StagePlan]:
    return plan_run(config, opened(config), **options)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> Counted:
    folder = tmp_path_factory.mktemp("requests")
    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae")
    found = Counted(counts={}, configs={})
    for n_files in (FEW, MANY):
        config = found.configs[n_files] = config_of(folder, proxy.endpoint, n_files)
        proxy.clear()
        run_plain(config)
        first = proxy.kinds()
        proxy.clear()
        plans = plans_of(config)
        assert is_up_to_date(plans, stages_of(config)), plans
        found.counts[n_files] = {"first run": first, "nothing to do": proxy.kinds()}
    return found


def test_a_first_run_asks_at_most_15_times_a_shard(counted: Counted) -> None:
    slope = counted.a_shard("first run")
    assert sum(slope.values()) <= 15, slope


def test_a_run_with_nothing_to_do_and_status_ask_next_to_nothing_a_shard(counted: Counted) -> None:
    slope = counted.a_shard("nothing to do")
    assert sum(slope.values()) <= 0.05, slope


@pytest.mark.parametrize("lost", [None, b"", b"no gzip", "cut"])
def test_an_index_that_is_lost_or_damaged_costs_requests_alone(
    counted: Counted, proxy: Proxy, lost: bytes | str | None
) -> None:
    config = counted.configs[MANY]
    storage = opened(config)
    for top in ("tokens", "features"):
        if lost is None:
            storage.delete(index_name(top))
        else:
            whole = storage.read_bytes(index_name(top))
            storage.write_bytes(index_name(top), whole[:-20] if isinstance(lost, str) else lost)
    usual = counted.counts[MANY]["nothing to do"].total()
    for more in (2 * MANY, 0):
        proxy.clear()
        assert is_up_to_date(plans_of(config), stages_of(config))
        # Two indexes are written, and their folders listed again.
        assert more <= proxy.kinds().total() - usual <= more + 4, proxy.kinds()


def test_every_manifest_is_read_where_that_is_asked_for(counted: Counted, proxy: Proxy) -> None:
    proxy.clear()
    assert is_up_to_date(plans_of(counted.configs[MANY], verify=True), stages_of(counted.configs[MANY]))
    read = [request for request in proxy.requests if request.startswith("GET") and "manifest" in request]
    assert len(read) >= 2 * MANY


def test_a_shard_that_is_gone_is_missed_though_the_index_has_it(counted: Counted) -> None:
    config = counted.configs[FEW]
    storage = opened(config)
    [name, *_] = [name for name in storage.sizes("features") if name.endswith("edges.parquet")]
    content = storage.read_bytes(name)
    for damage in (lambda: storage.delete(name), lambda: storage.write_bytes(name, content[:-1])):
        damage()
        assert [plan.missing for plan in plans_of(config) if plan.stage == "features"] == [1]
    storage.write_bytes(name, content)
    assert is_up_to_date(plans_of(config), stages_of(config))


def test_what_is_found_is_proportional_to_the_files_that_join(counted: Counted, proxy: Proxy) -> None:
    config = counted.configs[MANY]
    write_file(Path(config.corpus.urls[0]).parent, MANY)
    proxy.clear()
    [tokenize, *_] = plans_of(config)
    assert (tokenize.done, tokenize.missing) == (MANY, 1)
    assert proxy.kinds().total() <= counted.counts[MANY]["nothing to do"].total(), proxy.kinds()
    proxy.clear()
    run_plain(config)
    root = f"requests-{MANY}"
    shards = [
        request
        for request in proxy.requests
        if f" {root}/tokens/" in request or f" {root}/features/" in request
    ]
    assert Counter(request.split(" ")[0] for request in shards)["PUT"] == 7
    # Tables are of all shards. What finds, encodes and checks the shards reads of the new one alone.
    read = {request for request in shards if request.startswith("GET") and request.endswith("manifest.json")}
    assert len(read) <= 2, read


def test_faults_of_the_server_change_no_table(counted: Counted, proxy: Proxy) -> None:
    config = counted.configs[FEW]
    elsewhere = config.model_copy(
        update={"storage": config.storage.model_copy(update={"root": f"{config.storage.root}-faults"})}
    )
    proxy.clear()
    proxy.faults = Faults(slow=0.05, cut=0.02, cut_body=0.03)
    try:
        run_plain(elsewhere)
    finally:
        proxy.faults = Faults()
    assert set(proxy.injected) == {"slow", "cut", "cut_body"}
    with connect(opened(config)) as ours, connect(opened(elsewhere)) as theirs:
        for table in ("tokens", "occurrences", "activations", "edges", "token_degree", "coverage", "rejects"):
            query = f"SELECT * FROM {table} ORDER BY ALL"
            assert ours.execute(query).fetchall() == theirs.execute(query).fetchall(), table
