"""Growth (experimental): what the first tasks train at low rank becomes templates for later tasks.

    W' = W + Σ_j c_j · B_j·A_j over the templates (A_j, B_j) that earlier tasks have left

It is not from a paper, and brought no gain in our measurements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError, PatchError
from recast_pl.files import fingerprint
from recast_pl.methods.adaptation import CONVOLUTIONS, MLP, WeightPiece
from recast_pl.methods.lora import LowRank
from recast_pl.methods.piece import ParameterGroup, check_state


class Grown(LowRank):
    """W + Σ_j c_j·B_j·A_j over the templates in use, and + B·A while one more is trained; all of the same rank."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__(weight, rank, 1.0, None)
        self.rank, self.growing = rank, False
        # frozen parameters, not buffers: DDP broadcasts buffers at every step
        self.left = nn.Parameter(weight.new_zeros(len(weight), 0), requires_grad=False)
        self.right = nn.Parameter(weight.new_zeros(0, weight[0].numel()), requires_grad=False)
        self.coefficients = nn.Parameter(weight.new_zeros(0), requires_grad=False)

    @property
    def size(self) -> int:
        """Numbers of a template, r·(rows + columns)."""
        return self.A.numel() + self.B.numel()

    def use(self, templates: Sequence[Tensor], coefficients: Tensor, growing: bool) -> None:
        """Holds exactly these templates, so that later ones do not change a task in a single bit.

        Args:
            templates: The entries of each one's B, then of its A (size,).
            coefficients: One for each (m,).
            growing: Whether B·A is added, and trained.
        """
        split = [template.to(self.A).split([self.B.numel(), self.A.numel()]) for template in templates]
        self.left.data = torch.cat([self.left[:, :0], *(b.view(-1, self.rank) for b, _ in split)], 1)
        self.right.data = torch.cat([self.right[:0], *(a.view(self.rank, -1) for _, a in split)])
        # a new parameter, because the optimizer of the previous task knows the old one
        self.coefficients = nn.Parameter(coefficients.to(self.A), requires_grad=len(coefficients) > 0)
        self.growing = growing

    def change(self, weight: Tensor) -> Tensor:
        """The weight with its templates; itself while there are none."""
        if len(self.coefficients):
            left = self.left * self.coefficients.repeat_interleave(self.rank)  # (rows, m·r)
            weight = weight + (left @ self.right).view_as(weight)
        return super().change(weight) if self.growing else weight


class Growth(WeightPiece[Grown]):
    """Experimental, not in the paper: what the first tasks train at low rank becomes templates for later tasks.

    Each of the first tasks trains a low-rank update B·A of every target beside everything else. When it ends, the
    update becomes a template, which no longer changes and which the task uses with coefficient 1. Later tasks train a
    coefficient for each template, starting from 0. So a task depends only on the tasks before it.

    Args:
        tasks: How many tasks leave a template.
        rank: r, of each template.
        targets: Regular expressions for names of weights, those of `Recast` or others.
        learning_rate: Learning rate of the coefficients; None for that of the head. Ten times that works well.
        growing_rate: Learning rate of B and A; None for that of the head.

    Raises:
        MethodError: If `tasks` or the rank is below 1.
    """

    isolated = False

    def __init__(
        self,
        tasks: int = 1,
        rank: int = 1,
        targets: tuple[str, ...] = (MLP, CONVOLUTIONS),
        learning_rate: float | None = None,
        growing_rate: float | None = None,
    ) -> None:
        if min(tasks, rank) < 1:
            raise MethodError(f"Growth: tasks={tasks} and rank={rank} must be at least 1; or remove the piece")
        super().__init__(targets, learning_rate)
        self.tasks, self.rank, self.growing_rate = tasks, rank, growing_rate
        self.templates: list[Tensor] = []
        """For each task that has left templates their factors, target after target (Σ r·(rows + columns),)."""

    def adapt(self, name: str, weight: Tensor) -> Grown:
        """A weight that can use templates, and grow one."""
        return Grown(weight, self.rank)

    @torch.no_grad()
    def begin_task(self) -> None:
        """Coefficients of all templates are 0; B = 0 if the task is to leave a template."""
        growing, count = len(self.templates) < self.tasks, len(self.templates)
        if growing:  # otherwise no number is drawn, so that heads start as they would without this piece
            super().begin_task()
        self._use(torch.zeros(len(self.adaptations), count), growing)
        self.parameters = {}
        for name, grown in self.adaptations.items():
            grown.zero_grad()
            grown.A.requires_grad_(growing)
            grown.B.requires_grad_(growing)
            trained = {key: p for key, p in grown.named_parameters() if p.requires_grad}
            self.parameters |= {f"{name}:{key}": p for key, p in trained.items()}

    def groups(self) -> list[ParameterGroup]:
        """Coefficients and factors, each at a learning rate of its own."""
        mixing = [p for name, p in self.parameters.items() if name.endswith(":coefficients")]
        factors = [p for name, p in self.parameters.items() if not name.endswith(":coefficients")]
        named = ((self.name, self.learning_rate, mixing), (f"{self.name} factors", self.growing_rate, factors))
        return [ParameterGroup(*group) for group in named if group[2]]

    @torch.no_grad()
    def end_task(self) -> None:
        """Turns what has grown into a template, which the task uses with coefficient 1."""
        grown = list(self.adaptations.values())
        if grown[0].growing:
            before = torch.stack([g.coefficients.detach() for g in grown]).cpu()  # (targets, m)
            self.templates.append(torch.cat([factor.flatten() for g in grown for factor in (g.B, g.A)]).cpu())
            self._use(torch.cat([before, torch.ones(len(grown), 1)], 1), growing=False)

    def task_state(self) -> dict[str, Tensor]:
        """The coefficients, target after target (targets·m,), and the templates' SHA-256; empty without templates."""
        coefficients = torch.cat([grown.coefficients.detach() for grown in self.adaptations.values()]).cpu()
        count = len(coefficients) // len(self.adaptations)
        return {"coefficients": coefficients, "templates": self._digest(count)} if count else {}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads the coefficients; raises a PatchError if the task was trained with other templates."""
        targets = len(self.adaptations)
        count = state["coefficients"].numel() // targets if "coefficients" in state else 0
        shapes = {"coefficients": (targets * count,), "templates": (32,)} if count else {}
        check_state("Growth", state, shapes, templates=torch.uint8)
        if count and (count > len(self.templates) or not torch.equal(state["templates"], self._digest(count))):
            needed, there = (bytes(d.tolist()).hex()[:12] for d in (state["templates"], self._digest(count)))
            raise PatchError(
                f"the patch needs {count} grown templates {needed}…, here are {len(self.templates)} ({there}…); "
                "use it with the shared state of its own run"
            )
        self._use(state.get("coefficients", torch.zeros(0)).view(targets, count), growing=False)

    def shared_state(self) -> dict[str, Tensor]:
        """The templates, in the order in which they have grown."""
        return {f"template{index}": template.clone() for index, template in enumerate(self.templates)}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads the templates."""
        size = sum(grown.size for grown in self.adaptations.values())
        check_state("Growth", state, {f"template{index}": (size,) for index in range(len(state))})
        self.templates = [state[f"template{index}"] for index in range(len(state))]

    def _use(self, coefficients: Tensor, growing: bool) -> None:
        """Makes every target use as many of the first templates as it has coefficients (targets, m)."""
        grown = list(self.adaptations.values())
        used = self.templates[: coefficients.shape[1]]
        parts = [template.split([g.size for g in grown]) for template in used]
        for index, (each, row) in enumerate(zip(grown, coefficients, strict=True)):
            each.use([part[index] for part in parts], row, growing)

    def _digest(self, count: int) -> Tensor:
        """SHA-256 of the first templates (32,)."""
        digest = fingerprint({f"{index:06}": template for index, template in enumerate(self.templates[:count])})
        return torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)
