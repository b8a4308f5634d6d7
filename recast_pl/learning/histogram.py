"""Histograms of shares, which say whether two sets of images are alike, in a few numbers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 20
"""Equal bins of [0, 1]."""

_RISK = 1e-3  # the probability that two samples of the same distribution are called different


def histogram(shares: Tensor) -> tuple[int, ...]:
    """How many of some values (N,) in [0, 1] lie in each of the bins."""
    bins = (shares.double() * BINS).long().clamp(0, BINS - 1)
    return tuple(torch.bincount(bins.cpu(), minlength=BINS).tolist())


def certainty(probability: Tensor) -> Tensor:
    """−ln(1 − p)/10, at most 1: a scale that also tells 0.99 from 0.999."""
    return (-torch.log1p(-probability.double()) / 10).clamp(max=1)


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """The largest difference of the cumulative shares of two histograms that are not empty, from 0 to 1.

    It is the statistic of Kolmogorov and Smirnov, of values that are rounded to bins: at most that of the values.
    """
    parts = [torch.tensor(counts, dtype=torch.float64).cumsum(0) for counts in (one, other)]
    first, second = (part / part[-1] for part in parts)
    return float((first - second).abs().max())


def distance_limit(one: int, other: int) -> float:
    """The distance that two samples of one distribution, of these sizes, exceed with a probability of about 0.1 %.

        √(−ln(α/2)/2 · (n + m)/(n·m))

    (Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions", Annals of Mathematical Statistics
    1948). Bins, which make distances smaller, make the probability smaller, too.
    """
    return math.sqrt(-math.log(_RISK / 2) / 2 * (one + other) / (one * other))
