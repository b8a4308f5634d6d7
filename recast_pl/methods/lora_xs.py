"""LoRA-XS."""

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import CONVOLUTIONS, MLP, Adaptation, MinimalPiece


class SingularCore(Adaptation):
    """W + UΣ·R·Vᵀ, with the r leading singular directions of the weight that it is put on.

    The directions are worked out from the weight, so that no file needs to hold them.

    Args:
        weight: What is changed (rows, *columns); columns are flattened, as a convolution's.
        rank: r, below the rows and the columns.
        diagonal: Whether R is diagonal, with r numbers in place of r².
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, rank: int, diagonal: bool) -> None:
        super().__init__()
        matrix = weight.flatten(1).double().cpu().numpy()
        start = np.ones(min(matrix.shape))  # or the directions would differ by rounding from call to call
        u, s, vt = svds(matrix, k=rank, v0=start)  # (rows, r), (r,), (r, columns), the leading direction last
        signs = np.sign(np.take_along_axis(u, np.abs(u).argmax(0, keepdims=True), 0))[0]  # which nothing else fixes
        left, right = (u * s * signs)[:, ::-1], (signs[:, None] * vt)[::-1]
        self.register_buffer("left", torch.from_numpy(left.copy()).to(weight), persistent=False)
        self.register_buffer("right", torch.from_numpy(right.copy()).to(weight), persistent=False)
        self.core = nn.Parameter(weight.new_zeros(rank) if diagonal else weight.new_zeros(rank, rank))

    def reset(self, weight: Tensor) -> None:
        """R = 0, so that nothing changes."""
        nn.init.zeros_(self.core)

    def change(self, weight: Tensor) -> Tensor:
        """W + UΣ·R·Vᵀ."""
        left = self.left * self.core if self.core.ndim == 1 else self.left @ self.core  # (rows, r)
        return weight + (left @ self.right).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds UΣ·R·Vᵀ·x to y."""
        hidden, core = inputs.times(self.right), self.core  # (B, N, r)
        hidden = hidden * core[:, None] if core.ndim == 2 else hidden @ core.mT
        y.add_(hidden @ self.left.T)


class LoRAXS(MinimalPiece):
    """LoRA-XS (Bałazy et al., 2024): W + UΣ·R·Vᵀ, with a core R between the leading singular directions of W.

    As there, R has the directions of the frozen weight on either side; it starts from 0 rather than from small noise.

    Args:
        rank: r: there are r² numbers for each weight.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the cores; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or not below the rows and columns of a target.
    """

    diagonal = False

    def __init__(
        self, rank: int = 2, targets: tuple[str, ...] = (MLP, CONVOLUTIONS), learning_rate: float | None = None
    ) -> None:
        super().__init__(targets, learning_rate)
        self.rank = rank

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """A core between the leading singular directions of the weight."""
        largest = min(weight.flatten(1).shape) - 1
        if not 1 <= self.rank <= largest:
            raise MethodError(
                f"{type(self).__name__}: rank={self.rank} must be from 1 to {largest} for {name}; correct it"
            )
        return SingularCore(weight, self.rank, self.diagonal)
