"""LIFT: the entries of each weight that are largest in its best approximation of low rank are trained, and no others.

Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused Supervised
Fine-Tuning", ICML 2025 (arXiv:2506.00772).

    W' = W + D, where D trains at the k = (m + n)·r entries of a weight (m, n) that are largest in |U_r·Σ_r·V_rᵀ|

U·Σ·Vᵀ is the singular value decomposition of the present weight W'. The entries are chosen when a task starts, and
again every 200 steps. An entry that is not chosen again keeps its value and rests.

Deviations:
- The rank is 1 and not 128: these networks are smaller than language models, and a patch holds the entries.
- Entries are chosen again every 200 steps by default; the authors' configurations have 400 and 10.
- One rank serves the approximation and the count. The authors' code can take two.
- A fused weight of queries, keys and values is one matrix, and a convolution is flattened to (rows, columns).
- An optimizer's moments of entries that stay are kept, as in the authors' code, which deletes those of an entry that
  rests. Here they fade, as its gradient is 0, and move nothing; an entry that is chosen again starts from what is left.
- D has the size of the weight while it trains, and so have the optimizer's moments. The patch is sparse.
- Weight decay pulls towards the pretrained weight, not towards 0.
"""

from itertools import accumulate

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import EVERY_LAYER, Adaptation, WeightPiece
from recast_pl.methods.lora_xs import check_rank
from recast_pl.methods.piece import check_state

_LARGEST = 2**31 - 1  # what the int32 of a patch can count


def principal_entries(weight: Tensor, rank: int) -> Tensor:
    """The entries of a weight that are largest in magnitude in its best approximation of a rank.

    Args:
        weight: (m, *columns), n columns when flattened.
        rank: r, below m and n.

    Returns:
        Places of min((m + n)·r, m·n) entries in the flattened weight, ascending, on the weight's device.
    """
    matrix = weight.flatten(1).double().cpu().numpy()
    start = np.ones(min(matrix.shape))  # or the approximation would differ by rounding from call to call
    u, s, vt = svds(matrix, k=rank, v0=start)
    sizes = torch.from_numpy((u * s) @ vt).abs().flatten()
    places: Tensor = sizes.topk(min(sum(matrix.shape) * rank, len(sizes))).indices.sort().values
    return places.to(weight.device)


class PrincipalEntries(Adaptation):
    """W + D, where D receives a gradient at the chosen entries only."""

    chosen: Tensor

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.difference = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("chosen", torch.zeros_like(weight, dtype=torch.bool), persistent=False)
        self.before: Tensor | None = None
        """D before the optimizer's step; None between steps."""

    @property
    def count(self) -> int:
        """k, how many entries are chosen at a time."""
        size = self.difference.flatten(1).shape
        return min(sum(size) * self.rank, size.numel())

    def reset(self, weight: Tensor) -> None:
        """D = 0, and no entry is chosen."""
        nn.init.zeros_(self.difference)
        self.chosen.zero_()
        self.before = None

    def choose(self, weight: Tensor) -> None:
        """Chooses the entries by the present weight W + D, from W (*shape)."""
        self.place(principal_entries(weight + self.difference, self.rank))

    def place(self, places: Tensor) -> None:
        """Lets these entries (k,) of the flattened weight be the chosen ones."""
        self.chosen.zero_().view(-1)[places.to(self.chosen.device)] = True

    def hold(self) -> None:
        """Remembers D."""
        self.before = self.difference.detach().clone()

    def release(self) -> None:
        """Takes back what momentum or weight decay did to entries that are not chosen."""
        if self.before is not None:
            self.difference.copy_(torch.where(self.chosen, self.difference, self.before))
            self.before = None

    def change(self, weight: Tensor) -> Tensor:
        """W + D."""
        return weight + torch.where(self.chosen, self.difference, self.difference.detach())


class LIFT(WeightPiece[PrincipalEntries]):
    """LIFT (Liu et al., 2025): trains the entries that are largest in each weight's best approximation of low rank.

    Args:
        rank: r of the approximation; (m + n)·r entries of a weight (m, n) are trained at a time, or all if it has less.
        every: Steps after which the entries are chosen again, from the present weight.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the entries; None for that of the head. 2e-4 is that of the authors' runs with
            most of their models.

    Raises:
        MethodError: If the rank is below 1, or not below the number of rows and of columns of a target, if `every` is
            below 1, or if the targets have more than 2³¹ − 1 entries.
    """

    def __init__(
        self,
        rank: int = 1,
        every: int = 200,
        targets: tuple[str, ...] = EVERY_LAYER,
        learning_rate: float | None = 2e-4,
    ) -> None:
        super().__init__(targets, learning_rate)
        if every < 1:
            raise MethodError(f"LIFT: every={every} must be at least 1; a large number chooses only once")
        self.rank, self.every, self.steps = rank, every, 0

    @property
    def task_parameters(self) -> int:
        """How many entries are trained at a time."""
        return sum(entries.count for entries in self.adaptations.values())

    def adapt(self, name: str, weight: Tensor) -> PrincipalEntries:
        """Entries of the weight, none of which is chosen yet."""
        check_rank("LIFT", self.rank, name, weight)
        return PrincipalEntries(weight, self.rank)

    def attach(self, network: nn.Module) -> None:
        """Lets entries of every target train; raises a MethodError if there are too many to number."""
        super().attach(network)
        if sum(self._sizes()) > _LARGEST:
            raise MethodError(f"LIFT: the targets have {sum(self._sizes()):,} entries; choose at most {_LARGEST:,}")

    def begin_task(self) -> None:
        """Forgets what the previous task has changed."""
        super().begin_task()
        self.steps = 0

    @torch.no_grad()
    def begin_step(self, progress: float) -> None:
        """Chooses the entries at the first step and every so many steps, and remembers those that rest."""
        for name, entries in self.adaptations.items():
            if self.steps % self.every == 0:
                entries.choose(self._received(name, entries))
            entries.hold()
        self.steps += 1

    @torch.no_grad()
    def end_step(self) -> None:
        """Undoes the step where entries rest."""
        for entries in self.adaptations.values():
            entries.release()

    # -- the task's state ----------------------------------------------------------------------------------

    def task_state(self) -> dict[str, Tensor]:
        """Numbers and differences of the entries that have changed (k,); a number counts through all weights."""
        parts = [entries.difference.detach().flatten() for entries in self.adaptations.values()]
        places = [part.nonzero().flatten() for part in parts]
        indices = torch.cat([place + first for place, first in zip(places, self._firsts(), strict=True)])
        values = torch.cat([part[place] for part, place in zip(parts, places, strict=True)])
        return {"indices": indices.int().cpu(), "values": values.cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads numbers and differences; training that continues from them chooses entries again."""
        count = state["values"].numel() if "values" in state else 0
        check_state("LIFT", state, {"indices": (count,), "values": (count,)}, indices=torch.int32)
        indices, sizes = state["indices"].long(), self._sizes()
        if (indices.diff() <= 0).any() or not ((indices >= 0) & (indices < sum(sizes))).all():
            raise PatchError(
                f"the patch has entries of LIFT that do not ascend, or exceed {sum(sizes):,}; train the task again"
            )
        for entries, first, size in zip(self.adaptations.values(), self._firsts(), sizes, strict=True):
            own = (indices >= first) & (indices < first + size)
            difference = entries.difference.zero_().view(-1)
            difference[(indices[own] - first).to(difference.device)] = state["values"][own].to(difference)

    def training_state(self) -> dict[str, Tensor]:
        """The steps done, and the places of each weight's chosen entries (k,)."""
        places = {name: entries.chosen.flatten().nonzero().flatten() for name, entries in self.adaptations.items()}
        return {"steps": torch.tensor(self.steps)} | {f"chosen:{name}": chosen for name, chosen in places.items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads the steps and the places."""
        self.steps = int(state["steps"])
        for name, entries in self.adaptations.items():
            entries.place(state[f"chosen:{name}"])

    def _sizes(self) -> list[int]:
        """How many entries each weight has."""
        return [entries.difference.numel() for entries in self.adaptations.values()]

    def _firsts(self) -> list[int]:
        """The number of each weight's first entry."""
        return [0, *accumulate(self._sizes())][:-1]
