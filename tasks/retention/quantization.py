"""Asymmetric integers in place of floats, 8 or 4 bits each, as KIVI lays them out (Liu et al. 2024, arXiv 2402.02750).

x ≈ zero + scale · code with scale = (max − min) / (2^bits − 1), zero = min, so |error| ≤ scale / 2. Keys have
channels that are large in every token, so a key's channel shares scale and zero with the same channel of the tokens
in its group; values have none, so each token of values has its own. Scales and zeros are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.errors import ConfigError

BITS = (8, 4)


@dataclass(frozen=True)
class Quantized:
    """Numbers as codes.

    Attributes:
        codes: (…, n, d · bits / 8) uint8; two 4-bit codes share a byte.
        scale: float32 that broadcasts to (…, n, d).
        zero: As `scale`.
        bits: 8 or 4.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    def floats(self, dtype: torch.dtype) -> torch.Tensor:
        """(…, n, d) what the codes stand for."""
        return (unpacked(self.codes, self.bits).float() * self.scale + self.zero).to(dtype)


def quantize(numbers: torch.Tensor, bits: int, dim: int) -> Quantized:
    """Quantize with one scale and zero for all that differ in `dim` alone.

    Args:
        numbers: (…, n, d) floats; with 4 bits d is even.
        bits: 8 or 4.
        dim: -1: each token by itself; -2: each channel over all n tokens.

    Raises:
        ConfigError: for another number of bits, or an odd d with 4.
    """
    if bits not in BITS or (bits == 4 and numbers.shape[-1] % 2):
        raise ConfigError(
            f"cannot quantize {numbers.shape[-1]} channels to {bits} bits",
            hint="choose 8, or 4 where a head has an even number of channels",
        )
    numbers = numbers.float()
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    # Where all are equal any scale does: every code is 0.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((numbers - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return Quantized(packed(codes, bits), scale, low, bits)


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(…, d) codes as (…, d · bits / 8) bytes."""
    return codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpacked(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """What `packed` packed."""
    if bits == 8:
        return stored
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
