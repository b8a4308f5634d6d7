"""Uni-LoRA: the entries of all low-rank factors are those of one short vector.

Li et al., "Uni-LoRA: One Vector is All You Need", NeurIPS 2025 (arXiv:2506.00799).

    W' = W + B·A − B₀·A₀, where the entries of B and A of all weights are s·P·θ, and those of B₀ and A₀ are s·P·θ₀

Each of the D rows of P has one entry, at a uniformly random one of d places; it is 1/√n, where n rows have their entry
there. So P keeps lengths.

Deviations: the authors start from W + B₀·A₀. Here B₀·A₀ is subtracted, so that every task starts from exactly the
pretrained weight; a task trains θ − θ₀, which starts at 0. The authors have no factor s. Here s = √(D/d), so that the
entries are about as large as the numbers of θ: otherwise each step would move the entries of 48 numbers on ViT-S 78
times less than it moves the numbers, in the authors' runs for GLUE 2.5 times. θ₀ is uniform in ±0.02 as theirs. A
fused query-key-value weight has one A and one B, and all weights of the blocks are adapted, not only those of queries
and values. PEFT uses each place equally often; here places are drawn independently, as in the paper.
"""

import torch
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import EVERY_LAYER, Adaptation, CompactPiece

_START = 0.02
"""Largest absolute entry of θ₀."""


class ProjectedFactors(Adaptation):
    """W + B·A − B₀·A₀, with rank r.

    Args:
        weight: The weight to change (rows, *columns); the columns of a convolution are flattened.
        rank: r.
        values: θ − θ₀ (d,), which all weights share.
        start: θ₀ (d,).
        generator: Draws the places of entries.
    """

    places: Tensor
    factor: Tensor
    """s/√n for each place (d,); 1 until all weights are known."""

    def __init__(
        self, weight: Tensor, rank: int, values: nn.Parameter, start: nn.Parameter, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.rows, self.columns, self.rank = len(weight), weight[0].numel(), rank
        self.values, self.start = values, start
        places = torch.randint(len(values), (rank * (self.rows + self.columns),), generator=generator)
        self.register_buffer("places", places.to(weight.device), persistent=False)
        self.register_buffer("factor", torch.ones_like(values.data), persistent=False)

    def reset(self, weight: Tensor) -> None:
        """θ = θ₀, so that nothing changes."""
        nn.init.zeros_(self.values)

    def change(self, weight: Tensor) -> Tensor:
        """W + B·A − B₀·A₀."""
        left, right = self.factors()
        return weight + (left @ right).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds (B·A − B₀·A₀)·x to y."""
        left, right = self.factors()
        y.add_(inputs.rows() @ right.mT @ left.mT)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors (…, rows, 2r) and (…, 2r, columns) of B·A − B₀·A₀ = (B − B₀)·A + B₀·(A − A₀), first exactly 0."""
        moved_left, moved_right = self.entries(self.values)
        left, right = self.entries(self.start)
        left = torch.cat([moved_left, left.expand_as(moved_left)], -2)
        return left.mT, torch.cat([right + moved_right, moved_right], -2)

    def entries(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The entries s·P·θ of this weight for a vector (…, d): Bᵀ (…, r, rows) and A (…, r, columns)."""
        entries = (vector * self.factor).index_select(-1, self.places).unflatten(-1, (self.rank, -1))
        left, right = entries.split([self.rows, self.columns], -1)
        return left, right


class UniLoRA(CompactPiece[ProjectedFactors]):
    """Uni-LoRA (Li et al., 2025): low-rank factors of all weights whose entries are those of one trained vector.

    Args:
        count: d, the numbers of the vector.
        rank: r.
        seed: Seed of the projection P and of the vector's start.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the vector; None for that of the head. 2e-3 moves the entries of the factors as
            the authors' 5e-3 does for GLUE.

    Raises:
        MethodError: If `count` or the rank is below 1.
    """

    def __init__(
        self,
        count: int = 48,
        rank: int = 4,
        seed: int = 0,
        targets: tuple[str, ...] = EVERY_LAYER,
        learning_rate: float | None = 2e-3,
    ) -> None:
        super().__init__(targets, learning_rate)
        if count < 1 or rank < 1:
            raise MethodError(f"UniLoRA: count={count} and rank={rank} must be at least 1")
        self.rank, self._generator = rank, torch.Generator().manual_seed(seed)
        self.values = nn.Parameter(torch.zeros(count))
        start = _START * (2 * torch.rand(count, generator=self._generator) - 1)
        # a frozen parameter, so that a patch of another seed is refused, as it belongs to another base
        self.start = nn.Parameter(start, requires_grad=False)

    def adapt(self, name: str, weight: Tensor) -> ProjectedFactors:
        """Factors for the weight."""
        for vector in (self.values, self.start):
            vector.data = vector.data.to(weight)
        return ProjectedFactors(weight, self.rank, self.values, self.start, self._generator)

    def attach(self, network: nn.Module) -> None:
        """Puts factors on every target; raises a MethodError if no weight matches."""
        super().attach(network)
        factors = list(self.adaptations.values())
        counts = torch.bincount(torch.cat([each.places for each in factors]), minlength=len(self.values))  # n
        for each in factors:
            each.factor.copy_((counts.sum() / len(counts) / counts.clamp_min(1)).sqrt())
