"""Pieces of a few numbers for each weight: what RECAST is to be measured against, and combined with."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from recast_pl.errors import MethodError
from recast_pl.til.adaptations import Adaptation, Scales, SingularCore
from recast_pl.til.piece import check_state
from recast_pl.til.weights import ATTENTION, CONVOLUTIONS, MLP, WeightPiece

PROJECTION = r"(attn\.proj|self_attention\.out_proj)\.weight$"
"""Names of the weights that follow attention in timm's and torchvision's vision transformers."""
EVERY_LAYER = (ATTENTION, PROJECTION, MLP, CONVOLUTIONS)
"""All weights of the blocks of a vision transformer or a residual network."""


class MinimalPiece(WeightPiece):
    """A piece whose numbers go into a patch as one tensor, because a file spends some 80 bytes on naming each."""

    def task_state(self) -> dict[str, Tensor]:
        """The numbers, weight after weight (Σ,)."""
        return {"numbers": torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()]).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes the numbers back."""
        check_state(type(self).__name__, state, {"numbers": (sum(p.numel() for p in self.parameters.values()),)})
        for parameter, (numbers,) in self.unpack({"numbers": state["numbers"][None]}).items():
            parameter.copy_(numbers)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The numbers of T tasks (T, *shape) for each weight."""
        parameters = list(self.parameters.values())
        parts = states["numbers"].split([parameter.numel() for parameter in parameters], 1)
        return {p: part.unflatten(1, p.shape) for p, part in zip(parameters, parts, strict=True)}


class Scale(MinimalPiece):
    """A factor for each weight, and for each of queries, keys and values: 72 numbers on ViT-S.

    What a bank can do of itself, were its templates the weights and nothing mixed.

    Args:
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the factors; None for that of the head.
    """

    def __init__(self, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None) -> None:
        super().__init__(targets, learning_rate)

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """A factor for the weight, or three for a fused one."""
        return Scales(weight, 3 if re.search(r"qkv|in_proj", name) else 1)


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


class Spectral(LoRAXS):
    """Spectral templates: the r leading singular directions σuvᵀ of each weight, with a coefficient for each.

    They are templates like those of equation 1 that no file holds, as they are worked out from the backbone. With r = 1
    this is `LoRAXS` of rank 1.

    Args:
        rank: r: there are r numbers for each weight.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the coefficients; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or not below the rows and columns of a target.
    """

    diagonal = True

    def __init__(
        self, rank: int = 1, targets: tuple[str, ...] = EVERY_LAYER, learning_rate: float | None = None
    ) -> None:
        super().__init__(rank, targets, learning_rate)
