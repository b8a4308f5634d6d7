"""RanPAC: ridge regression on random features (McDonnell et al., NeurIPS 2023)."""

import torch
from torch import Tensor

from recast_pl.errors import RunError
from recast_pl.linalg import eigen
from recast_pl.methods.joint_classifier import JointClassifier, Scores, class_sums, linear

_RIDGES = torch.logspace(-8, 8, 17, dtype=torch.float64)

_PART = 5  # every fifth image is held out when the ridge is chosen


class RanPAC(JointClassifier):
    """Ridge regression of one-hot labels on a fixed random projection of the features, with a ReLU.

    McDonnell, Gong, Parvaneh, Abbasnejad and van den Hengel, "RanPAC: Random Projections and Pre-trained Models for
    Continual Learning", NeurIPS 2023: h = ReLU(Wᵀx) with normal W (D, M), G = Σ hhᵀ, C = Σ hyᵀ, and the
    scores hᵀ(G + λI)⁻¹C. λ is one of 10⁻⁸ to 10⁸: the one with the least squared error on a fifth of the images, with
    the solution of the others.

    It deviates from the authors' code, which chooses λ again for each task by that task's images alone: here the
    errors are added up over tasks, so that the order of tasks does not matter. Every fifth image is held out, not the
    last fifth, which would hold whole classes where images come by class. The network is not adapted on the first task.

    Args:
        dimensions: M. G takes 8·M² bytes: 800 MB for the paper's 10,000.
        ridge: λ; None to choose it.
        seed: Seed of the projection.

    Raises:
        RunError: If `dimensions` is below 1, or the ridge not above 0.
    """

    unit = 2.0**-20  # random features are large
    shared = frozenset({"gram", "errors"})

    def __init__(self, dimensions: int = 10_000, ridge: float | None = None, seed: int = 0) -> None:
        if dimensions < 1 or (ridge is not None and not ridge > 0):
            raise RunError(f"RanPAC: dimensions={dimensions} must be at least 1, and ridge={ridge} above 0 or null")
        super().__init__(dimensions, ridge, seed)
        self.dimensions, self.ridge, self.seed = dimensions, ridge, seed
        self._projection = torch.empty(0, dimensions, dtype=torch.float64)

    def _measure(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self._lift(x)
        sums = {"sums": class_sums(h, labels), "gram": h.T @ h}
        return sums if self.ridge is not None else sums | {"errors": ridge_errors(h, labels)}

    def _solve(self) -> Scores:
        gram = self.sums["gram"].clone()
        gram.diagonal().add_(self.ridge or float(_RIDGES[self.sums["errors"].argmin()]))
        weight = torch.linalg.solve(gram, self.sums["sums"].T).T  # (K, M)
        head = linear(weight, weight.new_zeros(len(weight)))
        return lambda x: head(self._lift(x))

    def _lift(self, x: Tensor) -> Tensor:
        """Random features (N, M) of features (N, D)."""
        if not len(self._projection):
            generator = torch.Generator().manual_seed(self.seed)
            self._projection = torch.randn(x.shape[1], self.dimensions, generator=generator).double()
        return (x @ self._projection).relu()


def ridge_errors(h: Tensor, labels: Tensor) -> Tensor:
    """Squared errors (17,) on held-out images by ridge, from random features (N, M) and labels (N,).

    One decomposition serves all ridges: (AᵀA + λI)⁻¹AᵀY = AᵀU(S + λ)⁻¹UᵀY with AAᵀ = USUᵀ.
    """
    held_out = torch.arange(len(h)) % _PART == _PART - 1
    targets = torch.eye(int(labels.max()) + 1, dtype=h.dtype)[labels]
    a, b = h[~held_out], h[held_out]
    if len(a) <= h.shape[1]:
        values, vectors = eigen(a @ a.T)
        left, right = b @ (a.T @ vectors), vectors.T @ targets[~held_out]
    else:
        values, vectors = eigen(a.T @ a)
        left, right = b @ vectors, vectors.T @ (a.T @ targets[~held_out])
    values = values.clamp_min(0)
    found = [left @ (right / (values + ridge)[:, None]) for ridge in _RIDGES]
    return torch.stack([(each - targets[held_out]).square().sum() for each in found])
