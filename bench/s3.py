"""Requests to S3 a shard, by kind, and what they would be of 100,000 shards.

A tiny model and dictionary over corpora of `--few` and `--many` files of one shard each, on a moto server of this
machine, behind a proxy that counts (`tests/s3_proxy.py`): tokenization, features of one layer, tables, all checks and
the report, then the question what there is to do. What one more shard adds is counted, not timed, so other load
changes nothing. A shard here is smaller than what is read in one request (`infra.remote_reading.WHOLE`); larger files
take a request more for each range that is read of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench.common import emit, figure, parser, say, spread

HERE = Path(__file__).resolve().parents[1]
SHARDS = 100_000
SECONDS = 0.03
"""What a request takes on a usual S3, and 16 are under way at once."""

AT_ONCE = 16


def count(folder: Path, endpoint: str, proxy: Any, n_files: int) -> dict[str, Counter[str]]:
    """Requests by kind of a first run and of the question what there is to do."""
    from plain import run_plain
    from test_requests import config_of

    from infra.storage import Storage
    from tasks.stages import plan_run

    config = config_of(folder, endpoint, n_files)
    counts: dict[str, Counter[str]] = {}
    for what, run in (
        ("first run", lambda: run_plain(config)),
        ("nothing to do", lambda: plan_run(config, Storage(config.storage.root, endpoint))),
    ):
        say(f"{n_files} shards: {what}")
        proxy.clear()
        run()
        counts[what] = proxy.kinds()
    return counts


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Count at both sizes; everything is written under `folder`, or to the server."""
    sys.path[:0] = [str(HERE / "tests"), str(HERE / "tests" / "infra")]
    import tiny
    from s3 import running_moto
    from s3_proxy import running_proxy

    tiny.save_model(folder / "model")
    tiny.save_sae(folder / "sae")
    with running_moto(folder / "moto.log") as server, running_proxy(server.endpoint) as proxy:
        os.environ.update(server.environment())
        del os.environ["AWS_ENDPOINT_URL"]
        few, many = (count(folder, proxy.endpoint, proxy, size) for size in (arguments.few, arguments.many))
    more = arguments.many - arguments.few
    a_shard = {
        what: {kind: (many[what][kind] - few[what][kind]) / more for kind in sorted(few[what] | many[what])}
        for what in few
    }
    totals = {what: sum(kinds.values()) for what, kinds in a_shard.items()}
    fixed = {what: few[what].total() - arguments.few * totals[what] for what in few}
    return {
        "figures": [
            figure("S3: requests a shard, first run of one layer", spread([totals["first run"]]), "≤", 15),
            figure("S3: requests a shard, nothing to do", spread([totals["nothing to do"]]), "≤", 0.05),
        ],
        "requests": {f"{arguments.few} shards": few, f"{arguments.many} shards": many, "a shard": a_shard},
        "of_100_000_shards": {
            what: {
                # Listings come by a thousand names, which so few shards do not show: seven files a shard.
                "requests": round(fixed[what] + SHARDS * (totals[what] + 7 / 1000)),
                "hours_if_16_at_once_take_30_ms": round(
                    (fixed[what] + SHARDS * (totals[what] + 7 / 1000)) * SECONDS / AT_ONCE / 3600, 2
                ),
            }
            for what in totals
        },
        "limits": "counted on small shards; files above 4 MiB take a request more for each range that is read of them",
    }


def main() -> None:
    """Command line."""
    arguments = parser("s3", __doc__)
    arguments.add_argument("--few", type=int, default=8, help="shards of the smaller corpus")
    arguments.add_argument("--many", type=int, default=64, help="shards of the larger corpus")
    with tempfile.TemporaryDirectory(prefix="functok-bench-") as folder:
        emit("s3", measure(arguments.parse_args(), Path(folder)))


if __name__ == "__main__":
    main()
