"""Templates of 8 bits per number.

Every row of a template, one output channel, is divided by its largest absolute value. What remains, r in [−1, 1],
becomes a whole number q from −127 to 127:

    q = round(127·sign(r)·|r|^a),   r ≈ sign(q)·(|q| / 127)^(1/a)

With a = 1 the levels are evenly spaced. With a < 1 they are closer together near 0, where most weights are.

Yvinec, Dapogny, Cord and Bailly, "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023, and Yvinec,
Dapogny and Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search", 2023.

Deviations: the exponent is one for each bank and minimises the squared error of its templates, as in PowerQuant, by
bounded scalar minimisation; NUPES trains an exponent for each layer on images. Afterwards the coefficients are solved
again, which is possible only here.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

TemplatePrecision = Literal["full", "int8", "int8_power"]
"""How a file holds templates: in the type of the weights, or in 8 bits with evenly or unevenly spaced levels."""

_LARGEST = 127

_EXPONENTS = (0.3, 1.5)  # bounds of the search

_SAMPLE = 1 << 20  # about so many numbers of a bank choose its exponent


@dataclass(frozen=True)
class QuantizedTemplates:
    """The n templates of a bank in 8 bits per number.

    Args:
        codes: q (n, *shape), int8.
        scales: The largest absolute value of each row (n, rows), in the type of the weights.
        exponent: a, a scalar in float64.
    """

    codes: Tensor
    scales: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, templates: Tensor, precision: TemplatePrecision) -> "QuantizedTemplates":
        """Rounds templates (n, *shape) to `int8` or `int8_power`; a row of zeros stays zero."""
        rows = templates.flatten(2)  # (n, rows, columns)
        scales = rows.abs().amax(2)
        ratios = torch.where(scales[..., None] > 0, rows / scales[..., None], 0)
        exponent = 1.0 if precision == "int8" else _best_exponent(ratios, scales)
        codes = _codes(ratios, exponent).to(torch.int8).view_as(templates)
        return cls(codes, scales, torch.tensor(exponent, dtype=torch.float64))

    def templates(self) -> Tensor:
        """The templates (n, *shape) that the codes stand for, in the type of the scales."""
        levels = _levels(torch.arange(-_LARGEST, _LARGEST + 1, dtype=torch.float64), self.exponent.item())
        ratios = levels.to(self.scales)[self.codes.flatten(2).int() + _LARGEST]  # (n, rows, columns)
        return (ratios * self.scales[..., None]).view(self.codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps, by name."""
        return {"codes": self.codes, "scales": self.scales, "exponent": self.exponent}


def _codes(ratios: Tensor, exponent: float) -> Tensor:
    return (ratios.sign() * ratios.abs() ** exponent * _LARGEST).round()


def _levels(codes: Tensor, exponent: float) -> Tensor:
    return codes.sign() * (codes.abs() / _LARGEST) ** (1 / exponent)


def _best_exponent(ratios: Tensor, scales: Tensor) -> float:
    """The exponent with the least squared error of templates, from ratios (n, rows, columns) and scales (n, rows)."""
    every = max(1, ratios.numel() // _SAMPLE)
    some, weights = ratios[..., ::every].double(), scales.double()[..., None]

    def error(exponent: float) -> float:
        return float(((_levels(_codes(some, exponent), exponent) - some) * weights).square().sum())

    return float(minimize_scalar(error, bounds=_EXPONENTS, method="bounded", options={"xatol": 1e-3}).x)
