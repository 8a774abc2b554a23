"""Encoding residuals with dictionaries of 4,096 to 131,072 latents against the dense float32 product.

All sides see the same residuals, weights and thresholds, in float32, with the same threads:

- `addmm`: the product alone, whose result is dropped.
- `addmm_nonzero`: the product, the comparison, and where it holds.
- `dense`: the same and the values there: how `Encoder` worked before latents were screened.
- `float32`, `bfloat16`: `Encoder` by either screen, whatever this machine would choose.
- `limit`: the bfloat16 product of the same shape alone, in the same blocks: what screening cannot be faster than.

Residuals are Gaussian around a mean as large as they are, uneven from direction to direction. Latents are random
directions whose thresholds make each as often active as the others: more of their values lie near the threshold than a
trained dictionary's do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import torch

from bench.common import Side, alternate, emit, figure, parser, ratio, say, spread
from infra.allocator import freed_memory_kept
from tasks.dictionaries import screening
from tasks.dictionaries.encoding import Encoder, Way
from tasks.dictionaries.screening import has_bfloat16_units

_CPU = torch.device("cpu")
_ENTRIES = 1 << 25
"""Pre-activations that a side makes before its clock stops, so that small dictionaries are measured as well."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare at each size in turn."""
    figures, sizes = [], {}
    for d_sae in arguments.d_sae:
        say(f"{d_sae:,} latents")
        found = _at(d_sae, arguments)
        sizes[d_sae] = found["report"]
        seconds = found["seconds"]
        is_small = d_sae <= 4096
        figures += [
            figure(
                f"encoding, {d_sae:,} latents: speed over the bare float32 addmm",
                ratio(seconds["addmm"], seconds[found["way"]]),
                *(() if is_small else ("≥", 1.7)),
            ),
            figure(
                f"encoding, {d_sae:,} latents: speed over addmm, comparison, nonzero and values, as before",
                ratio(seconds["dense"], seconds[found["way"]]),
                *(("≥", 1) if is_small else ()),
            ),
            figure(
                f"encoding, {d_sae:,} latents: share of the speed of the bfloat16 product alone",
                ratio(seconds["limit"], seconds[found["way"]]),
            ),
        ]
        if is_small:
            figures.append(
                figure(
                    f"encoding without bfloat16, {d_sae:,} latents: speed over the way before",
                    ratio(seconds["dense"], seconds["float32"]),
                    "≥",
                    1,
                )
            )
    return {
        "figures": figures,
        "sizes": sizes,
        "input": {
            "rows": arguments.rows,
            "width": arguments.width,
            "l0": arguments.l0,
            "threads": torch.get_num_threads(),
            "clock": "CPU seconds" if torch.get_num_threads() == 1 else "seconds",
            "has_bfloat16_units": has_bfloat16_units(_CPU),
        },
        "limits": "the rate of the bfloat16 units: the side `limit`, of which the last figure of a size is the share",
    }


@torch.inference_mode()
def _at(d_sae: int, arguments: argparse.Namespace) -> dict[str, Any]:
    x, sae = _residuals_and_dictionary(d_sae, arguments)
    weight, bias = sae.W_enc.detach().clone(), sae.b_enc - sae.b_dec @ sae.W_enc
    threshold = sae.threshold.detach()
    encoders = {way: Encoder(sae, _CPU, way) for way in ("float32", "bfloat16")}
    chosen: Way = Encoder(sae, _CPU).way

    def dense() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values = torch.addmm(bias, x, weight)
        row, feature = torch.nonzero(values > threshold, as_tuple=True)
        return row, feature, values[row, feature]

    expected = dense()
    theirs = set((expected[0] * d_sae + expected[1]).tolist())
    for way, encoder in encoders.items():
        sparse = encoder(x)
        differing = len(theirs ^ set((sparse.row * d_sae + sparse.feature).tolist()))
        # A dense product's own rounding moves a few over their threshold.
        if differing > 1e-3 * len(theirs):
            raise SystemExit(
                f"{way}: {differing} of {len(theirs)} active entries are not the dense product's"
            )
    repeats = max(1, _ENTRIES // (len(x) * d_sae))
    sides: dict[str, Callable[[], object]] = {
        "addmm": lambda: torch.addmm(bias, x, weight),
        "addmm_nonzero": lambda: torch.nonzero(torch.addmm(bias, x, weight) > threshold, as_tuple=True),
        "dense": dense,
        **{way: partial(encoder, x) for way, encoder in encoders.items()},
        "limit": _limit(x, d_sae),
    }
    for side in sides.values():
        side()

    def repeated(run: Callable[[], object]) -> Callable[[], None]:
        def all_of_them() -> None:
            for _ in range(repeats):
                run()

        return all_of_them

    cpu: dict[str, list[float]] = {}
    # As in a stage: else the kernel clears all pages of a dense product each time, as long as the product takes.
    with freed_memory_kept():
        seconds = alternate(
            [Side(name=name, run=repeated(run)) for name, run in sides.items()], arguments.rounds, cpu
        )
    # With one thread the CPU's seconds are compared: they are nearly the same on a machine that does other work, too.
    clock = cpu if torch.get_num_threads() == 1 else seconds
    per_call = {name: [one / repeats for one in values] for name, values in clock.items()}
    inner: Any = encoders["bfloat16"]._encode
    return {
        "way": chosen,
        "seconds": per_call,
        "report": {
            "way": chosen,
            "seconds": {name: spread(values) for name, values in per_call.items()},
            "active_a_token": round(len(expected[0]) / len(x), 2),
            "candidates_a_token": {
                way: round(len(encoder._encode._candidates(x)[0]) / len(x), 2)  # type: ignore[union-attr]
                for way, encoder in encoders.items()
            },
            "gflop_per_second_of_limit": round(
                2
                * len(x)
                * d_sae
                * inner._screen._packed.shape[1]
                / spread(per_call["limit"])["median"]
                / 1e9
            ),
        },
    }


def _residuals_and_dictionary(d_sae: int, arguments: argparse.Namespace) -> tuple[torch.Tensor, Any]:
    from sae_lens import SAE

    generator = torch.Generator().manual_seed(0)
    width = arguments.width
    spreads = torch.logspace(0.5, -0.5, width)
    mean = torch.randn(width, generator=generator) * spreads.square().mean().sqrt()
    x = mean + torch.randn(arguments.rows, width, generator=generator) * spreads
    sae: Any = SAE.from_dict(
        {
            "architecture": "jumprelu",
            "d_in": width,
            "d_sae": d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "metadata": {},
        }
    )
    directions = torch.randn(width, d_sae, generator=generator)
    directions /= directions.norm(dim=0)
    sae.b_dec.copy_(mean)
    sae.b_enc.zero_()
    sae.W_enc.copy_(directions)
    rare = NormalDist().inv_cdf(1 - arguments.l0 / d_sae)
    sae.threshold.copy_(rare * (directions * spreads[:, None]).norm(dim=0))
    return x, sae


def _limit(x: torch.Tensor, d_sae: int) -> Callable[[], None]:
    """The bfloat16 product of the screen's own blocks, of ordinary numbers."""
    latents, rows = screening._CPU_BLOCK
    weight = torch.ones((d_sae, x.shape[1]), dtype=torch.bfloat16)
    inputs = [some.T for some in torch.split(x.to(torch.bfloat16), rows)]
    outs = [torch.empty((latents, some.shape[1]), dtype=torch.bfloat16) for some in inputs]

    def product() -> None:
        for some, out in zip(inputs, outs, strict=True):
            for block in torch.split(weight, latents):
                torch.mm(block, some, out=out[: len(block)])

    return product


def main() -> None:
    """Command line."""
    arguments = parser("encoding", __doc__)
    arguments.set_defaults(rounds=9)
    arguments.add_argument(
        "--d-sae", type=int, nargs="+", default=[4096, 65_536, 131_072], help="latents of the dictionaries"
    )
    arguments.add_argument("--rows", type=int, default=512, help="residuals")
    arguments.add_argument("--width", type=int, default=576, help="of a residual")
    arguments.add_argument("--l0", type=float, default=60, help="active latents a token")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all sides")
    parsed = arguments.parse_args()
    torch.set_num_threads(parsed.threads)
    emit("encoding", measure(parsed))


if __name__ == "__main__":
    main()
