"""Life tables: how many tokens were there to leave at each age, and how many left (Kaplan & Meier 1958).

A token's age is how many tokens were read since the chunk that it came with, when a chunk's eviction is done: 0, chunk,
2 · chunk, …; so every eviction asks each token that is there once, and ages are exact. Tokens that are there at the end
of the sequence are censored. Heads are lives of their own. Sinks and special tokens are left out. Counts add up over
documents: S(a) = Π over ages b ≤ a of (1 − left(b) / at_risk(b)) is made where tables are made.

Tiers are nested: `hot` says that a token is exact, `warm` that it has a slot of its own, `cold` that its value lives on
in another's. A policy without tiers has `hot` alone: its tokens are exact or gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from schemas.tables import SHARD_FILES
from tasks.retention.cache import NEVER, Fates

KINDS = ("function", "content")


def life_table(
    fates: Mapping[int, Fates],
    is_function: npt.NDArray[np.bool_],
    counted: npt.NDArray[np.bool_],
    chunk: int,
    *,
    has_tiers: bool,
) -> pa.Table:
    """The counts of one sequence.

    Args:
        fates: Of each governed layer, of one document.
        is_function: (length,) kind of each token.
        counted: (length,) which tokens are lives.
        chunk: Tokens between two evictions.
        has_tiers: Whether tokens are ever anything but exact or gone.

    Returns:
        Rows of the file `reading_survival`.
    """
    length = len(is_function)
    came = np.arange(length) // chunk
    chunks = -(-length // chunk)
    columns: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in ("age", "at_risk", "died")}
    names: dict[str, list[str]] = {"kind": [], "tier": []}
    layers: list[int] = []
    for layer, of in sorted(fates.items()):
        for tier, gone in ends(of, has_tiers=has_tiers).items():
            # The eviction at which it left, or the first that it was not asked at.
            at = -(-gone.numpy().astype(np.int64) // chunk) - 1
            left = gone.numpy() <= length
            for kind in KINDS:
                lives = counted & (is_function == (kind == "function"))
                ages = np.where(left, at - came, 0)[:, lives]
                died = np.bincount(ages[left[:, lives]], minlength=chunks)
                spans = np.broadcast_to(chunks - came, left.shape)[:, lives]
                censored = np.bincount(spans[~left[:, lives]], minlength=chunks + 1)[:chunks]
                n = left[:, lives].size
                at_risk = n - (np.cumsum(died) - died) - np.cumsum(censored)
                there = np.flatnonzero(at_risk)
                columns["age"].append(there * chunk)
                columns["at_risk"].append(at_risk[there])
                columns["died"].append(died[there])
                names["kind"] += [kind] * len(there)
                names["tier"] += [tier] * len(there)
                layers += [layer] * len(there)
    counts: dict[str, Any] = {name: np.concatenate(parts) if parts else [] for name, parts in columns.items()}
    return (
        pa.table({"layer": layers, **names, **counts})
        .select(SHARD_FILES["reading_survival"].names)
        .cast(SHARD_FILES["reading_survival"])
    )


def ends(fates: Fates, *, has_tiers: bool) -> dict[str, torch.Tensor]:
    """Of each tier (heads, length) int64: how many tokens were seen when a token left it, and all better ones."""
    gone = fates.gone_at[0].long().cpu()
    if not has_tiers:
        return {"hot": gone}
    cold_at, into = fates.cold_at[0].cpu(), fates.cold_into[0].long().cpu()
    merged = cold_at < NEVER
    # A merged value lives as long as the one that it is in, which may be merged in its turn.
    cold = gone
    while True:
        longer = torch.where(merged, cold.gather(-1, into.clamp(min=0)), gone)
        if torch.equal(longer, cold):
            break
        cold = longer
    return {"hot": torch.minimum(gone, fates.warm_at[0].long().cpu()), "warm": gone, "cold": cold}
