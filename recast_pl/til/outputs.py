"""Pieces that change activations."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.til.piece import ADDED, Piece, select

BLOCKS = r"(blocks\.\d+|encoder_layer_\d+|layer\d\.\d+)$"
"""Names of blocks in timm's and torchvision's vision transformers and residual networks."""

_SOURCES = ("norm2", "ln_2", "conv2")


class ModulePiece(Piece):
    """A piece that gives modules of the network a small module of their own.

    Args:
        targets: Regular expressions, searched in the names of modules (any sequence).
        learning_rate: Rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.additions: list[Bottleneck | Ghost] = []

    def add(self, module: nn.Module) -> "Bottleneck | Ghost | None":
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


class Ghost(nn.Conv2d):
    """A depthwise 3×3 convolution that starts as the identity.

    Args:
        channels: Of the feature maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)

    def reset(self) -> None:
        """The identity."""
        nn.init.dirac_(self.weight, groups=self.groups)


class CLR(ModulePiece):
    """Channel-wise lightweight reprogramming (Ge et al., 2023): a 3×3 convolution of each channel after convolutions.

    Args:
        skip_pointwise: Whether to leave out 1×1 convolutions, as the reduced variant does.
        targets: Regular expressions for names of convolutions.
        learning_rate: Rate of the kernels; None for that of the head.
    """

    def __init__(
        self, skip_pointwise: bool = False, targets: tuple[str, ...] = ("",), learning_rate: float | None = 1e-3
    ) -> None:
        super().__init__(targets, learning_rate)
        self.skip_pointwise = skip_pointwise

    def add(self, module: nn.Module) -> Ghost | None:
        """A ghost after a convolution."""
        if not isinstance(module, nn.Conv2d) or (self.skip_pointwise and module.kernel_size == (1, 1)):
            return None
        ghost = Ghost(module.out_channels)
        module.add_module(ADDED, ghost)
        module.register_forward_hook(_apply_ghost)
        return ghost


def _source(block: nn.Module) -> nn.Module:
    """The module whose input a block's adapter reads; the block itself if there is none."""
    return next((getattr(block, name) for name in _SOURCES if hasattr(block, name)), block)


def _remember(module: Any, args: tuple[Tensor, ...]) -> None:
    module.get_submodule(ADDED).seen = args[0]


def _add_adapter(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter: Any = _source(module).get_submodule(ADDED)
    seen, adapter.seen = adapter.seen, None
    added: Tensor = adapter(seen)
    return output + added


def _apply_ghost(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    reprogrammed: Tensor = module.get_submodule(ADDED)(output)
    return reprogrammed
