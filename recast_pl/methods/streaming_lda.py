"""Streaming linear discriminant analysis (Hayes and Kanan, CVPR Workshops 2020)."""

import torch
from torch import Tensor

from recast_pl.errors import RunError
from recast_pl.methods.joint_classifier import JointClassifier, Scores, class_sums, linear


class LDA(JointClassifier):
    """A linear discriminant with class means and one covariance for all classes.

    Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR Workshops
    2020: Λ = ((1 − ε)Σ + εI)⁻¹, w_c = Λμ_c and b_c = −½·μ_cᵀΛμ_c.

    It deviates from the paper in the covariance: the paper adds images one by one, with a step that depends on their
    order. Here Σ is the scatter within classes divided by the number of images, which does not.

    Args:
        shrinkage: ε, above 0 and at most 1.

    Raises:
        RunError: If the shrinkage is out of range.
    """

    shared = frozenset({"squares"})

    def __init__(self, shrinkage: float = 1e-4) -> None:
        if not 0 < shrinkage <= 1:
            raise RunError(f"LDA: shrinkage={shrinkage} must be above 0 and at most 1; the paper has 1e-4")
        super().__init__(shrinkage)
        self.shrinkage = shrinkage

    def _measure(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"sums": class_sums(x, labels), "squares": x.T @ x}

    def _solve(self) -> Scores:
        counts, means = self.sums["counts"], self.means
        covariance = (self.sums["squares"] - (counts[:, None] * means).T @ means) / counts.sum().clamp_min(1)
        shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * torch.eye(len(covariance), dtype=means.dtype)
        weight = torch.linalg.solve(shrunk, means.T).T  # (K, D)
        return linear(weight, -(weight * means).sum(1) / 2)
