"""LoRA-XS: a small trained matrix between the leading singular directions of each weight.

Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024 (arXiv:2405.17604).

    W' = W + U_r·Σ_r·R·V_rᵀ, where U·Σ·Vᵀ is the singular value decomposition of W and R (r, r) is trained

A patch holds only R, as the frozen weight gives the directions. Deviation: R starts from 0 and not from small noise, so
that the first task starts from exactly the pretrained features.
"""

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import CONVOLUTIONS, MLP, Adaptation, CompactPiece


class SingularDirections(Adaptation):
    """W + UΣ·R·Vᵀ, with the r leading singular directions of the weight that it is put on.

    Args:
        weight: The weight to change (rows, *columns); the columns of a convolution are flattened.
        rank: r, below the number of rows and of columns.
        diagonal: Whether R is diagonal, with r numbers instead of r².
    """

    left: Tensor
    right: Tensor
    trains_by_products = True

    def __init__(self, weight: Tensor, rank: int, diagonal: bool) -> None:
        super().__init__()
        matrix = weight.flatten(1).double().cpu().numpy()
        start = np.ones(min(matrix.shape))  # or the directions would differ by rounding from call to call
        u, s, vt = svds(matrix, k=rank, v0=start)  # (rows, r), (r,), (r, columns), the leading direction last
        # a singular direction has no sign: the largest entry on the left is made positive
        signs = np.sign(np.take_along_axis(u, np.abs(u).argmax(0, keepdims=True), 0))[0]
        left, right = (u * s * signs)[:, ::-1], (signs[:, None] * vt)[::-1]
        self.register_buffer("left", torch.from_numpy(left.copy()).to(weight), persistent=False)
        self.register_buffer("right", torch.from_numpy(right.copy()).to(weight), persistent=False)
        self.shape = (rank,) if diagonal else (rank, rank)
        """Shape of R; of its diagonal if the rest is 0."""

    def numbers(self) -> Tensor:
        """R (*shape)."""
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """W + UΣ·R·Vᵀ."""
        core = self.numbers()
        left = self.left * core if core.ndim == 1 else self.left @ core  # (rows, r)
        return weight + (left @ self.right).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds UΣ·R·Vᵀ·x to y."""
        hidden, core = inputs.times(self.right), self.numbers()  # (B, N, r); (*shape) or (B, *shape)
        hidden = hidden * core.unsqueeze(-2) if len(self.shape) == 1 else hidden @ core.mT
        add_product(y, hidden, self.left.T)


def add_product(y: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left (B, N, m) times right (m, rows) to y (B, N, rows).

    Without gradients this takes one pass over y. Training takes two, because the gradient of a view that is changed in
    place would be copied.
    """
    if torch.is_grad_enabled() or not y.is_contiguous():
        y.add_(left @ right)
    else:
        y.flatten(0, 1).addmm_(left.flatten(0, 1), right)


class SingularCore(SingularDirections):
    """W + UΣ·R·Vᵀ, where all numbers of R are trained; arguments as for `SingularDirections`."""

    def __init__(self, weight: Tensor, rank: int, diagonal: bool) -> None:
        super().__init__(weight, rank, diagonal)
        self.core = nn.Parameter(weight.new_zeros(self.shape))

    def reset(self, weight: Tensor) -> None:
        """R = 0, so that nothing changes."""
        nn.init.zeros_(self.core)

    def numbers(self) -> Tensor:
        """R (*shape)."""
        return self.core


def check_rank(owner: str, rank: int, name: str, weight: Tensor) -> None:
    """Raises MethodError unless a weight has so many singular directions, and one more; `owner` names the class."""
    largest = min(weight.flatten(1).shape) - 1
    if not 1 <= rank <= largest:
        raise MethodError(f"{owner}: rank={rank} must be from 1 to {largest} for {name}")


class LoRAXS(CompactPiece[SingularCore]):
    """LoRA-XS (Bałazy et al., 2024): W + UΣ·R·Vᵀ, with a core R between the leading singular directions of W.

    Args:
        rank: r; there are r² numbers for each weight.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the numbers; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or not below the number of rows and of columns of a target.
    """

    linear = True
    diagonal = False

    def __init__(
        self, rank: int = 2, targets: tuple[str, ...] = (MLP, CONVOLUTIONS), learning_rate: float | None = None
    ) -> None:
        super().__init__(targets, learning_rate)
        self.rank = rank

    def adapt(self, name: str, weight: Tensor) -> SingularCore:
        """A core between the leading singular directions of the weight."""
        check_rank(type(self).__name__, self.rank, name, weight)
        return SingularCore(weight, self.rank, self.diagonal)
