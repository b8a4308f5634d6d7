"""HAT: a mask on units for each task; what the masks of earlier tasks use is protected.

Serrà et al., "Overcoming Catastrophic Forgetting with Hard Attention to the Task", ICML 2018.

    mask a = sigmoid(s · e); s rises from 1/s_max to s_max in each epoch
    step of the weight from unit j to unit i ∝ 1 − min(used_i, used_j), with used = maximum of earlier tasks' masks
    loss = cross-entropy + λ · Σ a·(1 − used) / Σ (1 − used)

The gradient of e is compensated for the annealing, and e is kept within ±6 (section 2.5).

Deviations:
- Embeddings start around 2. With 0, as published, a pretrained network would lose half of its units at once.
- The protection scales the optimizer's step, not the gradient, so that momentum and weight decay move nothing.
- Sums of the residual stream cannot be masked and count as used by every task. So weights that lead neither into nor
  out of a masked unit stay fixed after the first task, normalisation included.
"""

from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.addition import extend
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import ADDED, Step, check_state, copies


class UnitMask(nn.Module):
    """A mask on units, σ(s·e), that anneals from soft to hard; `hardest` is s_max, the s of evaluation."""

    def __init__(self, units: int, hardest: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(units))
        self.hardest = self.scale = hardest

    def mask(self) -> Tensor:
        """The mask (units,), with the compensated gradient of e."""
        e, s = self.embedding.detach(), self.scale
        slope = s * torch.sigmoid(s * e) * torch.sigmoid(-s * e)
        slope = slope * self.hardest / s * ((s * e).clamp(-50, 50).cosh() + 1) / (e.cosh() + 1)
        return self.at(s) + slope * (self.embedding - e)  # the second term is zero, and carries the gradient

    def at(self, scale: float) -> Tensor:
        """The mask (units,) for a value of s, without gradient."""
        mask = torch.sigmoid(scale * self.embedding.detach())
        return mask * (mask > 1e-20)  # denormal numbers make processors many times slower


class HAT(Guard):
    """Hard attention to the task (Serrà et al., 2018): a mask on units for each task; what masks use is protected.

    Units are the hidden ones of MLPs and residual blocks. `FineTune` beside it, in any order, trains the weights.

    Args:
        sparsity: λ, the weight of the term that keeps masks small.
        hardest: s_max; s rises from 1/s_max to s_max in each epoch.
        start: Mean of the normal distribution from which a task's embeddings start; its deviation is 1.
        learning_rate: Learning rate of the embeddings; None for that of the head.

    Raises:
        MethodError: If λ is negative, or s_max not above 1.
    """

    comes_after = False

    def __init__(
        self, sparsity: float = 0.75, hardest: float = 400.0, start: float = 2.0, learning_rate: float | None = 5e-2
    ) -> None:
        super().__init__(learning_rate)
        if sparsity < 0 or hardest <= 1:
            raise MethodError(f"HAT: sparsity={sparsity} must not be negative, and hardest={hardest} above 1")
        self.sparsity, self.hardest, self.start = sparsity, hardest, start
        self.masks: dict[str, UnitMask] = {}
        """By name of the layer that reads the masked units; filled by `attach`."""
        self._into: dict[str, str] = {}  # name of a weight, to the mask on the units it leads into
        self._from: dict[str, str] = {}  # and to the mask on the units it comes from
        self._before: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> None:
        """Puts a mask between every two consecutive layers; raises a MethodError if there are none."""
        for path, block in list(network.named_modules()):
            for first, between, second in _CONSECUTIVE:
                layers = [getattr(block, name, None) for name in (first, second)]
                if all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
                    self._add_mask(path, block, first, between, second)
        if not self.masks:
            raise MethodError("HAT finds no two consecutive layers whose units it could mask; use a ViT or a ResNet")
        self.parameters = {f"{name}:embedding": mask.embedding for name, mask in self.masks.items()}
        self.begin_task()

    @torch.no_grad()
    def begin_task(self) -> None:
        """Draws new embeddings."""
        for mask in self.masks.values():
            nn.init.normal_(mask.embedding, self.start)

    def begin_step(self, progress: float) -> None:
        """Anneals, and remembers the weights once there are earlier tasks."""
        for mask in self.masks.values():
            mask.scale = 1 / self.hardest + (self.hardest - 1 / self.hardest) * progress
        if self.memory.tensors:
            self._before = {name: weight.detach().clone() for name, weight in self.shared_weights().items()}

    def loss(self, step: Step) -> Tensor:
        """λ·Σ a·(1 − used) / Σ (1 − used) over all units."""
        used = self.memory.tensors
        masks = torch.cat([mask.mask() for mask in self.masks.values()])
        free = torch.cat([1 - used.get(name, torch.zeros_like(m.embedding)) for name, m in self.masks.items()])
        return self.sparsity * (masks * free).sum() / free.sum().clamp_min(1e-6)

    @torch.no_grad()
    def end_step(self) -> None:
        """Undoes the step where weights are in use; until the next step, masks are those of evaluation."""
        weights = self.shared_weights() if self._before else {}
        for name, weight in weights.items():
            free = self.freedom(name.removeprefix("net."), weight).to(weight.dtype)  # the network within the backbone
            weight.copy_(torch.lerp(self._before[name], weight, free.expand_as(weight)))
        self._before = {}
        for mask in self.masks.values():
            mask.embedding.clamp_(-6, 6)
            mask.scale = self.hardest

    def freedom(self, name: str, weight: Tensor) -> Tensor:
        """1 − min(used_i, used_j) of the weight of a name in the network; expands to its shape, 0 where it is fixed."""
        used, rest = self.memory.tensors, weight.new_tensor(float(bool(self.memory.tensors)))
        into, out_of = (used.get(of.get(name, ""), rest) for of in (self._into, self._from))
        trailing = [1] * (weight.ndim - 1)
        if into.ndim:
            into = into.view(-1, *trailing)  # (rows, 1, ...)
        if out_of.ndim:
            out_of = out_of.view(-1, *trailing[1:])  # (columns, 1, ...)
        return 1 - torch.minimum(into, out_of)

    def end_task(self) -> None:
        """Marks the task's units as used from now on."""
        used = self.memory.tensors
        final = {name: mask.at(self.hardest) for name, mask in self.masks.items()}
        self.memory.keep({name: torch.maximum(used.get(name, mask), mask) for name, mask in final.items()})

    def task_state(self) -> dict[str, Tensor]:
        """The embeddings."""
        return copies(self.parameters)

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads the embeddings."""
        self._load(state, self.parameters)

    def shared_state(self) -> dict[str, Tensor]:
        """For each mask the maximum of earlier tasks' masks (units,)."""
        return copies(self.memory.tensors)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads the maxima."""
        check_state("HAT", state, {name: tuple(mask.embedding.shape) for name, mask in self.masks.items()})
        self.memory.keep(state)

    def _add_mask(self, path: str, block: nn.Module, first: str, between: str, second: str) -> None:
        layer, following = getattr(block, first), getattr(block, second)
        mask = UnitMask(len(layer.weight), self.hardest)
        extend("HAT", following, mask)
        following.register_forward_pre_hook(_mask_units)
        name = f"{path}.{second}".lstrip(".")
        self.masks[name] = mask
        for part in (f"{first}.weight", f"{first}.bias", f"{between}.weight", f"{between}.bias"):
            self._into[f"{path}.{part}".lstrip(".")] = name
        self._from[f"{name}.weight"] = name


_CONSECUTIVE = (
    ("fc1", "norm", "fc2"),  # timm's MLP
    ("0", "none", "3"),  # torchvision's MLP
    ("conv1", "bn1", "conv2"),
    ("conv2", "bn2", "conv3"),
)
"""Consecutive layers within a block: the first, a normalisation of its output if there is one, the second."""


def _mask_units(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mask: Tensor = module.get_submodule(ADDED).mask()
    x, *rest = args
    return x * (mask[:, None, None] if isinstance(module, nn.Conv2d) else mask).to(x.dtype), *rest
