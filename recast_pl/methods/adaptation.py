"""What methods that change weights share: the change of one weight, and the piece that puts one on each target."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.decomposition.targets import weight_owners
from recast_pl.methods.piece import ADDED, Piece, check_state, select

# names of weights in timm's and torchvision's vision transformers and residual networks
ATTENTION = r"(attn\.qkv\.|self_attention\.in_proj_)weight$"
"""Fused weights of queries, keys and values."""

PROJECTION = r"(attn\.proj|self_attention\.out_proj)\.weight$"
"""Weights of the projections that follow attention."""

MLP = r"mlp\.(fc[12]|0|3)\.weight$"
"""Weights of the MLPs of a vision transformer."""

CONVOLUTIONS = r"layer\d\.\d+\.conv\d\.weight$"
"""Weights of the convolutions in the blocks of a residual network."""

EVERY_LAYER = (ATTENTION, PROJECTION, MLP, CONVOLUTIONS)
"""All weights in the blocks of a vision transformer or a residual network."""

Part = Literal["q", "k", "v"]


def thirds(name: str, parts: Sequence[Part]) -> list[int] | None:
    """Indices of the thirds of a weight's rows to change, ascending; None for all rows if the weight is not fused."""
    return sorted("qkv".index(part) for part in set(parts)) if re.search(r"qkv|in_proj", name) else None


class Adaptation(nn.Module):
    """A change of one weight, registered as a parametrization.

    Each parametrization of a weight receives the previous one's output: the pretrained parameter first, or the weight
    that RECAST generates. So pieces on one weight act in the order of their list.
    """

    trains_by_products: ClassVar[bool] = False
    """Whether training uses `product` where it can: it saves the gradient of the whole weight, a third of the work."""

    def __init_subclass__(cls) -> None:
        """Lets a subclass with a `change` of its own not inherit a `product` that computes something else."""
        if "change" in vars(cls) and "product" not in vars(cls):
            cls.product = Adaptation.product  # type: ignore[method-assign]

    @property
    def has_product(self) -> bool:
        """Whether there is a `product`."""
        return type(self).product is not Adaptation.product

    def reset(self, weight: Tensor) -> None:
        """Resets the parameters to the start of every task, where `change` receives this weight (*shape)."""
        raise NotImplementedError

    def change(self, weight: Tensor) -> Tensor:
        """The changed weight (*shape)."""
        raise NotImplementedError

    def product(self, inputs: Inputs, y: Tensor) -> None:
        """Changes a layer's output in place as `change` would have done through the weight; optional.

        It serves training, and batches in which each sample has parameters of its own, with a first dimension (B, …).

        Args:
            inputs: The layer's input, B samples.
            y: Products of the unchanged weight with the input (B, N, rows).
        """
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, computed in its own precision under autocast, too."""
        with torch.autocast(weight.device.type, enabled=False):
            return self.change(weight)


AdaptationT = TypeVar("AdaptationT", bound=Adaptation)


class WeightPiece(Piece, Generic[AdaptationT]):
    """A piece that puts an `Adaptation` on each of its targets.

    Args:
        targets: Regular expressions, searched in the names of weights (any sequence). One that matches nothing is
            ignored as long as another matches, so that a list may name the weights of different backbones.
        learning_rate: Learning rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.adaptations: dict[str, AdaptationT] = {}
        """By name of the weight, or of the first one if several share an adaptation; filled by `attach`."""
        self._owners: dict[str, tuple[nn.Module, str]] = {}

    def adapt(self, name: str, weight: Tensor) -> AdaptationT:
        """Makes the adaptation of one weight, from its name and present value (*shape), or returns one made before."""
        raise NotImplementedError

    def owners(self, network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        """By name, the layer and the attribute of everything that may be a target: weights of `weight_owners`."""
        return {name: owner for name, owner in weight_owners(network).items() if f".{ADDED}." not in name}

    def attach(self, network: nn.Module) -> None:
        """Puts an adaptation on every target; raises a MethodError if no weight matches."""
        owners = self.owners(network)
        self._owners = {name: owners[name] for name in select(type(self).__name__, owners, self.targets)}
        for name, (module, attribute) in self._owners.items():
            adaptation = self.adapt(name, getattr(module, attribute).detach())
            parametrize.register_parametrization(module, attribute, adaptation)
            if adaptation in self.adaptations.values():
                continue
            self.adaptations[name] = adaptation
            known = set(self.parameters.values())  # of adaptations that share parameters
            trained = {key: p for key, p in adaptation.named_parameters() if p.requires_grad and p not in known}
            self.parameters |= {f"{name}:{key}": p for key, p in trained.items()}
        self.begin_task()  # so that the network computes what it did before

    @torch.no_grad()
    def begin_task(self) -> None:
        """Resets every adaptation; the pieces before have reset theirs already."""
        for name, adaptation in self.adaptations.items():
            adaptation.reset(self._received(name, adaptation))

    def _received(self, name: str, adaptation: Adaptation) -> Tensor:
        """What an adaptation receives: its weight (*shape) as the parametrizations before it return it."""
        module, attribute = self._owners[name]
        chain: Any = module.parametrizations[attribute]  # type: ignore[index]
        weight: list[Tensor] = list(chain.parameters(recurse=False))  # what the first one receives
        for parametrization in takewhile(lambda each: each is not adaptation, chain):
            weight = [parametrization(*weight)]
        return weight[0]


class CompactState(Piece):
    """A piece whose numbers go into a patch as one tensor: naming each parameter costs 80 bytes."""

    def task_state(self) -> dict[str, Tensor]:
        """The numbers, parameter after parameter (Σ,)."""
        return {"numbers": torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()]).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads the numbers."""
        check_state(type(self).__name__, state, {"numbers": (sum(p.numel() for p in self.parameters.values()),)})
        for parameter, (numbers,) in self.unpack({"numbers": state["numbers"][None]}).items():
            parameter.copy_(numbers)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The numbers of T tasks (T, *shape) for each parameter."""
        parameters = list(self.parameters.values())
        parts = states["numbers"].split([parameter.numel() for parameter in parameters], 1)
        return {p: part.unflatten(1, p.shape).to(p.dtype) for p, part in zip(parameters, parts, strict=True)}


class CompactPiece(CompactState, WeightPiece[AdaptationT]):
    """A piece with few numbers for each weight."""
