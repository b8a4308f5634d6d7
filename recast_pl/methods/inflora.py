"""InfLoRA: low-rank updates in directions that the inputs of earlier tasks do not use.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024.

    W' = W + Σ_t B_t·A_t over tasks; only B_t is trained

The rows of A_t are the leading directions of the task's inputs outside of the space of earlier inputs (DualGPM, section
4.3). As in the authors' code, that space holds a fraction ε of the sum of the squared singular values of each task's
Σ x·xᵀ, so that few directions are enough; ε rises from `energy` to 1 over the stream. Only the sum of updates is kept,
so later updates change earlier tasks as far as their inputs lie outside of the space.

Deviations: the inputs are those of images that are not augmented, and rows of A are 0 where the inputs have no further
direction. If the first task fills more than half of the space, its complement is stored; there the authors' code keeps
the basis of the space, but reads it as that of the complement.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError, PatchError
from recast_pl.linalg import eigen
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Adaptation, Part, WeightPiece, thirds
from recast_pl.methods.lora import LowRank
from recast_pl.methods.piece import copies


class AccumulatedLowRank(LowRank):
    """W + Σ B·A over tasks, where the A of a task is fixed while its B is trained; arguments as for `LowRank`."""

    def __init__(self, weight: Tensor, rank: int, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, 1.0, parts)
        self.A.requires_grad_(False)
        sums = weight.new_zeros(*self.B.shape[:2], self.A.shape[-1])
        self.merged = nn.Parameter(sums, requires_grad=False)  # not a buffer: DDP broadcasts buffers at every step

    def reset(self, weight: Tensor) -> None:
        """B = 0, so that nothing changes; the merged sum stays."""
        nn.init.zeros_(self.B)

    product = Adaptation.product  # all tasks use the same sum

    def update(self) -> Tensor:
        """The sum over tasks."""
        return self.merged + super().update()

    @torch.no_grad()
    def merge(self) -> None:
        """Adds B·A to the sum, and sets B to 0."""
        self.merged.copy_(self.update())
        self.B.zero_()


@dataclass(frozen=True)
class Subspace:
    """A space of inputs, given by an orthonormal basis (d, k) of the space or of its complement if that is smaller."""

    basis: Tensor
    complement: bool

    def outside(self, matrix: Tensor) -> Tensor:
        """Projects the columns of a matrix (d, m) onto the complement of the space."""
        basis = self.basis.to(matrix)
        projected = basis @ (basis.T @ matrix)
        return projected if self.complement else matrix - projected

    def grow(self, covariance: Tensor, energy: float) -> "Subspace":
        """Adds the leading directions of inputs, until the space holds a fraction of their energy (DualGPM).

        Args:
            covariance: Σ x·xᵀ of the inputs (d, d).
            energy: The fraction, of the sum of the squared singular values of the covariance.

        Returns:
            The space, on the CPU; given by its complement once it has more than d/2 dimensions.
        """
        basis, complement = self.basis.to(covariance), self.complement
        budget = (1 - energy) * float(covariance.square().sum())  # may stay outside
        if complement:
            squares, directions = _leading(basis.T @ covariance)
            basis = basis @ directions[:, _needed(squares, budget) :]
        else:
            squares, directions = _leading(self.outside(covariance))
            count = _needed(squares, budget)
            if not basis.numel():  # after the first task, the authors leave out the direction that reaches the fraction
                count = max(1, count - 1)
            basis = torch.linalg.qr(torch.cat([basis, directions[:, :count]], 1)).Q
            complement = basis.shape[1] > len(basis) / 2
            if complement:
                basis = torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]
        return Subspace(basis.cpu().contiguous(), complement)  # as in a file, so that a resumed run rounds alike


class InfLoRA(WeightPiece[AccumulatedLowRank]):
    """Interference-free low-rank adaptation (Liang and Li, 2024): Σ over tasks of B·A, on keys and values.

    Args:
        rank: r, of each task's update.
        energy: Fraction of the energy of inputs that is protected after the first task; it rises to 1 over the stream.
            Energy is the sum of the squared singular values of Σ x·xᵀ over the inputs x of a weight.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights to adapt (any sequence).
        learning_rate: Learning rate of B; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, the energy is not in (0, 1], or there are no parts.
    """

    isolated = False

    def __init__(
        self,
        rank: int = 10,
        energy: float = 0.95,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] = ("k", "v"),
        learning_rate: float | None = 5e-4,
    ) -> None:
        super().__init__(targets, learning_rate)
        if rank < 1 or not 0 < energy <= 1 or not parts:
            raise MethodError(
                f"InfLoRA: rank={rank} must be at least 1, energy={energy} in (0, 1], and parts={parts} not empty"
            )
        self.rank, self.energy, self.parts = rank, energy, parts
        self.spaces: dict[str, Subspace] = {}
        """Spaces of the inputs of earlier tasks, by weight, in float64 on the CPU; empty during the first task."""
        self.finished, self.designed = 0, False
        """Number of finished tasks, and whether A belongs to the current task."""

    def adapt(self, name: str, weight: Tensor) -> AccumulatedLowRank:
        """A sum of low-rank updates for the weight, or for the parts of a fused one."""
        module = self._owners[name][0]
        if isinstance(module, nn.Conv2d) and (module.groups != 1 or isinstance(module.padding, str)):
            raise MethodError(f"InfLoRA cannot adapt {name}, a grouped or 'same'-padded convolution; change targets")
        return AccumulatedLowRank(weight, self.rank, thirds(name, self.parts))

    def begin_task(self) -> None:
        """B = 0; A is designed once data are available."""
        super().begin_task()
        self.designed = False

    @torch.no_grad()
    def begin_fit(self) -> None:
        """Designs A from the task's inputs, unless the task is resumed."""
        if self.designed:
            return
        for name, covariance in self._covariances().items():
            a = self.adaptations[name].A
            a.copy_(design(covariance, self.spaces.get(name), self.rank))  # (r, columns) for each part
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(a, 0)  # rounding may differ, and eigenvectors have no sign
        self.designed = True

    @torch.no_grad()
    def end_task(self) -> None:
        """Adds the task's inputs to the spaces, and its update to the sum."""
        energy = self.energy + (1 - self.energy) * self.finished / self.learner.stream_length
        for name, covariance in self._covariances().items():
            space = self.spaces.get(name, Subspace(covariance.new_empty(len(covariance), 0), False))
            self.spaces[name] = space.grow(covariance, energy)
            self.adaptations[name].merge()
        self.finished += 1

    def shared_state(self) -> dict[str, Tensor]:
        """The sums, and the spaces."""
        state = copies({f"merged:{name}": low_rank.merged for name, low_rank in self.adaptations.items()})
        for name, space in self.spaces.items():
            state[f"{'complement' if space.complement else 'space'}:{name}"] = space.basis.clone()
        return state | {"learnt": torch.tensor(self.finished)}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads the sums and the spaces."""
        sums = {f"merged:{name}": low_rank.merged for name, low_rank in self.adaptations.items()}
        self._load({key: state[key] for key in state if key in sums}, sums)
        try:
            self.finished = int(state["learnt"])
            for name in self.adaptations:
                kind = "complement" if f"complement:{name}" in state else "space"
                self.spaces[name] = Subspace(state[f"{kind}:{name}"], kind == "complement")
        except KeyError as cause:
            raise PatchError(f"the shared state lacks {cause} of InfLoRA; train the tasks again") from cause

    def training_state(self) -> dict[str, Tensor]:
        """A of the current task."""
        return {name: low_rank.A.detach().clone() for name, low_rank in self.adaptations.items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads A."""
        self._load(state, {name: low_rank.A for name, low_rank in self.adaptations.items()})
        self.designed = True

    def _covariances(self) -> dict[str, Tensor]:
        """Σ x·xᵀ (d, d) in float64 over the inputs x of each weight, for the training images of the current task."""
        sums: dict[str, Tensor] = {}

        def add(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            x = Inputs(module, args[0]).rows() if isinstance(module, nn.Conv2d) else args[0]
            rows = x.reshape(-1, x.shape[-1]).float()  # the vectors that the weight multiplies (N, d)
            product = (rows.T @ rows).double()
            sums[name] = sums[name] + product if name in sums else product

        with ExitStack() as hooks, torch.no_grad():
            for name, (module, _) in self._owners.items():
                hooks.enter_context(module.register_forward_pre_hook(partial(add, name)))
            for images, _ in self.learner.batches("train"):
                self.learner.current()[0](images)
        return sums


def design(covariance: Tensor, space: Subspace | None, rank: int) -> Tensor:
    """The rows of A (r, d): leading directions of inputs outside of a space, divided by √3 as in the authors' code.

    Args:
        covariance: Σ x·xᵀ (d, d); rows of A are zero once the inputs have no further direction.
        space: The space of the inputs of earlier tasks; None during the first.
        rank: r.
    """
    squares, vectors = _leading(covariance if space is None else space.outside(covariance))
    leading = vectors[:, :rank] * (squares[:rank] > (1e-7 * covariance.norm()).square())
    directions = leading if space is None else space.outside(leading)  # again, to remove what rounding has left inside
    return F.pad(directions.T, (0, 0, 0, rank - directions.shape[1])) / 3**0.5


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the singular values (d,) of a matrix (d, m), largest first, and its left singular vectors (d, d)."""
    squares, vectors = eigen(matrix @ matrix.T)
    return squares.flip(0).clamp_min(0), vectors.flip(1)


def _needed(squares: Tensor, budget: float) -> int:
    """How many leading squares to take, so that the rest sums to no more than a budget."""
    left = squares.sum() - squares.cumsum(0)
    return 0 if float(squares.sum()) <= budget else int((left > budget).sum()) + 1
