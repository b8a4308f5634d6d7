"""Numbers as whole multiples of a step for each row, with 8 or 4 bits for each multiple."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SHRINKING = torch.linspace(1, 0.4, 61, dtype=torch.float64)
"""Steps to try, as fractions of the one that reaches the largest number of a row."""


def _largest_code(bits: int) -> int:
    """The largest absolute value of a code: 127 or 7."""
    return int(2 ** (bits - 1)) - 1


def nearest_codes(rows: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The codes (R, D) whose multiples of the steps, which must broadcast, come nearest to rows (R, D)."""
    limit = _largest_code(bits)
    return (rows / steps).round().clamp(-limit, limit)


def choose_steps(rows: Tensor, bits: int) -> Tensor:
    """The step of each row (R,) with the least squared error of plain rounding, in bfloat16; 1 for a row of zeros."""
    largest = rows.abs().amax(1)
    best, steps = torch.full_like(largest, torch.inf), torch.ones_like(largest).bfloat16()
    for fraction in _SHRINKING:
        tried = (fraction * largest / _largest_code(bits)).bfloat16()
        wide = tried.double()[:, None]
        errors = (rows - nearest_codes(rows, wide, bits) * wide).square().sum(1)
        better = (errors < best) & (tried > 0)
        best, steps = torch.where(better, errors, best), torch.where(better, tried, steps)
    return steps


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of `pack_codes`."""
    return -(-width * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, D) in int8 as bytes (R, `packed_width`); of 4 bits, the first of two is in the lower half."""
    if bits == 8:
        return codes.view(torch.uint8)
    nibbles = F.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8) & 0x0F
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_codes(packed: Tensor, width: int, bits: int) -> Tensor:
    """The codes (R, D) that `pack_codes` packed, in single precision, by arithmetic that every runtime has."""
    wide = packed.float()
    if bits == 8:
        return wide - 256 * (wide > 127).float()
    high = (wide / 16).floor()
    nibbles = torch.stack([wide - 16 * high, high], 2).flatten(1)[:, :width]
    return nibbles - 16 * (nibbles > 7).float()
