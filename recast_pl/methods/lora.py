"""Low-rank adaptation."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Adaptation, Part, WeightPiece


class LowRank(Adaptation):
    """W + s·B·A, for the rows of a weight or for some of the three equal parts of a fused one.

    Args:
        weight: What is changed (rows, *columns); columns are flattened, as a convolution's.
        rank: r.
        scale: s.
        parts: Which thirds of the rows; None for all rows as one.
    """

    blocks: Tensor

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.scale, self.thirds = scale, 1 if parts is None else 3
        self.register_buffer("blocks", torch.tensor([0] if parts is None else list(parts)), persistent=False)
        count = len(self.blocks)
        self.A = nn.Parameter(weight.new_zeros(count, rank, columns))
        self.B = nn.Parameter(weight.new_zeros(count, rows // self.thirds, rank))

    def reset(self, weight: Tensor) -> None:
        """A as LoRA's authors draw it, uniform in ±1/√columns; B = 0, so that nothing changes."""
        nn.init.uniform_(self.A, -1 / math.sqrt(self.A.shape[-1]), 1 / math.sqrt(self.A.shape[-1]))
        nn.init.zeros_(self.B)

    def change(self, weight: Tensor) -> Tensor:
        """W + s·B·A."""
        return self.add(weight).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds s·B·A·x to y."""
        hidden = inputs.rows()[:, None] @ self.A.mT  # (B, parts changed, N, r)
        added = (hidden @ self.B.mT).movedim(1, 2)  # (B, N, parts changed, rows of a part)
        y.unflatten(-1, (self.thirds, -1)).index_add_(2, self.blocks, added, alpha=self.scale)

    def add(self, weight: Tensor) -> Tensor:
        """The same by parts (1 or 3, rows of a part, columns)."""
        parts = weight.reshape(self.thirds, -1, self.A.shape[-1])
        return parts.index_add(0, self.blocks, self.update())

    def update(self) -> Tensor:
        """s·B·A (parts changed, rows of a part, columns)."""
        return self.scale * (self.B @ self.A)


class LoRA(WeightPiece):
    """Low-rank adaptation (Hu et al., 2022): W + (α/r)·B·A. With rank 1 on q and v it is MeLo (Zhu et al., 2024).

    Args:
        rank: r.
        alpha: α; None for r, so that the scale is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights (any sequence); other weights are adapted whole.
        learning_rate: Rate of A and B; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or there are no parts.
    """

    adaptation: type[LowRank] = LowRank

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] = ("q", "v"),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if rank < 1 or not parts:
            raise MethodError(f"{type(self).__name__}: rank={rank} must be at least 1, and parts={parts} not empty")
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.parts = sorted("qkv".index(part) for part in set(parts))

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """Low-rank factors for the weight, or for the parts of a fused one."""
        fused = re.search(r"qkv|in_proj", name)
        return self.adaptation(weight, self.rank, self.scale, self.parts if fused else None)
