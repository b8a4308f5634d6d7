"""Numbers as whole multiples of a step for each row, with 8, 4, 2 or 1 bits for each multiple.

With 2 bits a code is -1, 0 or 1, so that a byte has room for five of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SHRINKING = torch.linspace(1, 0.4, 61, dtype=torch.float64)
"""Steps to try, as fractions of the one that reaches the largest number of a row."""

_VALUES = {8: 256, 4: 16, 2: 3, 1: 2}
"""How many values the file tells apart for a code of so many bits."""

_CODES_PER_BYTE = {8: 1, 4: 2, 2: 5, 1: 8}


def _largest_code(bits: int) -> int:
    """The largest absolute value of a code: 127, 7, and 1 with 2 bits or 1."""
    return max(int(2 ** (bits - 1)) - 1, 1)


def nearest_codes(rows: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The codes (R, D) whose multiples of the steps, which must broadcast, come nearest to rows (R, D).

    Of 1 bit they are 1 and -1, so nothing but 0 times a step of 0 is 0.
    """
    if bits == 1:
        return torch.where(rows < 0, -1, 1).to(rows)
    limit = _largest_code(bits)
    return (rows / steps).round().clamp(-limit, limit)


def choose_steps(rows: Tensor, bits: int) -> Tensor:
    """The step of each row (R,) with the least squared error of plain rounding, in bfloat16.

    Of a row of zeros it is 1, and with 1 bit 0.
    """
    if bits == 1:
        return rows.abs().mean(1).bfloat16()
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
    return -(-width // _CODES_PER_BYTE[bits])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (R, D) in int8 as bytes (R, `packed_width`): numbers of base 256, 16, 3 or 2, the first digit the lowest.

    A negative code is a digit less the base; with 1 bit, 1 is the digit 1, and -1 the digit 0.
    """
    base, count = _VALUES[bits], _CODES_PER_BYTE[bits]
    digits = (codes > 0 if bits == 1 else codes.short() % base).to(torch.uint8)
    of_byte = F.pad(digits, (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    powers = (base ** torch.arange(count, device=codes.device)).to(torch.uint8)
    packed: Tensor = (of_byte * powers).sum(-1, dtype=torch.uint8)
    return packed


def unpack_codes(packed: Tensor, width: int, bits: int) -> Tensor:
    """The codes (R, D) that `pack_codes` packed, in single precision, by arithmetic that every runtime has."""
    base, count = _VALUES[bits], _CODES_PER_BYTE[bits]
    shifted = (packed.float()[:, :, None] / base ** torch.arange(count + 1, device=packed.device)).floor()
    digits: Tensor = (shifted[:, :, :-1] - base * shifted[:, :, 1:]).flatten(1)[:, :width]
    return 2 * digits - 1 if bits == 1 else digits - base * (digits >= base / 2).float()
