"""Scatters XᵀX (D, D) of centred features X, small in a file, whose sums are exact.

A file keeps the features X themselves of fewer than D images, as whole multiples of a power of two in 16 bits, and of
more images the upper triangle of XᵀX in single precision, rounded to whole multiples of 2⁻³⁰. Both stand for scatters
that are whole multiples of 2⁻³⁰. Sums of scatters up to 8 million are then exact in double precision, so that neither
the order of tasks nor one that was added and removed again changes a bit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BITS, _LARGEST = 15, 2**15 - 1  # of the size of a feature, which has a sign, too

_UNIT = 2.0**-30

_LEAST = -15  # exponent of the finest unit of features, whose products are multiples of 2^-30

_CHUNK = 4096  # images whose products are summed at a time


@dataclass(frozen=True, eq=False)
class Scatter:
    """A scatter as its file keeps it.

    Args:
        values: Features (N, D) of images, each less the mean of its class, int16 in units of 2^exponent; or the upper
            triangle of the scatter, row by row, (D·(D + 1)/2,), single precision, which is empty if nothing is known.
        exponent: That of two; 0 for a triangle.
    """

    values: Tensor
    exponent: int = 0

    @classmethod
    def of_features(cls, features: Tensor) -> "Scatter":
        """The scatter of features (N, D) in double precision, each less the mean of its class."""
        if len(features) >= features.shape[1]:
            return cls.of_matrix(sum((part.T @ part for part in features.split(_CHUNK)), start=torch.zeros(())))
        _, size = math.frexp(float(features.abs().max()) if len(features) else 0.0)  # all are below 2^size
        exponent = max(_LEAST, size - _BITS)
        return cls((features / 2.0**exponent).round().clamp(-_LARGEST, _LARGEST).short(), exponent)

    @classmethod
    def of_matrix(cls, matrix: Tensor) -> "Scatter":
        """The scatter with these numbers (D, D), rounded."""
        return cls(((matrix[_upper(len(matrix))] / _UNIT).round() * _UNIT).float())

    @property
    def matrix(self) -> Tensor:
        """The scatter (D, D) in double precision, the same bits on every machine."""
        if self._has_features:
            return self._features.T @ self._features
        width = (math.isqrt(8 * len(self.values) + 1) - 1) // 2
        matrix, upper = torch.zeros(width, width, dtype=torch.float64), _upper(width)
        matrix[upper] = matrix.T[upper] = self.values.double()
        return matrix

    @property
    def _has_features(self) -> bool:
        return self.values.ndim == 2

    @property
    def _features(self) -> Tensor:
        return self.values.double() * 2.0**self.exponent

    def merged(self, other: "Scatter", features: Tensor) -> "Scatter":
        """The sum of two scatters and of that of more features (N, D)."""
        if self._has_features and other._has_features:
            return Scatter.of_features(torch.cat([self._features, other._features, features]))
        return Scatter.of_matrix(self.matrix + other.matrix + features.T @ features)

    def check(self, width: int) -> None:
        """Raises ValueError unless it is the scatter of features of this width, or empty."""
        kind, shape = self.values.dtype, tuple(self.values.shape)
        if self._has_features:
            fits = kind == torch.int16 and len(self.values) < width == shape[1]
        else:
            fits = kind == torch.float32 and shape in ((0,), (width * (width + 1) // 2,))
        if not (fits and type(self.exponent) is int and _LEAST <= self.exponent <= -_LEAST):
            raise ValueError(
                f"a scatter of {kind} {shape} with exponent {self.exponent!r:.80} is not one of {width} features"
            )
        if not self.values.isfinite().all():
            raise ValueError("the scatter has NaN or infinity")


NO_SCATTER = Scatter(torch.zeros(0))
"""That of a task of which no scatter is known."""


def _upper(width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the upper triangle of a matrix."""
    rows, columns = torch.triu_indices(width, width)
    return rows, columns
