"""Changes of weights and activations: what several methods share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.parametrization import Inputs
from recast_pl.decomposition.targets import weight_owners
from recast_pl.errors import MethodError
from recast_pl.methods.piece import ADDED, Piece, check_state, select


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


Part = Literal["q", "k", "v"]

ATTENTION = r"(attn\.qkv\.|self_attention\.in_proj_)weight$"

MLP = r"mlp\.(fc[12]|0|3)\.weight$"

CONVOLUTIONS = r"layer\d\.\d+\.conv\d\.weight$"
"""Names of weights in timm's and torchvision's vision transformers and residual networks."""


class WeightPiece(Piece):
    """A piece that puts an `Adaptation` on each of its targets.

    Args:
        targets: Regular expressions, searched in the names of weights (any sequence); of several, those that match
            nothing are left out, so that they may name the weights of different backbones.
        learning_rate: Rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.adaptations: dict[str, Adaptation] = {}
        self._sites: dict[str, tuple[nn.Module, str]] = {}

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """Makes the adaptation of one weight.

        Args:
            name: Name of the weight.
            weight: Its present value (*shape).
        """
        raise NotImplementedError

    def attach(self, network: nn.Module) -> None:
        """Puts an adaptation on every target.

        Raises:
            MethodError: If no weight matches.
        """
        sites = {name: site for name, site in weight_owners(network).items() if f".{ADDED}." not in name}
        self._sites = {name: sites[name] for name in select(type(self).__name__, sites, self.targets)}
        for name, (module, attribute) in self._sites.items():
            adaptation = self.adapt(name, getattr(module, attribute).detach())
            parametrize.register_parametrization(module, attribute, adaptation)
            self.adaptations[name] = adaptation
            trained = {key: p for key, p in adaptation.named_parameters() if p.requires_grad}
            self.parameters |= {f"{name}:{key}": p for key, p in trained.items()}
        self.begin_task()  # so that the network computes what it did

    @torch.no_grad()
    def begin_task(self) -> None:
        """Resets every adaptation; pieces below have been reset before."""
        for name, adaptation in self.adaptations.items():
            adaptation.reset(weight_below(*self._sites[name], adaptation))


PROJECTION = r"(attn\.proj|self_attention\.out_proj)\.weight$"
"""Names of the weights that follow attention in timm's and torchvision's vision transformers."""

EVERY_LAYER = (ATTENTION, PROJECTION, MLP, CONVOLUTIONS)
"""All weights of the blocks of a vision transformer or a residual network."""


class MinimalPiece(WeightPiece):
    """A piece whose numbers go into a patch as one tensor, because a file spends some 80 bytes on naming each."""

    def task_state(self) -> dict[str, Tensor]:
        """The numbers, weight after weight (Σ,)."""
        return {"numbers": torch.cat([parameter.detach().flatten() for parameter in self.parameters.values()]).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes the numbers back."""
        check_state(type(self).__name__, state, {"numbers": (sum(p.numel() for p in self.parameters.values()),)})
        for parameter, (numbers,) in self.unpack({"numbers": state["numbers"][None]}).items():
            parameter.copy_(numbers)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The numbers of T tasks (T, *shape) for each weight."""
        parameters = list(self.parameters.values())
        parts = states["numbers"].split([parameter.numel() for parameter in parameters], 1)
        return {p: part.unflatten(1, p.shape) for p, part in zip(parameters, parts, strict=True)}


BLOCKS = r"(blocks\.\d+|encoder_layer_\d+|layer\d\.\d+)$"
"""Names of blocks in timm's and torchvision's vision transformers and residual networks."""


class Addition(Protocol):
    """A small module that a piece adds to a module of the network."""

    def reset(self) -> None:
        """Sets the parameters to the start of every task, where the addition changes nothing."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters by name."""


class ModulePiece(Piece):
    """A piece that gives modules of the network a small module of their own.

    Args:
        targets: Regular expressions, searched in the names of modules (any sequence).
        learning_rate: Rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.additions: list[Addition] = []

    def add(self, module: nn.Module) -> Addition | None:
        """Gives a module its addition, and returns that; None if it takes none.

        Hooks are to find the addition through the module they are called with, so that copies of a network work.
        """
        raise NotImplementedError

    def attach(self, network: nn.Module) -> None:
        """Adds to every module whose name matches.

        Raises:
            MethodError: If none does.
        """
        modules = dict(network.named_modules())
        selected = select(type(self).__name__, modules, self.targets)
        for name in selected:
            addition = self.add(modules[name])
            if addition is not None:
                self.additions.append(addition)
                self.parameters |= {f"{name}:{key}": p for key, p in addition.named_parameters()}
        if not self.additions:
            raise MethodError(
                f"{type(self).__name__} fits none of the {len(selected)} modules whose names match "
                f"{list(self.targets)}; set targets to regular expressions for those it should extend"
            )
        self.begin_task()  # so that the network computes what it did

    @torch.no_grad()
    def begin_task(self) -> None:
        """Resets the additions."""
        for addition in self.additions:
            addition.reset()
