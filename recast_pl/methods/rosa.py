"""RoSA: a sparse update of each weight, on the entries whose gradients are largest.

Nikdan et al., "RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation", ICML 2024.

    W' = W + B·A + S, where S has k = ⌊density · entries of W⌋ entries that are not zero

`RoSA` is S; listed beside `LoRA` it is the full method. The k entries are those of the largest mean squared gradient of
S over the first steps of each task, in which the low-rank part trains already.

RECAST prints its combination with RoSA as W + S ⊙ W + B·A (equation 10), which `relative` computes. The text there
calls S a binary mask; here its k entries are trained, because a mask alone would have nothing to train.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import CONVOLUTIONS, MLP, Adaptation, WeightPiece
from recast_pl.methods.piece import check_state, sum_over_processes


class Sparse(Adaptation):
    """W + S, where S is zero except for k = `count` entries, chosen by the gradients of all."""

    indices: Tensor

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("indices", torch.zeros(count, dtype=torch.long, device=weight.device), persistent=False)
        self.values, self.shape = nn.Parameter(weight.new_zeros(count)), weight.shape
        self.chosen = False
        self.squares: Tensor | None = None
        """Sum over the observed steps of every entry's squared gradient (size,); None before the first."""
        self.dense: Tensor | None = None
        """Zeros (*shape) added to the weight during the warm-up, so that they receive its gradient."""

    def reset(self, weight: Tensor) -> None:
        """No entry is chosen."""
        nn.init.zeros_(self.values)
        self.chosen, self.squares, self.dense = False, None, None

    def observe(self) -> None:
        """Adds the gradient of the previous step to the sums; call it before each step of the warm-up."""
        device, size = self.values.device, self.shape.numel()
        self.squares = torch.zeros(size, device=device) if self.squares is None else self.squares.to(device)
        if self.dense is None:
            self.dense = torch.zeros(self.shape, device=device, requires_grad=True)
        elif self.dense.grad is not None:
            squares = self.dense.grad.flatten().square()
            if squares.isfinite().all():  # the optimizer, too, skips a step that overflows in half precision
                self.squares += squares
            self.dense.grad = None

    def choose(self) -> None:
        """Chooses the entries of the largest mean squared gradient over all processes."""
        assert self.squares is not None
        sum_over_processes(self.squares)
        self.indices = self.squares.topk(len(self.indices)).indices.sort().values
        self.chosen, self.squares, self.dense = True, None, None

    def change(self, weight: Tensor) -> Tensor:
        """W + S; W before entries are chosen."""
        if self.chosen:
            return weight.flatten().index_add(0, self.indices, self.values).view_as(weight)
        changed = weight + 0 * self.values.sum()  # DDP needs every trained parameter in the graph
        return changed if self.dense is None else changed + self.dense

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds S·x to y."""
        x = inputs.rows()  # (B, N, columns)
        places = self.indices // x.shape[-1], self.indices % x.shape[-1]  # rows and columns (B, k) of the entries
        into, out_of = (place[:, None].expand(-1, x.shape[1], -1) for place in places)  # (B, N, k)
        y.scatter_add_(2, into, x.gather(2, out_of) * self.values[:, None])


class RelativeSparse(Sparse):
    """W + S ⊙ W: S scales the chosen entries instead of moving them; arguments as for `Sparse`."""

    def change(self, weight: Tensor) -> Tensor:
        """W + S ⊙ W; W before entries are chosen."""
        return weight + super().change(torch.zeros_like(weight)) * weight


class RoSA(WeightPiece[Sparse]):
    """The sparse part of robust adaptation (Nikdan et al., 2024): W + S, S free on the entries that matter most.

    After `LoRA` in the list of pieces it is the full RoSA; alone it is sparse adaptation.

    Args:
        density: Fraction of each weight's entries, rounded down.
        warm_up: Steps before the entries are chosen.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the entries; None for that of the head.
        relative: Whether S multiplies the weight, W + S ⊙ W, as in equation 10 of RECAST's paper. W is what the pieces
            before it give, so list it before `LoRA`.

    Raises:
        MethodError: If the density is not in (0, 1], or leaves a weight without an entry.
    """

    def __init__(
        self,
        density: float = 1e-5,
        warm_up: int = 8,
        targets: tuple[str, ...] = (MLP, CONVOLUTIONS),
        learning_rate: float | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(targets, learning_rate)
        self.adaptation = RelativeSparse if relative else Sparse
        if not 0 < density <= 1 or warm_up < 1:
            raise MethodError(f"RoSA: density={density} must be in (0, 1], and warm_up={warm_up} at least 1")
        self.density, self.warm_up, self.steps = density, warm_up, 0

    def adapt(self, name: str, weight: Tensor) -> Sparse:
        """⌊density·numel⌋ entries."""
        count = int(self.density * weight.numel())
        if not count:
            raise MethodError(
                f"RoSA: density={self.density} leaves no entry of {name}, which has {weight.numel():,}; "
                "raise the density"
            )
        return self.adaptation(weight, count)

    def begin_task(self) -> None:
        """Forgets the entries of the previous task."""
        super().begin_task()
        self.steps = 0

    def begin_step(self, progress: float) -> None:
        """Observes gradients, and chooses the entries at the end of the warm-up."""
        for sparse in self.adaptations.values():
            if self.steps <= self.warm_up:
                sparse.observe()
            if self.steps == self.warm_up:
                sparse.choose()
        self.steps += 1

    def task_state(self) -> dict[str, Tensor]:
        """Indices and values of the entries, weight after weight (Σ k,)."""
        indices = torch.cat([sparse.indices for sparse in self.adaptations.values()])
        values = torch.cat([sparse.values.detach() for sparse in self.adaptations.values()])
        return {"indices": indices.int().cpu(), "values": values.cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads indices and values; training that continues from them keeps the indices."""
        self.steps = self.warm_up + 1
        counts = [len(sparse.indices) for sparse in self.adaptations.values()]
        check_state("RoSA", state, {"indices": (sum(counts),), "values": (sum(counts),)}, indices=torch.int32)
        parts = zip(state["indices"].split(counts), state["values"].split(counts), strict=True)
        for (name, sparse), (indices, values) in zip(self.adaptations.items(), parts, strict=True):
            size = sparse.shape.numel()
            if int(indices.min()) < 0 or int(indices.max()) >= size:
                raise PatchError(f"the patch has an entry outside of {name}, which has {size:,}; train the task again")
            sparse.reset(values)
            sparse.chosen = True
            sparse.indices.copy_(indices)
            sparse.values.copy_(values)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Indices and values of T tasks (T, k) for each weight."""
        sparse = list(self.adaptations.values())
        counts = [len(each.indices) for each in sparse]
        indices, values = (states[name].split(counts, 1) for name in ("indices", "values"))
        placed = {each.indices: part.long() for each, part in zip(sparse, indices, strict=True)}
        return placed | {each.values: part.to(each.values.dtype) for each, part in zip(sparse, values, strict=True)}

    def training_state(self) -> dict[str, Tensor]:
        """The steps done, and the chosen entries or, during the warm-up, the sums of squared gradients."""
        state = {"steps": torch.tensor(self.steps)}
        for name, sparse in self.adaptations.items():
            if 0 < self.steps <= self.warm_up:
                sparse.observe()
            if sparse.chosen:
                state[f"indices:{name}"] = sparse.indices
            if sparse.squares is not None:
                state[f"squares:{name}"] = sparse.squares
        return state

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads the steps, and entries or sums."""
        self.steps = int(state["steps"])
        for name, sparse in self.adaptations.items():
            sparse.chosen, sparse.dense = f"indices:{name}" in state, None
            sparse.squares = state.get(f"squares:{name}")
            sparse.indices = state.get(f"indices:{name}", sparse.indices).to(sparse.values.device)
