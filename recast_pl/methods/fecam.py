"""FeCAM: a covariance for each class (Goswami et al., NeurIPS 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.errors import RunError
from recast_pl.methods.joint_classifier import JointClassifier, Scores, class_sums


class FeCAM(JointClassifier):
    """An image belongs to the class with the least Mahalanobis distance, each by its own covariance.

    Goswami, Liu, Twardowski and van de Weijer, "FeCAM: Exploiting the Heterogeneity of Class Distributions in
    Exemplar-Free Continual Learning", NeurIPS 2023: features of length 1, Σ_c + γ·mean(diag Σ_c)·I,
    divided by its standard deviations so that its diagonal is 1, and argmin (x − μ_c)ᵀ·N(Σ_c)⁻¹·(x − μ_c).

    As in the authors' code for vision transformers, the mean of the other entries is not added to them, and features
    are not raised to a power; both are meant for features that are never negative. A class of one image has the
    identity for its covariance. The sums take 8·D² bytes a class: 1.2 MB for 384 features.

    Args:
        shrinkage: γ, above 0.

    Raises:
        RunError: If the shrinkage is not above 0.
    """

    unit = 2.0**-40  # features have length 1

    def __init__(self, shrinkage: float = 1.0) -> None:
        if not shrinkage > 0:
            raise RunError(f"FeCAM: shrinkage={shrinkage} must be above 0; the paper has 1")
        super().__init__(shrinkage)
        self.shrinkage = shrinkage

    def _measure(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = F.normalize(x)
        squares = [own.T @ own for own in (x[labels == label] for label in range(int(labels.max()) + 1))]
        return {"sums": class_sums(x, labels), "squares": torch.stack(squares)}

    def _solve(self) -> Scores:
        means = self.means
        inverses = torch.stack([self._inverse(label) for label in range(len(means))])  # (K, D, D)

        def scores(x: Tensor) -> Tensor:
            apart: list[Tensor] = [F.normalize(x) - mean for mean in means]
            squared = [((own @ inverse) * own).sum(1) for own, inverse in zip(apart, inverses, strict=True)]
            return -torch.stack(squared, 1)

        return scores

    def _inverse(self, label: int) -> Tensor:
        """The inverse of a class's shrunk correlation matrix (D, D)."""
        count, mean = self.sums["counts"][label], self.means[label]
        covariance = (self.sums["squares"][label] - count * torch.outer(mean, mean)) / (count - 1).clamp_min(1)
        variance = covariance.diagonal().mean()
        if count < 2 or not variance > 0:
            return torch.eye(len(mean), dtype=mean.dtype)
        covariance.diagonal().add_(self.shrinkage * variance)
        deviations = covariance.diagonal().sqrt()
        inverse: Tensor = torch.linalg.inv(covariance / torch.outer(deviations, deviations))
        return inverse
