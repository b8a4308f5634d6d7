"""The piece that adds a small module to modules of the network, which methods that change activations share."""

from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from recast_pl.errors import MethodError
from recast_pl.methods.piece import ADDED, Piece, select

BLOCKS = r"(blocks\.\d+|encoder_layer_\d+|layer\d\.\d+)$"
"""Names of the blocks of timm's and torchvision's vision transformers and residual networks."""


class Addition(Protocol):
    """A small module that a piece adds to a module of the network."""

    def reset(self) -> None:
        """Resets the parameters to the start of every task, where the addition changes nothing."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters by name."""


AdditionT = TypeVar("AdditionT", bound=Addition)


class ModulePiece(Piece, Generic[AdditionT]):
    """A piece that adds a small module to modules of the network.

    Args:
        targets: Regular expressions, searched in the names of modules (any sequence).
        learning_rate: Learning rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.additions: list[AdditionT] = []
        """One for each extended module; filled by `attach`."""

    def add(self, module: nn.Module) -> AdditionT | None:
        """Extends a module and returns the addition; None if the module is of a kind that it does not extend.

        Hooks must find the addition through the module they are called with, so that copies of a network work.
        """
        raise NotImplementedError

    def attach(self, network: nn.Module) -> None:
        """Extends every module whose name matches; raises a MethodError if there is none."""
        modules, owner = dict(network.named_modules()), type(self).__name__
        selected = select(owner, modules, self.targets)
        for name in selected:
            addition = self.add(modules[name])
            if addition is not None:
                self.additions.append(addition)
                self.parameters |= {f"{name}:{key}": p for key, p in addition.named_parameters()}
        if not self.additions:
            raise MethodError(
                f"{owner} fits none of the {len(selected)} modules whose names match {list(self.targets)}; "
                "set targets to regular expressions for modules that it can extend"
            )
        self.begin_task()  # so that the network computes what it did before

    @torch.no_grad()
    def begin_task(self) -> None:
        """Resets the additions."""
        for addition in self.additions:
            addition.reset()


def extend(owner: str, module: nn.Module, addition: nn.Module) -> None:
    """Registers an addition in a module, under the name `ADDED`, where the hooks of its piece look it up.

    Raises:
        MethodError: If another piece, not the `owner`, extends the same module already.
    """
    if ADDED in dict(module.named_children()):
        name = type(module).__name__
        raise MethodError(f"{owner} and a piece before it extend the same {name}; leave one of them out")
    module.add_module(ADDED, addition)
