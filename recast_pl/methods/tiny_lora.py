"""TinyLoRA: between the leading singular directions of each weight, a trained sum of fixed random matrices.

Morris et al., "Learning to Reason in 13 Parameters", 2026 (arXiv:2602.04118).

    W' = W + U_r·Σ_r·(Σ_i v_i·P_i)·V_rᵀ, where v (u,) is trained and the matrices P_i (r, r) are fixed

U·Σ·Vᵀ is the singular value decomposition of W. Weights that are tied share one v, and each has matrices of its own.

The paper leaves the distribution of the matrices open. Here their entries are uniform with mean 0 and variance 1/r, the
variance that PEFT chose for normal ones: uniform numbers are the same bits on every machine. PEFT writes U·√Σ and
√Σ·Vᵀ in place of U·Σ and Vᵀ; here it is as the paper writes it.
"""

import math

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import EVERY_LAYER, CompactPiece
from recast_pl.methods.lora_xs import SingularDirections, check_rank


class RandomCore(SingularDirections):
    """W + UΣ·(Σ_i v_i·P_i)·Vᵀ.

    Args:
        weight: The weight to change (rows, *columns).
        rank: r.
        values: v (u,), which other weights may share.
        generator: Draws the matrices.
    """

    def __init__(self, weight: Tensor, rank: int, values: nn.Parameter, generator: torch.Generator) -> None:
        super().__init__(weight, rank, diagonal=False)
        self.values = values
        uniform = 2 * torch.rand(len(values), rank * rank, generator=generator) - 1
        # a frozen parameter, so that a patch of another seed is refused, as it belongs to another base
        self.matrices = nn.Parameter((math.sqrt(3 / rank) * uniform).to(weight), requires_grad=False)

    def reset(self, weight: Tensor) -> None:
        """All of v is 0, so that nothing changes."""
        nn.init.zeros_(self.values)

    def numbers(self) -> Tensor:
        """R (r, r), or one for each of B samples (B, r, r)."""
        core: Tensor = (self.values @ self.matrices).unflatten(-1, self.shape)
        return core


class TinyLoRA(CompactPiece[RandomCore]):
    """TinyLoRA (Morris et al., 2026): W + UΣ·(Σ_i v_i·P_i)·Vᵀ, with random matrices P_i and a trained vector v.

    Args:
        count: u, the numbers of a vector.
        tied: How many consecutive weights share a vector.
        rank: r.
        seed: Seed of the matrices.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the numbers; None for that of the head.

    Raises:
        MethodError: If `count` or `tied` is below 1, or the rank is not from 1 to below the number of rows and of
            columns of a target.
    """

    linear = True

    def __init__(
        self,
        count: int = 1,
        tied: int = 1,
        rank: int = 2,
        seed: int = 0,
        targets: tuple[str, ...] = EVERY_LAYER,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if count < 1 or tied < 1:
            raise MethodError(f"TinyLoRA: count={count} and tied={tied} must be at least 1")
        self.count, self.tied, self.rank = count, tied, rank
        self._generator = torch.Generator().manual_seed(seed)
        self._values: nn.Parameter

    def adapt(self, name: str, weight: Tensor) -> RandomCore:
        """A core between the leading singular directions of the weight."""
        check_rank("TinyLoRA", self.rank, name, weight)
        if len(self.adaptations) % self.tied == 0:
            self._values = nn.Parameter(weight.new_zeros(self.count))
        return RandomCore(weight, self.rank, self._values, self._generator)
