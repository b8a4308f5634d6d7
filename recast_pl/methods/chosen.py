"""Chosen directions: each task trains the few entries that its own gradient chooses, wherever in the network they are.

    W' = W + U_r·Σ_r·R·V_rᵀ, where R is 0 but for chosen entries; all weights together have k of them

U·Σ·Vᵀ is the singular value decomposition of W, cut off after the r leading directions. When a task starts, all R are 0
and its head is solved. The entries with the largest absolute gradient of the task's loss are chosen; of equal ones,
those with the larger sum of squared gradients of batches. It is not from a paper.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.errors import MethodError, PatchError
from recast_pl.methods.adaptation import EVERY_LAYER, WeightPiece
from recast_pl.methods.lora_xs import SingularDirections, add_product, check_rank
from recast_pl.methods.piece import check_state, sum_over_processes


class ChosenCore(SingularDirections):
    """W + UΣ·R·Vᵀ, where R holds trained values at chosen places, and 0 elsewhere.

    Args:
        weight: The weight to change (rows, *columns).
        rank: r.
        diagonal: Whether R is diagonal.
        values: The chosen entries of all weights together (k,).
        first: The number of this weight's first entry; the entries of all weights are numbered one after another.
    """

    places: Tensor

    def __init__(self, weight: Tensor, rank: int, diagonal: bool, values: nn.Parameter, first: int) -> None:
        super().__init__(weight, rank, diagonal)
        self.values, self.first = values, first
        self.size = torch.Size(self.shape).numel()
        places = torch.full((len(values),), self.size, device=weight.device)
        self.register_buffer("places", places, persistent=False)
        self.own = places[:0]
        """Which of the chosen entries are of this weight (m,)."""
        self.candidates: Tensor | None = None
        """All entries (*shape) while the gradient chooses some of them; None at other times."""

    def reset(self, weight: Tensor) -> None:
        """R = 0, so that nothing changes."""
        nn.init.zeros_(self.values)

    def place(self, indices: Tensor) -> None:
        """Takes over which entries are chosen, by their numbers (k,)."""
        places = self.places_of(indices)
        self.places.copy_(places)
        self.own = torch.where(places < self.size)[0].to(self.places.device)

    def places_of(self, indices: Tensor) -> Tensor:
        """Places within R of entries by number (…, k); `size` for an entry of another weight."""
        places = indices - self.first
        return places.where((places >= 0) & (places < self.size), self.size)

    def numbers(self) -> Tensor:
        """R (*shape), or one for each of B samples (B, *shape)."""
        if self.candidates is not None:
            return self.candidates
        start = self.values.new_zeros(*self.places.shape[:-1], self.size + 1)  # the last for entries of other weights
        numbers: Tensor = start.scatter_add(-1, self.places, self.values)[..., :-1].unflatten(-1, self.shape)
        return numbers

    def change(self, weight: Tensor) -> Tensor:
        """The changed weight; itself, in no time, if none of its entries is chosen."""
        entries = self._entries()
        if entries is None:
            return super().change(weight)
        lefts, rights, values = entries
        return weight + ((self.left[:, lefts] * values) @ self.right[rights]).view_as(weight) if len(lefts) else weight

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Adds UΣ·R·Vᵀ·x to y."""
        entries = self._entries()
        if entries is None:
            super().product(inputs, y)
            return
        lefts, rights, values = entries
        if len(lefts):
            add_product(y, inputs.times(self.right[rights]) * values, self.left[:, lefts].T)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The m chosen entries of this weight.

        Returns:
            Their rows (m,) and columns (m,) in R, and their values (m,); or those that any of B samples has, and values
            (B, 1, m). None if all entries are to be used, because there are more than directions.
        """
        rank = len(self.right)
        if self.candidates is not None or torch.compiler.is_exporting():  # a graph does not know how many there are
            return None
        if self.places.ndim == 1:
            # a mixed batch loads places alone, without gradients
            own = self.own if torch.is_grad_enabled() else torch.where(self.places < self.size)[0]
            places, values = self.places[own], self.values[own]
        else:
            places = self.places[self.places < self.size].unique()
            values = self.numbers().flatten(1)[:, None, places]
        if len(places) > rank:
            return None
        return (places, places, values) if len(self.shape) == 1 else (places // rank, places % rank, values)


class Chosen(WeightPiece[ChosenCore]):
    """Trains the entries between leading singular directions of all weights that matter most to the task.

    Args:
        count: k, the number of entries of all weights together.
        rank: r, the number of directions of each weight to choose from.
        diagonal: Whether to choose from the r directions σuvᵀ of each weight; otherwise from all r² terms σ_a·u_a·v_bᵀ.
        batches: How many batches of evenly spaced training images the gradient sees; None for all images.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the entries; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or not below the number of rows and of columns of a target, if there are
            fewer entries than `count`, or if `count` or `batches` is below 1.
    """

    def __init__(
        self,
        count: int = 48,
        rank: int = 16,
        diagonal: bool = True,
        batches: int | None = 8,
        targets: tuple[str, ...] = EVERY_LAYER,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if count < 1 or (batches is not None and batches < 1):
            raise MethodError(f"Chosen: count={count} and batches={batches} must be at least 1")
        self.count, self.rank, self.diagonal, self.batches = count, rank, diagonal, batches
        self.values = nn.Parameter(torch.zeros(count))
        self.indices = torch.arange(count)
        """Numbers of the chosen entries (k,), ascending; the first k before a choice."""

    @property
    def total(self) -> int:
        """How many entries there are to choose from."""
        return sum(core.size for core in self.adaptations.values())

    def adapt(self, name: str, weight: Tensor) -> ChosenCore:
        """Entries between the leading singular directions of the weight."""
        check_rank("Chosen", self.rank, name, weight)
        self.values.data = self.values.data.to(weight)
        return ChosenCore(weight, self.rank, self.diagonal, self.values, self.total)

    def attach(self, network: nn.Module) -> None:
        """Puts a core on every target; raises a MethodError if they have too few entries."""
        super().attach(network)
        self.parameters = {"values": self.values}  # which all weights share
        if self.count > self.total:
            raise MethodError(f"Chosen: count={self.count} exceeds the {self.total} entries of the targets; lower it")

    def begin_task(self) -> None:
        """Forgets the entries of the previous task."""
        super().begin_task()
        self._place(torch.arange(self.count))

    @torch.enable_grad()
    def begin_training(self, head: nn.Linear) -> None:
        """Chooses the entries."""
        cores = list(self.adaptations.values())
        for core in cores:
            core.candidates = self.values.new_zeros(core.shape, requires_grad=True)
        backbone, inputs = self.learner.current()[0], [core.candidates for core in cores]
        sums = torch.zeros(2, self.total, device=self.values.device)  # of gradients, and of their squares
        for images, labels in self._sample():
            features = backbone(images).to(head.weight.dtype)
            loss = len(labels) * self.learner.loss(head(features), labels)
            gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)  # type: ignore[arg-type]
            gradient = torch.cat([part.flatten() for part in gradients])
            sums += torch.stack([gradient, gradient.square()])
        for core in cores:
            core.candidates = None
        sum_over_processes(sums)  # all saw the same images, but may differ by rounding
        order = sums[1].argsort(descending=True, stable=True)
        order = order[sums[0].abs()[order].argsort(descending=True, stable=True)]
        self._place(order[: self.count].sort().values)

    def _sample(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of evenly spaced training images, and their labels; a split lists images by class."""
        step = 1 if self.batches is None else -(-self.learner.batch_count("train") // self.batches)
        parts = self._every(step)
        while group := list(islice(parts, step)):
            images, labels = (torch.cat(part) for part in zip(*group, strict=True))
            if len(labels):
                yield images, labels

    def _every(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One of `step` training images: those of each batch, which may be none, and their labels."""
        seen = 0
        for images, labels in self.learner.batches("train"):
            which = torch.arange(-seen % step, len(labels), step, device=labels.device)
            yield images[which], labels[which]
            seen += len(labels)

    @torch.no_grad()
    def _place(self, indices: Tensor) -> None:
        """Takes over the numbers of the chosen entries (k,)."""
        self.indices = indices.cpu()
        for core in self.adaptations.values():
            core.place(self.indices)

    # -- the task's state ----------------------------------------------------------------------------------

    def task_state(self) -> dict[str, Tensor]:
        """The values (k,), and the numbers of their entries, of as many bytes as the largest needs (k, bytes)."""
        encoded = (self.indices[:, None] // self._bases() % 256).to(torch.uint8)
        return {"indices": encoded, "values": self.values.detach().cpu().clone()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads numbers and values."""
        shapes = {"indices": (self.count, len(self._bases())), "values": (self.count,)}
        check_state("Chosen", state, shapes, indices=torch.uint8)
        indices = self._decoded(state["indices"])
        if int(indices[-1]) >= self.total or (indices.diff() <= 0).any():
            raise PatchError(
                f"the patch has entries of Chosen that do not ascend, or exceed {self.total:,}; train the task again"
            )
        self._place(indices)
        self.values.copy_(state["values"])

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Values of T tasks (T, k), and their places in each weight (T, k)."""
        indices = self._decoded(states["indices"])
        places = {core.places: core.places_of(indices) for core in self.adaptations.values()}
        return places | {self.values: states["values"].to(self.values.dtype)}

    def training_state(self) -> dict[str, Tensor]:
        """The numbers of the chosen entries."""
        return {"indices": self.indices}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads the numbers of the chosen entries."""
        self._place(state["indices"])

    def _bases(self) -> Tensor:
        """What each byte of a number counts, lowest first."""
        return 256 ** torch.arange(max(1, -(-(self.total - 1).bit_length() // 8)))

    def _decoded(self, encoded: Tensor) -> Tensor:
        """Numbers (…, k) from their bytes (…, k, bytes)."""
        return (encoded.long() * self._bases()).sum(-1)
