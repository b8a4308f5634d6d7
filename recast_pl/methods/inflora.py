"""InfLoRA: low-rank updates in directions that old tasks do not use."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import ATTENTION, CONVOLUTIONS, Adaptation, Part, WeightPiece
from recast_pl.methods.lora import LowRank
from recast_pl.methods.piece import check_state


class AccumulatedLowRank(LowRank):
    """W + Σ B·A over tasks, where the A of a task is fixed while its B is trained.

    Args:
        weight: What is changed (rows, *columns).
        rank: r.
        parts: Which thirds of the rows; None for all rows as one.
    """

    def __init__(self, weight: Tensor, rank: int, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, 1.0, parts)
        self.A.requires_grad_(False)
        sums = weight.new_zeros(*self.B.shape[:2], self.A.shape[-1])
        self.merged = nn.Parameter(sums, requires_grad=False)  # a buffer would be sent around by DDP at every step

    def reset(self, weight: Tensor) -> None:
        """B = 0, so that nothing changes; what was merged stays."""
        nn.init.zeros_(self.B)

    product = Adaptation.product  # tasks do not differ in the sum

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
    """A space of inputs, by an orthonormal basis of it or of what is orthogonal to it, whichever is smaller.

    Args:
        basis: (d, k).
        complement: Whether the basis spans what the space leaves out.
    """

    basis: Tensor
    complement: bool

    def outside(self, matrix: Tensor) -> Tensor:
        """Projects the columns of a matrix (d, m) to what is orthogonal to the space."""
        projected = self.basis @ (self.basis.T @ matrix)
        return projected if self.complement else matrix - projected

    def grow(self, covariance: Tensor, energy: float) -> "Subspace":
        """Takes in the leading directions of inputs, until it holds a part of their energy (DualGPM, section 4.3).

        Args:
            covariance: Σ x·xᵀ of the inputs (d, d).
            energy: The part, of the trace of the covariance.

        Returns:
            The space, by the other basis once it has more than d/2 dimensions.
        """
        budget = (1 - energy) * float(covariance.trace())  # may stay outside
        if self.complement:
            values, vectors = _descending(self.basis.T @ covariance @ self.basis)
            return Subspace(self.basis @ vectors[:, _needed(values, budget) :], True)
        values, vectors = _descending(self.outside(self.outside(covariance).T))
        basis = torch.linalg.qr(torch.cat([self.basis, vectors[:, : _needed(values, budget)]], 1)).Q
        if basis.shape[1] <= len(basis) / 2:
            return Subspace(basis, False)
        return Subspace(torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :], True)


class InfLoRA(WeightPiece):
    """Interference-free low-rank adaptation (Liang and Li, 2024): Σ over tasks of B·A, on keys and values.

    The rows of a task's A are the leading directions of its inputs that are orthogonal to those of all tasks before;
    only B is trained. The space of old inputs takes in each task's inputs up to a part of their energy, which rises
    from `energy` to 1 over the stream. Nothing but the sum is kept, so that old tasks see later updates, as far as
    their inputs reach into what their space left out.

    Args:
        rank: r, of each task's update.
        energy: Part of the energy of inputs that is guarded after the first task.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights (any sequence); other weights are adapted whole.
        learning_rate: Rate of B; None for that of the head.

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
        self.rank, self.energy = rank, energy
        self.parts = sorted("qkv".index(part) for part in set(parts))
        self.spaces: dict[str, Subspace] = {}
        """Of the inputs of old tasks, by weight, in float64; empty before the first task has ended."""
        self.learnt, self.designed = 0, False
        """Tasks that have ended, and whether A is that of the current task."""

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """A sum of low-rank updates for the weight, or for the parts of a fused one."""
        module = self._sites[name][0]
        if isinstance(module, nn.Conv2d) and (module.groups != 1 or isinstance(module.padding, str)):
            raise MethodError(f"InfLoRA: {name} is a convolution in groups or padded to 'same'; do not target it")
        return AccumulatedLowRank(weight, self.rank, self.parts if re.search(r"qkv|in_proj", name) else None)

    def begin_task(self) -> None:
        """B = 0; A is designed when data are at hand."""
        super().begin_task()
        self.designed = False

    @torch.no_grad()
    def begin_fit(self) -> None:
        """Designs A from the task's inputs, unless the task is resumed."""
        if self.designed:
            return
        for name, covariance in self._covariances().items():
            space = self.spaces.get(name)
            if space is not None:
                space = Subspace(space.basis.to(covariance), space.complement)
            matrix = self._accumulated(name).A.copy_(design(covariance, space, self.rank))  # (r, columns) for each part
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(matrix, 0)  # devices may round differently, and eigenvectors have no sign
        self.designed = True

    @torch.no_grad()
    def end_task(self) -> None:
        """Takes the task's inputs into the spaces, and its update into the sum."""
        energy = self.energy + (1 - self.energy) * self.learnt / self.learner.stream_length
        for name, covariance in self._covariances().items():
            old = self.spaces.get(name, Subspace(covariance.new_empty(len(covariance), 0), False))
            new = Subspace(old.basis.to(covariance), old.complement).grow(covariance, energy)
            self.spaces[name] = Subspace(new.basis.cpu(), new.complement)
            self._accumulated(name).merge()
        self.learnt += 1

    def shared_state(self) -> dict[str, Tensor]:
        """The sums, and the spaces."""
        state = {f"merged:{name}": self._accumulated(name).merged.detach().cpu().clone() for name in self.adaptations}
        for name, space in self.spaces.items():
            state[f"{'complement' if space.complement else 'space'}:{name}"] = space.basis.clone()
        return state | {"learnt": torch.tensor(self.learnt)}

    @torch.no_grad()
    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes them back."""
        sums = {f"merged:{name}": self._accumulated(name).merged for name in self.adaptations}
        expected = {key: tuple(merged.shape) for key, merged in sums.items()}
        check_state("InfLoRA", {key: state[key] for key in state if key in sums}, expected)
        for key, merged in sums.items():
            merged.copy_(state[key])
        try:
            self.learnt = int(state["learnt"])
            for name in self.adaptations:
                complement = f"complement:{name}" in state
                self.spaces[name] = Subspace(state[f"{'complement' if complement else 'space'}:{name}"], complement)
        except KeyError as cause:
            raise PatchError(f"the shared state lacks {cause} of InfLoRA; learn the tasks anew") from cause

    def training_state(self) -> dict[str, Tensor]:
        """A of the current task."""
        return {name: self._accumulated(name).A.detach().clone() for name in self.adaptations}

    @torch.no_grad()
    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes A back."""
        for name, matrix in state.items():
            self._accumulated(name).A.copy_(matrix)
        self.designed = True

    def _accumulated(self, name: str) -> AccumulatedLowRank:
        adaptation = self.adaptations[name]
        assert isinstance(adaptation, AccumulatedLowRank)
        return adaptation

    def _covariances(self) -> dict[str, Tensor]:
        """Σ x·xᵀ (d, d) in float64 over the inputs x of each weight, for the training images of the current task."""
        sums: dict[str, Tensor] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def add(module: nn.Module, args: tuple[Any, ...]) -> None:
                rows = _rows(module, args[0]).float()  # (N, d)
                product = (rows.T @ rows).double()
                sums[name] = sums[name] + product if name in sums else product

            return add

        handles = [site.register_forward_pre_hook(watch(name)) for name, (site, _) in self._sites.items()]
        backbone = self.learner.backbone
        assert backbone is not None
        try:
            with torch.no_grad():
                for images, _ in self.learner.batches("train"):
                    backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        return sums


def design(covariance: Tensor, space: Subspace | None, rank: int) -> Tensor:
    """The rows of A: leading directions of inputs outside of a space, divided by √3 as the authors do.

    Args:
        covariance: Σ x·xᵀ (d, d).
        space: Of the inputs of old tasks; None for none.
        rank: r.

    Returns:
        (r, d); rows are zero where the inputs have no further direction outside of the space.
    """
    outside = covariance if space is None else space.outside(space.outside(covariance).T)
    values, vectors = _descending(outside)
    leading = vectors[:, :rank] * (values[:rank] > 1e-9 * covariance.trace())
    directions = leading if space is None else space.outside(leading)  # once more, for what rounding has left inside
    return F.pad(directions.T, (0, 0, 0, rank - directions.shape[1])) / 3**0.5


def _descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,), largest first and none below 0, and eigenvectors (d, d)."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _needed(values: Tensor, budget: float) -> int:
    """How many leading values must go, so that no more than a budget is left."""
    left = values.sum() - values.cumsum(0)
    return 0 if float(values.sum()) <= budget else int((left > budget).sum()) + 1


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The vectors that a weight, with flattened columns, is multiplied with (N, d)."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding: Any = module.padding
    patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (B, d, L)
    return patches.transpose(1, 2).flatten(0, 1)
