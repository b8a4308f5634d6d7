"""CLR: a small convolution of each channel after the convolutions of the network.

Ge et al., "CLR: Channel-wise Lightweight Reprogramming for Continual Learning", ICCV 2023.

    y'_c = k_c * y_c for each channel c of a convolution's output y; the 3×3 kernel k_c starts as the identity

The reduced variant of the paper, `skip_pointwise`, leaves out 1×1 convolutions. Batch normalisation keeps the
pretrained statistics.
"""

from typing import Any

from torch import Tensor, nn

from recast_pl.methods.addition import ModulePiece, extend
from recast_pl.methods.piece import ADDED


class Ghost(nn.Conv2d):
    """A depthwise 3×3 convolution that starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)

    def reset(self) -> None:
        """The identity."""
        nn.init.dirac_(self.weight, groups=self.groups)


class CLR(ModulePiece[Ghost]):
    """Channel-wise lightweight reprogramming (Ge et al., 2023): a 3×3 convolution of each channel after convolutions.

    Args:
        skip_pointwise: Whether to leave out 1×1 convolutions, as the reduced variant does.
        targets: Regular expressions for names of convolutions.
        learning_rate: Learning rate of the kernels; None for that of the head.
    """

    def __init__(
        self, skip_pointwise: bool = False, targets: tuple[str, ...] = ("",), learning_rate: float | None = 1e-3
    ) -> None:
        super().__init__(targets, learning_rate)
        self.skip_pointwise = skip_pointwise

    def add(self, module: nn.Module) -> Ghost | None:
        """Adds a ghost after a convolution."""
        if not isinstance(module, nn.Conv2d) or (self.skip_pointwise and module.kernel_size == (1, 1)):
            return None
        ghost = Ghost(module.out_channels)
        extend("CLR", module, ghost)
        module.register_forward_hook(_reprogram)
        return ghost


def _reprogram(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    reprogrammed: Tensor = module.get_submodule(ADDED)(output)
    return reprogrammed
