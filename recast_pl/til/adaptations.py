"""Changes of one weight, as parametrizations: what the pieces of `weights.py` put on their targets."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from recast_pl.decomposition.surgery import Inputs


class Adaptation(nn.Module):
    """A change of one weight, as a parametrization above whatever gives the weight: a parameter, or templates.

    A parametrization has no say in what it gets, so that pieces on one weight work in the order of their list.
    """

    def __init_subclass__(cls) -> None:
        """Another formula has no product but its own."""
        if "change" in vars(cls) and "product" not in vars(cls):
            cls.product = Adaptation.product  # type: ignore[method-assign]

    def reset(self, weight: Tensor) -> None:
        """Sets the parameters to where every task starts.

        Args:
            weight: What the adaptation gets then (*shape).
        """
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """The changed weight, of the same shape."""
        raise NotImplementedError

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Does in place to products what `change` does to the weight, where it can be done without that weight.

        Each sample has parameters of its own here: they have a first dimension (B, …).

        Args:
            inputs: Of B samples.
            y: What becomes of them by the weight below (B, N, rows).
        """
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, computed in its own precision under autocast, too."""
        with torch.autocast(weight.device.type, enabled=False):
            return self.change(weight)


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


class MagnitudeDirection(LowRank):
    """m·V/‖V‖ with V = W + s·B·A, norms by row; in the gradient the norm is a constant (section 4.3 of DoRA)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, parts: Sequence[int] | None) -> None:
        super().__init__(weight, rank, scale, parts)
        self.magnitude = nn.Parameter(weight.new_zeros(self.B.shape[:2]))  # (parts, rows of a part)

    def reset(self, weight: Tensor) -> None:
        """Magnitudes are the norms of the weight's rows, so that nothing changes."""
        super().reset(weight)
        self.magnitude.copy_(self._norms(self.add(weight)))

    def change(self, weight: Tensor) -> Tensor:
        """m·V/‖V‖."""
        direction = self.add(weight)  # (1 or 3, rows of a part, columns)
        scale = torch.ones_like(direction[..., 0])
        scale = scale.index_copy(0, self.blocks, self.magnitude / self._norms(direction.detach()))
        return (direction * scale[..., None]).view_as(weight)

    def _norms(self, direction: Tensor) -> Tensor:
        norms: Tensor = direction[self.blocks].norm(dim=-1)  # (parts, rows of a part)
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)  # of rows that are zero


class Sparse(Adaptation):
    """W + S, where S is zero but for k entries, which are chosen by the gradients of all.

    Args:
        weight: What is changed.
        count: k.
    """

    indices: Tensor

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("indices", torch.zeros(count, dtype=torch.long, device=weight.device), persistent=False)
        self.values, self.size = nn.Parameter(weight.new_zeros(count)), weight.numel()
        self.chosen = False
        self.squares: Tensor | None = None
        """Sum over steps of the squared gradient of every entry (size,), while it is watched."""
        self.dense: Tensor | None = None
        """Zeros (*shape) that are added while gradients are watched, to receive them."""

    def reset(self, weight: Tensor) -> None:
        """No entry is chosen."""
        nn.init.zeros_(self.values)
        self.chosen, self.squares, self.dense = False, None, None

    def watch(self, shape: Sequence[int]) -> None:
        """Adds the gradients of the step before to the sums; to be called before each step that is watched."""
        device = self.values.device
        self.squares = torch.zeros(self.size, device=device) if self.squares is None else self.squares.to(device)
        if self.dense is None:
            self.dense = torch.zeros(*shape, device=device, requires_grad=True)
        elif self.dense.grad is not None:
            squares = self.dense.grad.flatten().square()
            if squares.isfinite().all():  # in half precision a step may overflow, which the optimizer leaves out, too
                self.squares += squares
            self.dense.grad = None

    def choose(self) -> None:
        """Chooses the entries of the largest mean squared gradient, over the processes, too."""
        assert self.squares is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.squares)
        self.indices = self.squares.topk(len(self.indices)).indices.sort().values
        self.chosen, self.squares, self.dense = True, None, None

    def change(self, weight: Tensor) -> Tensor:
        """W + S; W as long as no entry is chosen."""
        if self.chosen:
            return weight.flatten().index_add(0, self.indices, self.values).view_as(weight)
        changed = weight + 0 * self.values.sum()  # part of the graph, as DDP wants of all that is trained
        return changed if self.dense is None else changed + self.dense

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds S·x to y."""
        x = inputs.rows()  # (B, N, columns)
        places = self.indices // x.shape[-1], self.indices % x.shape[-1]  # rows and columns (B, k) of the entries
        into, out_of = (place[:, None].expand(-1, x.shape[1], -1) for place in places)  # (B, N, k)
        y.scatter_add_(2, into, x.gather(2, out_of) * self.values[:, None])


class BinaryMask(Adaptation):
    """W ⊙ [scores > threshold]; scores get the gradient that the mask would (a straight-through estimate).

    Args:
        weight: What is masked.
        start: First value of the scores.
        threshold: What a score must exceed.
    """

    def __init__(self, weight: Tensor, start: float, threshold: float) -> None:
        super().__init__()
        self.start, self.threshold = start, threshold
        self.scores = nn.Parameter(torch.full_like(weight, start))

    def reset(self, weight: Tensor) -> None:
        """All scores the same."""
        nn.init.constant_(self.scores, self.start)

    def change(self, weight: Tensor) -> Tensor:
        """The masked weight; the second term is zero, and has the gradient of the scores."""
        return weight * (self.scores > self.threshold) + (self.scores - self.scores.detach()) * weight.detach()


class Scales(Adaptation):
    """A factor for each of the equal parts of a weight's rows.

    Args:
        weight: What is scaled (rows, *columns).
        parts: Number of parts.
    """

    def __init__(self, weight: Tensor, parts: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(weight.new_ones(parts))

    def reset(self, weight: Tensor) -> None:
        """All factors 1, so that nothing changes."""
        nn.init.ones_(self.factors)

    def change(self, weight: Tensor) -> Tensor:
        """The scaled parts."""
        parts = weight.reshape(len(self.factors), -1)  # (parts, numbers of a part)
        return (self.factors[:, None] * parts).view_as(weight)

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """The scaled parts of y."""
        y.unflatten(-1, (self.factors.shape[1], -1)).mul_(
            self.factors[:, None, :, None]
        )  # (B, N, parts, rows of a part)


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


def weight_below(module: nn.Module, attribute: str, adaptation: Adaptation) -> Tensor:
    """What an adaptation gets: its weight as the parametrizations before it give it.

    Args:
        module: The layer.
        attribute: Of its weight.
        adaptation: One of the weight's parametrizations.

    Returns:
        The weight (*shape).
    """
    chain: Any = module.parametrizations[attribute]  # type: ignore[index]
    weight: Any = (
        [chain.original] if chain.is_tensor else [getattr(chain, f"original{i}") for i in range(chain.ntensors)]
    )
    for parametrization in chain:
        if parametrization is adaptation:
            break
        weight = [parametrization(*weight)]
    result: Tensor = weight[0]
    return result
