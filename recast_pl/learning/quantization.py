"""Rounds the head of a task to 8, 4 or 2 bits per weight, so that its logits change as little as possible.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (algorithm 1); the idea is that of Hassibi and Stork, "Second Order Derivatives for Network
Pruning: Optimal Brain Surgeon", NIPS 1992.

    w ≈ s·q for the weights w of a class less the mean over classes, which softmax does not see; q are whole numbers of
    at most 2^(bits − 1) − 1, with 2 bits -1, 0 and 1, and s is a step
    s minimises ‖w − s·q‖²; q are chosen one after another, and those still to come make up for the error so far:
    δ_later = −(w_j − s·q_j) / U_jj · U_j,later, where UᵀU is the inverse of H, the second moment of features
    b' = b + (w − s·q)ᵀ·mean(features), with b less its mean over classes

Deviations: H is centred, because the bias makes up for the mean; entries are taken in order of decreasing H_jj; and the
damping is ten times the authors', because a task may have fewer images than features. With 2 bits, steps and codes are
then improved in turns until no code changes, which lowers (w − s·q)ᵀ·H·(w − s·q) each time:

    s = wᵀ·H·q / qᵀ·H·q, and each q_j is the code that is best beside the others, one after another
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recast_pl.methods.rounding import choose_steps, nearest_codes

_DAMPING = 0.1  # of the mean of the diagonal, added to the diagonal of H

_TINY = 1e-12  # added besides, for features that never change

_FEW_BITS = 2  # with more, improving codes changes logits by nothing that can be measured

_TURNS = 20  # at most; 13 heads of 384 features took 3 to 8

_CHUNK = 4096  # features that are converted to double precision at a time


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, in double precision."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Computes the moments of features (N, D), N at least 1, on any device."""
        parts = [part.double().cpu() for part in features.split(_CHUNK)]
        mean = torch.stack([part.sum(0) for part in parts]).sum(0) / len(features)
        products = [(part - mean).T @ (part - mean) for part in parts]
        return cls(mean, torch.stack(products).sum(0) / len(features))


@dataclass(frozen=True)
class RoundedHead:
    """A head whose weights are whole multiples of one step for each class.

    Args:
        bits: Of each code: 8, 4 or 2.
        codes: Whole numbers (classes, D), int8, of at most 2^(bits − 1) − 1.
        steps: (classes,), bfloat16: codes make up for a coarse step.
        bias: (classes,), single precision.
    """

    bits: int
    codes: Tensor
    steps: Tensor
    bias: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        """`weight` (classes, D) and `bias` (classes,) in single precision."""
        return {"weight": self.codes.float() * self.steps.float()[:, None], "bias": self.bias}


def round_head(weight: Tensor, bias: Tensor, bits: int, moments: Moments | None) -> RoundedHead:
    """Rounds a head.

    Args:
        weight: (classes, D).
        bias: (classes,).
        bits: Of each weight: 8, 4 or 2.
        moments: Of the features of training images; None to round each weight to the nearest code.
    """
    rows, offsets = weight.double(), bias.double()
    rows, offsets = rows - rows.mean(0), offsets - offsets.mean()
    steps = choose_steps(rows, bits)
    if moments is None:
        codes = nearest_codes(rows, steps.double()[:, None], bits)
    else:
        curvature = _damped(moments.covariance)
        codes = _compensated(rows, steps.double(), bits, curvature)
        if bits <= _FEW_BITS:
            codes, steps = _improved(rows, codes, steps, bits, curvature)
        offsets += (rows - codes * steps.double()[:, None]) @ moments.mean
    return RoundedHead(bits, codes.to(torch.int8), steps, offsets.float())


def _damped(covariance: Tensor) -> Tensor:
    """H (D, D)."""
    extra = _DAMPING * covariance.diagonal().mean() + _TINY
    return covariance + extra * torch.eye(len(covariance), dtype=torch.float64)


def _compensated(rows: Tensor, steps: Tensor, bits: int, curvature: Tensor) -> Tensor:
    """Codes (classes, D) that nearly minimise Σ (w − s·q)ᵀ·H·(w − s·q), for steps (classes,)."""
    order = curvature.diagonal().argsort(descending=True, stable=True)
    upper = torch.linalg.cholesky(curvature[order][:, order].inverse(), upper=True)
    left, codes = rows[:, order].clone(), torch.empty_like(rows)
    for j in range(len(order)):
        column = left[:, j]  # (classes,)
        codes[:, order[j]] = code = nearest_codes(column, steps, bits)
        error = (column - code * steps) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return codes


def _improved(rows: Tensor, codes: Tensor, steps: Tensor, bits: int, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (classes, D) and steps (classes,) in bfloat16, from those given, of which no single one can be better."""
    for _ in range(_TURNS):
        products = codes @ curvature
        best = (rows * products).sum(1) / (codes * products).sum(1)
        steps = torch.where(best > 0, best, steps.double()).bfloat16()  # NaN for a class whose codes are all 0
        wide, before = steps.double(), codes.clone()
        pull = (rows - codes * wide[:, None]) @ curvature  # (classes, D)
        for j, own in enumerate(curvature.diagonal()):
            code = nearest_codes(wide * codes[:, j] + pull[:, j] / own, wide, bits)
            pull -= (wide * (code - codes[:, j]))[:, None] * curvature[j]
            codes[:, j] = code
        if torch.equal(codes, before):
            break
    return codes, steps
