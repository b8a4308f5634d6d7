"""HAT."""

from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.piece import ADDED, Piece, Step, check_state


class Gate(nn.Module):
    """A mask on units, σ(s·e), that anneals from soft to hard.

    Args:
        units: Their number.
        hardest: s_max, the s of evaluation.
    """

    def __init__(self, units: int, hardest: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(units))
        self.hardest = self.scale = hardest

    def mask(self) -> Tensor:
        """The mask (units,); the gradient of e is compensated for the annealing (section 2.5 of the paper)."""
        e, s = self.embedding.detach(), self.scale
        slope = s * torch.sigmoid(s * e) * torch.sigmoid(-s * e)
        slope = slope * self.hardest / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.cosh() + 1)
        return self._hard(s) + slope * (self.embedding - e)  # the second term is zero, and has the gradient

    def final(self) -> Tensor:
        """The mask of evaluation (units,), without gradient."""
        return self._hard(self.hardest)

    def _hard(self, scale: float) -> Tensor:
        mask = torch.sigmoid(scale * self.embedding.detach())
        return mask * (mask > 1e-20)  # denormal numbers make processors many times slower


class HAT(Piece):
    """Hard attention to the task (Serrà et al., 2018): a mask on units for each task, and what they use is kept.

    Units are the hidden ones of MLPs and of residual blocks, between two layers in a row. Joins of the residual stream
    cannot be masked, and count as used by every task: after the first task, what neither leads into nor out of a
    masked unit stays as it is, normalisation included. A weight from unit j to unit i learns in proportion to
    1 − min(used_i, used_j), where used is the maximum of old tasks' masks; this holds for the optimizer's whole step,
    so that neither momentum nor weight decay can move what is kept. `FineTune` beside it trains the weights.

    Args:
        sparsity: λ, the weight of the term that keeps masks small.
        hardest: s_max; s rises from 1/s_max to s_max in each epoch.
        start: Mean of the normal distribution that a task's embeddings start from; its deviation is 1. At 0, as
            published for networks that start at random, half of the units of a pretrained network would be lost.
        learning_rate: Rate of the embeddings; None for that of the head.

    Raises:
        MethodError: If λ is negative, or s_max not above 1.
    """

    isolated = False

    def __init__(
        self, sparsity: float = 0.75, hardest: float = 400.0, start: float = 2.0, learning_rate: float | None = 5e-2
    ) -> None:
        super().__init__(learning_rate)
        if sparsity < 0 or hardest <= 1:
            raise MethodError(f"HAT: sparsity={sparsity} must not be negative, and hardest={hardest} above 1")
        self.sparsity, self.hardest, self.start = sparsity, hardest, start
        self.gates: dict[str, Gate] = {}
        self.used: dict[str, Tensor] = {}
        """For each gate the maximum of old tasks' masks (units,); empty before the first task has ended."""
        self._network = nn.Module()
        self._weights: dict[str, nn.Parameter] = {}
        self._into: dict[str, str] = {}  # name of a weight, to the gate on the units it leads into
        self._from: dict[str, str] = {}  # and to that on the units it comes from
        self._before: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> None:
        """Puts a gate between every two layers in a row.

        Raises:
            MethodError: If there are none.
        """
        self._network = network
        self._find_weights()
        for path, block in list(network.named_modules()):
            for first, between, second in _ROWS:
                layers = [getattr(block, name, None) for name in (first, second)]
                if all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
                    self._gate(path, block, first, between, second)
        if not self.gates:
            raise MethodError("HAT finds no two layers in a row whose units it could mask; use a ViT or a ResNet")
        self.parameters = {f"{name}:embedding": gate.embedding for name, gate in self.gates.items()}
        self.begin_task()

    @torch.no_grad()
    def begin_task(self) -> None:
        """New embeddings."""
        for gate in self.gates.values():
            nn.init.normal_(gate.embedding, self.start)

    def begin_fit(self) -> None:
        """Takes what is kept to where the masks are, and finds all weights that other pieces train."""
        self._find_weights()
        self.used = {name: used.to(self.gates[name].embedding.device) for name, used in self.used.items()}

    def begin_step(self, progress: float) -> None:
        """Anneals, and remembers the weights of old tasks."""
        for gate in self.gates.values():
            gate.scale = 1 / self.hardest + (self.hardest - 1 / self.hardest) * progress
        if self.used:
            self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def loss(self, step: Step) -> Tensor:
        """λ·Σ a·(1 − used) / Σ (1 − used) over all units."""
        masks = torch.cat([gate.mask() for gate in self.gates.values()])
        free = torch.cat([1 - self.used.get(name, torch.zeros_like(g.embedding)) for name, g in self.gates.items()])
        return self.sparsity * (masks * free).sum() / free.sum().clamp_min(1e-6)

    @torch.no_grad()
    def end_step(self) -> None:
        """Takes back what the step did to weights in use; masks are those of evaluation until the next step."""
        for name, before in self._before.items():
            weight = self._weights[name]
            weight.copy_(torch.lerp(before, weight, self.freedom(name).to(weight.dtype).expand_as(weight)))
        self._before = {}
        for gate in self.gates.values():
            gate.embedding.clamp_(-6, 6)
            gate.scale = self.hardest

    def freedom(self, name: str) -> Tensor:
        """1 − min(used_i, used_j) of a weight, of a shape that expands to that of the weight.

        Args:
            name: Name of the weight.
        """
        weight = self._weights[name]
        rest = weight.new_tensor(float(bool(self.used)))
        into, out_of = (self.used.get(of.get(name, ""), rest) for of in (self._into, self._from))
        trailing = [1] * (weight.ndim - 1)
        if into.ndim:
            into = into.view(-1, *trailing)  # (rows, 1, ...)
        if out_of.ndim:
            out_of = out_of.view(-1, *trailing[1:])  # (columns, 1, ...)
        return 1 - torch.minimum(into, out_of)

    def end_task(self) -> None:
        """The task's units are in use from now on."""
        for name, gate in self.gates.items():
            mask = gate.final()
            self.used[name] = torch.maximum(self.used.get(name, mask).to(mask.device), mask)

    def task_state(self) -> dict[str, Tensor]:
        """The embeddings."""
        return self._copies()

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes the embeddings back."""
        self._load(state, self.parameters)

    def shared_state(self) -> dict[str, Tensor]:
        """What is in use."""
        return {name: used.cpu().clone() for name, used in self.used.items()}

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes it back."""
        check_state("HAT", state, {name: tuple(gate.embedding.shape) for name, gate in self.gates.items()})
        self.used = dict(state)

    def _find_weights(self) -> None:
        own = {id(gate.embedding) for gate in self.gates.values()}
        trained = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        self._weights = {name: p for name, p in trained.items() if id(p) not in own}

    def _gate(self, path: str, block: nn.Module, first: str, between: str, second: str) -> None:
        layer, following = getattr(block, first), getattr(block, second)
        gate = Gate(len(layer.weight), self.hardest)
        following.add_module(ADDED, gate)
        following.register_forward_pre_hook(_mask_units)
        name = f"{path}.{second}".lstrip(".")
        self.gates[name] = gate
        for part in (f"{first}.weight", f"{first}.bias", f"{between}.weight", f"{between}.bias"):
            self._into[f"{path}.{part}".lstrip(".")] = name
        self._from[f"{name}.weight"] = name


_ROWS = (
    ("fc1", "norm", "fc2"),  # timm's MLP
    ("0", "none", "3"),  # torchvision's MLP
    ("conv1", "bn1", "conv2"),
    ("conv2", "bn2", "conv3"),
)
"""Layers in a row within a block: the first, a normalisation of its output if there is one, the second."""


def _mask_units(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mask: Tensor = module.get_submodule(ADDED).mask()
    x, *rest = args
    return x * (mask[:, None, None] if isinstance(module, nn.Conv2d) else mask).to(x.dtype), *rest
