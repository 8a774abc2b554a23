"""Random keys that belong to a token, not to a moment: hashed from (seed, document, layer, head, position).

Independent draws at every step kill everything: with probability p of being kept each time, pⁿ is left after n
evictions. A key drawn once turns the same selection into reservoir sampling: the B largest of t uniform keys are a
uniform sample of size B, and with log-weights added to Gumbel keys a weighted one without replacement
(Efraimidis & Spirakis 2006; Vieira 2014 for the Gumbel form). A counter-based hash needs no state and no generator:
the same token has the same key whatever the batch, the chunk, the order or the device.
"""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BITS = 23


def uniform_keys(
    positions: torch.Tensor, *, seed: int, documents: torch.Tensor, layer: int, draw: int = 0
) -> torch.Tensor:
    """A uniform number of each token.

    Args:
        positions: (batch, heads, n) positions in the document.
        seed: Of the run.
        documents: (batch,) int64, which document each row is.
        layer: Decoder block.
        draw: 0 for the key that a token keeps; another number for an independent one.

    Returns:
        (batch, heads, n) float32 in (0, 1), never 0 or 1.
    """
    heads = torch.arange(positions.shape[1], device=positions.device)[None, :, None]
    hashed = torch.full((1, 1, 1), seed, dtype=torch.int64, device=positions.device)
    for part in (documents.to(positions.device)[:, None, None], layer, heads, positions.long(), draw):
        hashed = _mixed(hashed ^ part)
    # 23 bits and a half: the most that float32 holds without rounding up to 1.
    return (_shifted(hashed, 64 - _BITS).float() + 0.5) * 2.0**-_BITS


def gumbel_keys(
    positions: torch.Tensor, *, seed: int, documents: torch.Tensor, layer: int, draw: int = 0
) -> torch.Tensor:
    """A standard Gumbel number of each token, −log(−log u) of its `uniform_keys`; same arguments and shape."""
    uniform = uniform_keys(positions, seed=seed, documents=documents, layer=layer, draw=draw)
    return -torch.log(-torch.log(uniform))


def _mixed(number: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014) on wrapping 64-bit integers."""
    number = number + _GOLDEN
    number = (number ^ _shifted(number, 30)) * _FIRST
    number = (number ^ _shifted(number, 27)) * _SECOND
    return number ^ _shifted(number, 31)


def _shifted(number: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted right without the sign, which PyTorch's `>>` would repeat."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
