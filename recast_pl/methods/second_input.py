"""A second input of a network, between its blocks, which `IDER` feeds with predictions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.addition import BLOCKS, extend
from recast_pl.methods.piece import ADDED, select


class SecondInput(nn.Module):
    """Adds LeakyReLU(A·y + a) to tokens (B, N, D) or maps (B, D, H, W); D is the `width`, y (B, C) the second input."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(classes, width)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        self.given: Tensor | None = None
        """The second input (B, C); None for the empty one."""

    def forward(self, x: Tensor) -> Tensor:
        """The tokens or maps with the second input."""
        classes = self.linear.in_features
        y = x.new_full((1, classes), 1 / classes) if self.given is None else self.given
        added = F.leaky_relu(self.linear(y)).to(x.dtype)
        return x + (added[:, :, None, None] if x.ndim == 4 else added[:, None])

    @contextmanager
    def of(self, y: Tensor) -> Iterator[None]:
        """A context with a second input (B, K), where K may be less than C."""
        self.given = F.pad(y, (0, self.linear.in_features - y.shape[1]))
        try:
            yield
        finally:
            self.given = None

    @classmethod
    def enter(cls, owner: str, network: nn.Module, classes: int) -> "SecondInput":
        """Adds a second input before the middle block of a network; raises a MethodError if it has no blocks."""
        modules = dict(network.named_modules())
        blocks = select(owner, modules, [BLOCKS])
        block = modules[blocks[len(blocks) // 2]]
        while isinstance(block, nn.Sequential):  # which would run an addition as its last part
            block = block[0]
        width = next(filter(None, map(_width, block.modules())), None)
        if width is None:
            raise MethodError(f"{owner} cannot extend a {type(block).__name__}; use a vision transformer or a ResNet")
        second = cls(classes, width)
        extend(owner, block, second)
        block.register_forward_pre_hook(_add_second_input)
        return second


def _width(module: nn.Module) -> int | None:
    """How many channels a module reads; None if it does not tell."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    return module.in_features if isinstance(module, nn.Linear) else None


def _add_second_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.get_submodule(ADDED)(args[0]), *args[1:])
