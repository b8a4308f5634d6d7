"""AdaptFormer: a small bottleneck in parallel to the MLP of each block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022.

    x' = x + MLP(norm(x)) + s · up(dropout(ReLU(down(x)))), where x is the block's state after attention

As in the authors' code, the bottleneck reads x before its normalisation, and a tenth of its units is dropped in each
step of training.

Deviations: the default rank is 1, as in RECAST's tables, not 64. In residual networks with two convolutions in each
block, the bottleneck is parallel to the second one.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.addition import BLOCKS, ModulePiece, extend
from recast_pl.methods.piece import ADDED


class Bottleneck(nn.Module):
    """s·up(dropout(ReLU(down(x)))) over the channels of x.

    Args:
        width: D.
        rank: Width of the bottleneck.
        scale: s.
        dropout: Probability of an entry to be dropped in a step of training.
        dimension: Of the channels: -1 of tokens (B, N, D), or 1 of maps (B, D, H, W).
    """

    def __init__(self, width: int, rank: int, scale: float, dropout: float, dimension: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.scale, self.dropout, self.dimension = scale, dropout, dimension
        self.drops = False
        """Whether a step of training is under way; the mode of the backbone is that of evaluation even then."""
        self.seen: Tensor | None = None
        """The input, while the block is running."""

    def reset(self) -> None:
        """The weight of `down` is drawn as in the authors' code; all else is 0, so that nothing changes."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.drops = False

    def forward(self, x: Tensor) -> Tensor:
        """What to add, of the shape of x."""
        channels_last = x.movedim(self.dimension, -1)
        hidden = F.dropout(torch.relu(self.down(channels_last)), self.dropout, training=self.drops)
        y: Tensor = self.scale * self.up(hidden)
        return y.movedim(-1, self.dimension)


class AdaptFormer(ModulePiece[Bottleneck]):
    """A bottleneck in parallel to the MLP of each block (Chen et al., 2022), or to a block's second convolution.

    Args:
        rank: Width of the bottleneck.
        scale: Factor of what the bottleneck adds.
        targets: Regular expressions for names of blocks, which have a `norm2`, `ln_2` or `conv2`.
        learning_rate: Learning rate of the parameters; None for that of the head.
        dropout: Fraction of the bottleneck's entries that are dropped in each step of training, after the ReLU.

    Raises:
        MethodError: If `dropout` is not from 0 up to, but not including, 1.
    """

    def __init__(
        self,
        rank: int = 1,
        scale: float = 0.1,
        targets: tuple[str, ...] = (BLOCKS,),
        learning_rate: float | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(targets, learning_rate)
        if not 0 <= dropout < 1:
            raise MethodError(f"AdaptFormer: dropout={dropout} must be at least 0 and below 1")
        self.rank, self.scale, self.dropout = rank, scale, dropout

    def add(self, module: nn.Module) -> Bottleneck | None:
        """Adds a bottleneck from the input of `norm2`, `ln_2` or `conv2` to the block's output."""
        source = _source(module)
        if isinstance(source, nn.LayerNorm):
            bottleneck = Bottleneck(source.normalized_shape[-1], self.rank, self.scale, self.dropout, -1)
        elif isinstance(source, nn.Conv2d) and not hasattr(module, "conv3"):
            bottleneck = Bottleneck(source.in_channels, self.rank, self.scale, self.dropout, 1)
        else:
            return None
        extend("AdaptFormer", source, bottleneck)
        source.register_forward_pre_hook(_remember_input)
        module.register_forward_hook(_add_output)
        return bottleneck

    def begin_step(self, progress: float) -> None:
        """Drops entries from now on."""
        self._set_drops(True)

    def end_step(self) -> None:
        """Drops no more entries until the next step."""
        self._set_drops(False)

    def _set_drops(self, drops: bool) -> None:
        for bottleneck in self.additions:
            bottleneck.drops = drops


def _remember_input(module: Any, args: tuple[Tensor, ...]) -> None:
    module.get_submodule(ADDED).seen = args[0]


def _add_output(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    bottleneck: Any = _source(module).get_submodule(ADDED)
    seen, bottleneck.seen = bottleneck.seen, None
    added: Tensor = bottleneck(seen)
    return output + added


def _source(block: nn.Module) -> nn.Module:
    """The module whose input a block's bottleneck reads; the block itself if there is none."""
    return next((getattr(block, name) for name in ("norm2", "ln_2", "conv2") if hasattr(block, name)), block)
