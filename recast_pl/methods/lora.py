"""LoRA, and with rank 1 on queries and values MeLo: a low-rank update of each weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. Zhu et al., "MeLo: Low-rank Adaptation is
Better than Fine-tuning for Medical Image Diagnosis", ISBI 2024.

    W' = W + (alpha / r) · B·A, with A (r, columns) and B (rows, r); B starts at 0

Deviations: there is no dropout, and alpha defaults to r, so that the factor is 1. With `shared`, weights of one shape
have one A and one B, by which figure 4 of RECAST's paper makes LoRA smaller.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Adaptation, Part, WeightPiece, thirds


class LowRank(Adaptation):
    """W + s·B·A, for all rows of a weight or for some thirds of a fused one.

    Args:
        weight: The weight to change (rows, *columns); the columns of a convolution are flattened.
        rank: r.
        scale: s.
        parts: Which thirds of the rows; None for all rows.
    """

    blocks: Tensor
    trains_by_products = True

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        self.scale, self.thirds = scale, 1 if parts is None else 3
        self.register_buffer("blocks", torch.tensor([0] if parts is None else list(parts)), persistent=False)
        count = len(self.blocks)
        self.A = nn.Parameter(weight.new_zeros(count, rank, columns))
        self.B = nn.Parameter(weight.new_zeros(count, rows // self.thirds, rank))

    def reset(self, weight: Tensor) -> None:
        """A is uniform in ±1/√columns as in the authors' code; B = 0, so that nothing changes."""
        nn.init.uniform_(self.A, -1 / math.sqrt(self.A.shape[-1]), 1 / math.sqrt(self.A.shape[-1]))
        nn.init.zeros_(self.B)

    def change(self, weight: Tensor) -> Tensor:
        """W + s·B·A."""
        return self.updated(weight).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds s·B·A·x to y."""
        hidden = inputs.rows()[:, None] @ self.A.mT  # (B, parts changed, N, r)
        added = (hidden @ self.B.mT).movedim(1, 2)  # (B, N, parts changed, rows of a part)
        y.unflatten(-1, (self.thirds, -1)).index_add_(2, self.blocks, added, alpha=self.scale)

    def updated(self, weight: Tensor) -> Tensor:
        """W + s·B·A by parts (1 or 3, rows of a part, columns)."""
        parts = weight.reshape(self.thirds, -1, self.A.shape[-1])
        if torch.compiler.is_exporting():  # for index_add, ONNX Runtime would change the frozen weight itself
            chosen = F.one_hot(self.blocks, self.thirds).T.to(parts)  # (1 or 3, parts changed)
            return parts + (chosen @ self.update().flatten(1)).view_as(parts)
        return parts.index_add(0, self.blocks, self.update())

    def update(self) -> Tensor:
        """s·B·A (parts changed, rows of a part, columns)."""
        return self.scale * (self.B @ self.A)


class LoRA(WeightPiece[LowRank]):
    """Low-rank adaptation (Hu et al., 2022): W + (α/r)·B·A. With rank 1 on q and v it is MeLo (Zhu et al., 2024).

    Args:
        rank: r.
        alpha: α; None for r, so that the factor is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence); None for q and v.
        learning_rate: Learning rate of all parameters; None for that of the head.
        shared: Whether all weights of one shape and with the same parts have the same A and B.

    Raises:
        MethodError: If the rank is below 1, or there are no parts.
    """

    linear = True
    adaptation: type[LowRank] = LowRank
    default_parts: tuple[Part, ...] = ("q", "v")

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] | None = None,
        learning_rate: float | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(targets, learning_rate)
        self.shared, self._made = shared, dict[tuple[Any, ...], LowRank]()
        self.parts = self.default_parts if parts is None else parts
        if rank < 1 or not self.parts:
            raise MethodError(f"{type(self).__name__}: rank={rank} must be at least 1, and parts={parts} not empty")
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank

    def adapt(self, name: str, weight: Tensor) -> LowRank:
        """Low-rank factors for the weight, or for the parts of a fused one."""
        parts = thirds(name, self.parts)
        key = (weight.shape, parts and tuple(parts), None if self.shared else name)
        if key not in self._made:
            self._made[key] = self.adaptation(weight, self.rank, self.scale, parts)
        return self._made[key]

    def numbers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changes (α/r)·B·A (parts, rows of a part, columns) by name of weight, in double precision."""
        return {n: self.scale * (state[f"{n}:B"].double() @ state[f"{n}:A"].double()) for n in self.adaptations}

    def from_numbers(self, numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of the changes of rank r that come closest to these, by singular value decomposition."""
        state = {}
        for name, change in numbers.items():
            left, values, right = torch.linalg.svd(change.double() / self.scale, full_matrices=False)
            root = values[:, : self.rank].sqrt()
            state[f"{name}:A"] = (root[:, :, None] * right[:, : self.rank]).float()
            state[f"{name}:B"] = (left[:, :, : self.rank] * root[:, None]).float()
        return state
