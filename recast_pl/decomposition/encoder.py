"""A source of coefficients: an encoder of the weights, which the paper calls a VAE."""

from torch import Tensor, nn

from recast_pl.decomposition.sources import CoefficientSource
from recast_pl.decomposition.targets import check_least


class CoefficientEncoder(CoefficientSource):
    """An encoder from each weight of a group to its coefficients: the "VAE" of figures 5, 6, 9 and 10 and table 6.

    The paper does not describe it; this follows the authors' released code. It has no decoder but the templates, no
    noise and no KL term. Three linear layers with leaky ReLUs map the flattened weight to K·n numbers. The encoder has
    about `hidden` times as many parameters as a weight, and is thrown away after the fit.

    Args:
        dense: The weights (L, *shape) of the group.
        start: Coefficients (L, K, n), of which only the shape is used; the layers start as PyTorch initialises them.
        hidden: Width of the two hidden layers.

    Raises:
        DecompositionError: If `hidden` is below 1.
    """

    def __init__(self, dense: Tensor, start: Tensor, hidden: int = 8) -> None:
        super().__init__()
        check_least(1, hidden=hidden)
        self.shape = start.shape[1:]
        self.layers = nn.Sequential(
            nn.Linear(dense[0].numel(), hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(),
            nn.Linear(hidden, self.shape.numel()),
        )

    def forward(self, dense: Tensor) -> Tensor:
        """The coefficients (L, K, n) of the weights (L, *shape)."""
        encoded: Tensor = self.layers(dense.flatten(1))
        return encoded.view(-1, *self.shape)
