"""Sparse adaptation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import CONVOLUTIONS, MLP, Adaptation, WeightPiece
from recast_pl.methods.piece import check_state


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


class RoSA(WeightPiece):
    """The sparse part of robust adaptation (Nikdan et al., 2024): W + S, S free on the entries that matter most.

    The entries are those of the largest mean squared gradient over the first steps of the task, during which the rest
    of the method warms up. After `LoRA` in the list of pieces it is RoSA in full; alone it is sparse adaptation.

    Args:
        density: Fraction of each weight's entries, rounded down.
        warm_up: Steps before the entries are chosen.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the entries; None for that of the head.

    Raises:
        MethodError: If the density is not in (0, 1], or leaves a weight without an entry.
    """

    def __init__(
        self,
        density: float = 1e-5,
        warm_up: int = 8,
        targets: tuple[str, ...] = (MLP, CONVOLUTIONS),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if not 0 < density <= 1 or warm_up < 1:
            raise MethodError(f"RoSA: density={density} must be in (0, 1], and warm_up={warm_up} at least 1")
        self.density, self.warm_up, self.steps = density, warm_up, 0

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """⌊density·numel⌋ entries."""
        count = int(self.density * weight.numel())
        if not count:
            raise MethodError(
                f"RoSA: density={self.density} leaves no entry of {name} with {weight.numel():,}; raise the density"
            )
        return Sparse(weight, count)

    def begin_task(self) -> None:
        """Forgets the entries chosen for the task before."""
        super().begin_task()
        self.steps = 0

    def begin_step(self, progress: float) -> None:
        """Watches gradients, and chooses the entries when the warm-up is over."""
        if self.steps <= self.warm_up:
            self._watch()
        if self.steps == self.warm_up:
            for sparse in self._sparse():
                sparse.choose()
        self.steps += 1

    def task_state(self) -> dict[str, Tensor]:
        """Places and values of the entries, weight after weight (Σ k,)."""
        values = torch.cat([sparse.values.detach() for sparse in self._sparse()]).cpu()
        return {"indices": torch.cat([sparse.indices for sparse in self._sparse()]).int().cpu(), "values": values}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes places and values back."""
        counts = [len(sparse.indices) for sparse in self._sparse()]
        check_state("RoSA", state, {"indices": (sum(counts),), "values": (sum(counts),)})
        parts = zip(state["indices"].split(counts), state["values"].split(counts), strict=True)
        for (name, sparse), (indices, values) in zip(self._named_sparse(), parts, strict=True):
            if int(indices.min()) < 0 or int(indices.max()) >= sparse.size:
                raise PatchError(f"the patch has an entry outside of {name} with {sparse.size:,}; learn the task anew")
            sparse.reset(values)
            sparse.chosen = True
            sparse.indices.copy_(indices)
            sparse.values.copy_(values)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Places and values of T tasks (T, k) for each weight."""
        counts = [len(sparse.indices) for sparse in self._sparse()]
        indices, values = (states[name].split(counts, 1) for name in ("indices", "values"))
        of_places = {sparse.indices: part.long() for sparse, part in zip(self._sparse(), indices, strict=True)}
        return of_places | {sparse.values: part for sparse, part in zip(self._sparse(), values, strict=True)}

    def training_state(self) -> dict[str, Tensor]:
        """Steps done, and the entries or, before they are chosen, what they will be chosen by."""
        if 0 < self.steps <= self.warm_up:
            self._watch()
        named = self._named_sparse()
        entries = {f"indices:{name}": sparse.indices for name, sparse in named if sparse.chosen}
        sums = {f"squares:{name}": sparse.squares for name, sparse in named if sparse.squares is not None}
        return {"steps": torch.tensor(self.steps)} | entries | sums

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes the steps, and entries or sums, back."""
        self.steps = int(state["steps"])
        for name, sparse in self._named_sparse():
            sparse.chosen, sparse.dense = f"indices:{name}" in state, None
            sparse.squares = state.get(f"squares:{name}")
            sparse.indices = state.get(f"indices:{name}", sparse.indices).to(sparse.values.device)

    def _watch(self) -> None:
        for name, sparse in self._named_sparse():
            module, attribute = self._sites[name]
            sparse.watch(getattr(module, attribute).shape)

    def _named_sparse(self) -> list[tuple[str, Sparse]]:
        return [(name, a) for name, a in self.adaptations.items() if isinstance(a, Sparse)]

    def _sparse(self) -> list[Sparse]:
        return [sparse for _, sparse in self._named_sparse()]
