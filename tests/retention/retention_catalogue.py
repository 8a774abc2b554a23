"""Made-up tables of retention, for tests of the report: what each policy costs is put in, sequences differ by noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from schemas.retention.tables import TABLES

Row = dict[str, Any]

POLICIES = ("window", "streaming", "random", "h2o", "snapkv", "tova", "function", "content", "str", "cmp")
BUDGETS = (0.125, 0.25, 0.5)
LAYERS = range(4)
BUCKETS = ("function→function", "function→content", "content→function", "content→content")
RESAMPLES = 2000


@dataclass(kw_only=True)
class Made:
    """What is put in; every number is that of a budget of a half, and doubles with each halving of it.

    Attributes:
        loss: Nats a token above the full run's.
        mass: What of the attention does not fall on survivors.
        error: At the first layer; each layer adds `carried` times as much.
        carried: What an error grows by from layer to layer.
        similarity: Of kept keys.
        speed: Ratio to the full cache, of any budget.
        bytes_more: What a policy may take beside its budget.
        sequences: How many, of each length.
        noise: Standard deviation of a sequence's own share of everything, relative; the same for all policies.
        own_noise: The same, of a policy's own.
        exact: Whether the full cache solves the tasks of retrieval.
        without: Tables that are not published.
    """

    loss: dict[str, float] = field(default_factory=lambda: {**dict.fromkeys(POLICIES, 0.04), "window": 1.0})
    mass: dict[str, float] = field(default_factory=lambda: dict.fromkeys(POLICIES, 0.1))
    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(POLICIES, 0.05))
    carried: dict[str, float] = field(default_factory=lambda: dict.fromkeys(POLICIES, 1.5))
    similarity: dict[str, float] = field(default_factory=lambda: dict.fromkeys(POLICIES, 0.4))
    speed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(POLICIES, 1.2))
    bytes_more: dict[str, float] = field(default_factory=dict)
    sequences: Mapping[int, int] = field(default_factory=lambda: {2048: 12})
    protocols: Sequence[str] = ("stream",)
    noise: float = 0.3
    own_noise: float = 0.01
    exact: bool = True
    without: Sequence[str] = ()


def connection(made: Made | None = None) -> Any:
    """A DuckDB connection whose tables hold what was put in."""
    made = made or Made()
    found = duckdb.connect()
    for name, rows in tables(made).items():
        if name not in made.without:
            table = pa.Table.from_pylist(rows, schema=TABLES[name])
            found.register("given", table)
            found.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
            found.unregister("given")
    found.execute(
        "CREATE TABLE run_info AS SELECT 'retention_resamples' AS key, ? AS value", [str(RESAMPLES)]
    )
    return found


def tables(made: Made) -> dict[str, list[Row]]:
    """The rows of all tables."""
    rng = np.random.default_rng(3)
    found: dict[str, list[Row]] = {name: [] for name in TABLES if name != "retention_gates"}
    for length, n in made.sequences.items():
        of_sequence = 1 + made.noise * rng.standard_normal(n)
        for protocol in made.protocols:
            for policy, budget in [
                ("full", 1.0),
                *((name, budget) for name in POLICIES for budget in BUDGETS),
            ]:
                setup = {"policy": policy, "budget": budget, "protocol": protocol, "length": length}
                _add(found, made, setup, of_sequence, rng)
    found["retention_curves"] = _curves(found["retention_survival"])
    _add_speed(found["retention_speed"], made)
    _add_retrieval(found["retention_retrieval"], made)
    return found


def _of(values: Mapping[str, float], setup: Row, otherwise: float = 0.0) -> float:
    return values[setup["policy"]] * 0.5 / setup["budget"] if setup["policy"] in values else otherwise


def _add(found: dict[str, list[Row]], made: Made, setup: Row, of_sequence: Any, rng: Any) -> None:
    n_tokens = setup["length"] - 1
    is_full = setup["policy"] == "full"
    loss, mass, error = (_of(values, setup) for values in (made.loss, made.mass, made.error))
    own = 1 + made.own_noise * rng.standard_normal((len(of_sequence), 4))
    scale = of_sequence[:, None] * own
    carried = made.carried.get(setup["policy"], 1.0)
    layers = np.array([error * carried**layer for layer in LAYERS])
    for sequence in range(len(of_sequence)):
        of = scale[sequence]
        found["retention_readings"].append(
            {
                **setup,
                "sequence": sequence,
                "n": n_tokens,
                "delta_nll_sum": loss * of[0] * n_tokens,
                "kl_sum": 1.1 * loss * of[0] * n_tokens,
                "agreed": int(n_tokens * (1 - min(0.9, loss))),
                "retained_mass": None if is_full else 1 - mass * of[1],
                "log_carried": None if is_full else math.log(carried) * np.mean(LAYERS) * own[sequence, 2],
                "last_error": None if is_full else layers[-1] * of[2],
                "key_similarity": None if is_full else made.similarity[setup["policy"]] * own[sequence, 3],
                "full_key_similarity": 0.5 * own[sequence, 3],
            }
        )
    mean = float(np.mean(scale[:, 0])) * loss
    ends = {"_low": math.exp(0.8 * mean), "": math.exp(mean), "_high": math.exp(1.2 * mean)}
    found["retention"].append(
        {
            **setup,
            "kv_bytes_share": setup["budget"] * (1 + made.bytes_more.get(setup["policy"], 0.0)),
            "kv_bytes_allowed": None
            if is_full
            else round(1e6 * setup["budget"] * (1 + made.bytes_more.get(setup["policy"], 0.0))),
            "n_documents": len(of_sequence),
            "n_tokens": n_tokens * len(of_sequence),
            "perplexity": 20 * math.exp(mean),
            "full_perplexity": 20.0,
            **{f"perplexity_ratio{end}": ratio for end, ratio in ends.items()},
            "kl": 1.1 * mean,
            "top1_agreement": 1 - min(0.9, loss),
        }
    )
    for layer in LAYERS:
        found["retention_layers"].append(
            {
                **setup,
                "layer": layer,
                "n_documents": len(of_sequence),
                "error": float(layers[layer]),
                "error_low": float(layers[layer]) * 0.9,
                "error_high": float(layers[layer]) * 1.1,
                "local_error": error,
                "carried": None if is_full else carried**layer,
                "carried_low": None if is_full else carried**layer * 0.9,
                "carried_high": None if is_full else carried**layer * 1.1,
                "retained_mass": 1 - mass,
                "attention_entropy": 2.0 - mass,
                "full_attention_entropy": 2.0,
                "key_similarity": made.similarity.get(setup["policy"], 0.5),
                "full_key_similarity": 0.5,
                "function_share": {"function": 0.9, "content": 0.1}.get(setup["policy"], 0.4),
            }
        )
        if not is_full:
            _add_survival(found["retention_survival"], setup, layer)
    if not is_full:
        _add_losses(found, setup, loss)


def _add_survival(found: list[Row], setup: Row, layer: int) -> None:
    """Chunks of 256 tokens; of those at risk a share dies each time, less of the kind that a policy prefers."""
    prefers = {"function": {"content": 1.8}, "content": {"function": 1.8}, "str": {"content": 1.4}}
    for tier in ("hot", "warm", "cold") if setup["policy"] == "cmp" else ("hot",):
        for kind in ("function", "content"):
            at_risk = 10_000
            for age in range(0, setup["length"], 256):
                share = (
                    0.2
                    * prefers.get(setup["policy"], {}).get(kind, 1.0)
                    * {"hot": 1, "warm": 0.5, "cold": 0.3}[tier]
                )
                died = int(at_risk * share)
                found.append(
                    {
                        **setup,
                        "layer": layer,
                        "kind": kind,
                        "tier": tier,
                        "age": age,
                        "at_risk": at_risk,
                        "died": died,
                    }
                )
                at_risk -= died


def _curves(lives: Sequence[Row]) -> list[Row]:
    """Layers together: all of them have the same lives."""
    found, left = list[Row](), dict[tuple[Any, ...], float]()
    for row in lives:
        if row["layer"] != LAYERS[0]:
            continue
        curve = tuple(row[name] for name in ("policy", "budget", "protocol", "length", "kind", "tier"))
        survival = left.get(curve, 1.0) * (1 - row["died"] / row["at_risk"])
        left[curve] = survival
        more = {name: len(LAYERS) * row[name] for name in ("at_risk", "died")}
        ends = {"survival": survival, "survival_low": 0.99 * survival, "survival_high": 1.01 * survival}
        found.append({**{name: row[name] for name in row if name != "layer"}, **more, **ends})
    random = {
        tuple(row[name] for name in ("budget", "protocol", "length", "kind", "age")): row["survival"]
        for row in found
        if row["policy"] == "random"
    }
    for row in found:
        of = random[tuple(row[name] for name in ("budget", "protocol", "length", "kind", "age"))]
        for end in ("", "_low", "_high"):
            row[f"ratio_to_random{end}"] = row[f"survival{end}"] / of
    return found


def _add_losses(found: dict[str, list[Row]], setup: Row, loss: float) -> None:
    step = setup["length"] // 4
    ranges = [(None, None), *((first, first + step) for first in range(0, setup["length"], step))]
    for place, bucket in enumerate((None, *BUCKETS)):
        for first, stop in ranges:
            delta = loss * (1 + 0.2 * place) * (1 if first is None else 0.5 + first / setup["length"])
            row = {
                **setup,
                "bucket": bucket,
                "position_from": first,
                "position_to": stop,
                "n": 1000,
                "delta_nll": delta,
                "delta_nll_low": 0.8 * delta,
                "delta_nll_high": 1.2 * delta,
            }
            if bucket is not None or first is not None:  # the margin of both is what `retention` tells
                found["retention_losses" if bucket and first is not None else "retention_margins"].append(row)


def _add_speed(found: list[Row], made: Made) -> None:
    for length in (2048, 8192):
        for policy in ("streaming", "h2o", "str", "cmp"):
            # At 8,192 tokens attention takes most of the time, and eviction pays more.
            ratio = made.speed[policy] * (1.5 if length > 4096 else 1)
            found.append(
                {
                    "policy": policy,
                    "budget": 0.25,
                    "length": length,
                    "turns": 5,
                    "tokens": 80,
                    "tokens_per_second": 20 * ratio,
                    "full_tokens_per_second": 20.0,
                    "speed_ratio": ratio,
                    "speed_ratio_low": ratio - 0.05,
                    "speed_ratio_high": ratio + 0.05,
                    "kv_bytes": length * 1000,
                    "full_kv_bytes": length * 4000,
                    "device": "cpu",
                    "threads": 2,
                    "load": 0.4,
                }
            )


def _add_retrieval(found: list[Row], made: Made) -> None:
    for task in ("passkey", "multi_key"):
        counts = made.exact and task == "passkey"
        full = 1.0 if counts else 0.25
        for policy, budget in [("full", 1.0), *((name, budget) for name in POLICIES for budget in BUDGETS)]:
            for place, depth in enumerate((0.1, 0.5, 0.9)):
                kept = 1.0 if policy == "full" else min(1.0, budget + 0.2 * place)
                found.append(
                    {
                        "policy": policy,
                        "budget": budget,
                        "task": task,
                        "length": 1024,
                        "depth": depth,
                        "n": 8,
                        "full_exact_match": full,
                        "exact_match": full * kept,
                        "answer_logprob": -1.0 - 10 * (1 - kept),
                        "full_answer_logprob": -1.0,
                        "counts": counts,
                    }
                )
