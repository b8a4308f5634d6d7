"""AdaptFormer."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.methods.adaptation import BLOCKS, ModulePiece
from recast_pl.methods.piece import ADDED

_SOURCES = ("norm2", "ln_2", "conv2")


class Bottleneck(nn.Module):
    """s·up(ReLU(down(x))) over the channels of x: tokens (B, N, D) or maps (B, D, H, W).

    Args:
        width: D.
        rank: Width of the bottleneck.
        scale: s.
        dimension: Where the channels are: -1 for tokens, 1 for maps.
    """

    def __init__(self, width: int, rank: int, scale: float, dimension: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale, self.dimension = scale, dimension
        self.seen: Tensor | None = None
        """The input, from when it passes until the block ends."""

    def reset(self) -> None:
        """Down as its authors draw it; up and biases are 0, so that nothing changes."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """What is added, of the shape of x."""
        channels_last = x.movedim(self.dimension, -1)
        y: Tensor = self.scale * self.up(torch.relu(self.down(channels_last)))
        return y.movedim(-1, self.dimension)


class AdaptFormer(ModulePiece):
    """A bottleneck beside the second half of each block (Chen et al., 2022): it reads what that half reads.

    In a vision transformer it is parallel to the MLP, and reads the tokens before their second normalisation; in a
    residual network of two convolutions a block it is parallel to the second.

    Args:
        rank: Width of the bottleneck.
        scale: Factor of what it adds.
        targets: Regular expressions for names of blocks, which have a `norm2`, `ln_2` or `conv2`.
        learning_rate: Rate of the parameters; None for that of the head.
    """

    def __init__(
        self,
        rank: int = 1,
        scale: float = 0.1,
        targets: tuple[str, ...] = (BLOCKS,),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        self.rank, self.scale = rank, scale

    def add(self, module: nn.Module) -> Bottleneck | None:
        """A bottleneck from the input of `norm2`, `ln_2` or `conv2` to the block's output."""
        source = _source(module)
        if isinstance(source, nn.LayerNorm):
            bottleneck = Bottleneck(source.normalized_shape[-1], self.rank, self.scale, -1)
        elif isinstance(source, nn.Conv2d) and not hasattr(module, "conv3"):
            bottleneck = Bottleneck(source.in_channels, self.rank, self.scale, 1)
        else:
            return None
        source.add_module(ADDED, bottleneck)
        source.register_forward_pre_hook(_remember)
        module.register_forward_hook(_add_adapter)
        return bottleneck


def _remember(module: Any, args: tuple[Tensor, ...]) -> None:
    module.get_submodule(ADDED).seen = args[0]


def _add_adapter(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter: Any = _source(module).get_submodule(ADDED)
    seen, adapter.seen = adapter.seen, None
    added: Tensor = adapter(seen)
    return output + added


def _source(block: nn.Module) -> nn.Module:
    """The module whose input a block's adapter reads; the block itself if there is none."""
    return next((getattr(block, name) for name in _SOURCES if hasattr(block, name)), block)
