"""A source of templates: an autoencoder of the weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.decomposition.sources import TemplateSource
from recast_pl.decomposition.targets import check_least


class TemplateAutoencoder(TemplateSource):
    """A variational autoencoder from the weights of a group to its templates. Experimental, and not in the paper.

    What the paper calls a VAE is `CoefficientEncoder`. Here the weights are an image: rows by columns (a convolution
    kernel is flattened), with one channel for each layer. Convolutions map each patch to the mean and log-variance of
    latent variables, and these to the same patch of n templates. Encoder and decoder are a hidden layer plus a linear
    map; without it, Adam takes several times as many epochs. Training samples the latent variables, z = μ + σ·ε, and
    adds β·KL(N(μ, σ²) ‖ N(0, 1)) to the loss (Kingma and Welling, 2014). The final templates are those of μ.

    Args:
        dense: The weights (L, *shape) of the group.
        count: n, the number of templates.
        patch: Height and width of a patch, in weights; the last patches are padded with zeros.
        hidden: Width of the hidden layers.
        latent: Number of latent variables of a patch; None for as many as it has weights, L·patch². Fewer lose about
            that part of the weights, because trained weights are close to noise.
        kl_weight: β, for the mean over latent variables, relative to the mean square of the weights; 0 for none.

    Raises:
        DecompositionError: If `patch`, `hidden` or `latent` is below 1, or `kl_weight` is below 0.
    """

    def __init__(
        self,
        dense: Tensor,
        count: int,
        patch: int = 4,
        hidden: int = 16,
        latent: int | None = None,
        kl_weight: float = 1e-2,
    ) -> None:
        super().__init__()
        layers = len(dense)
        latent = layers * patch**2 if latent is None else latent
        check_least(1, patch=patch, hidden=hidden, latent=latent)
        check_least(0, kl_weight=kl_weight)
        self.patch, self.count = patch, count
        self.scale = float(dense.square().mean().sqrt()) or 1.0
        self.kl_weight = kl_weight * self.scale**2  # the loss is in units of squared weights
        self.encoder = _WithLinear(
            nn.Conv2d(layers, hidden, patch, patch),
            nn.Conv2d(hidden, 2 * latent, 1),
            nn.Conv2d(layers, 2 * latent, patch, patch),
        )
        self.decoder = _WithLinear(
            nn.Conv2d(latent, hidden, 1),
            nn.ConvTranspose2d(hidden, count, patch, patch),
            nn.ConvTranspose2d(latent, count, patch, patch),
        )

    def forward(self, dense: Tensor) -> Tensor:
        """The templates (n, *shape) of the latent means μ."""
        mean, _ = self._encode(dense)
        return self._decode(mean, dense)

    def draw(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The templates (n, *shape) of sampled latent variables, and β·KL."""
        mean, log_variance = self._encode(dense)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return self._decode(latent, dense), self.kl_weight * divergence

    def _encode(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of the latent variables, (1, latent, H, W) for H×W patches."""
        image = dense.flatten(2)[None] / self.scale  # (1, L, rows, columns)
        rows, columns = (-size % self.patch for size in image.shape[2:])
        mean, log_variance = self.encoder(F.pad(image, (0, columns, 0, rows))).chunk(2, dim=1)
        return mean, log_variance

    def _decode(self, latent: Tensor, dense: Tensor) -> Tensor:
        rows, columns = dense.flatten(2).shape[1:]
        image: Tensor = self.decoder(latent)[0, :, :rows, :columns]  # (n, rows, columns)
        return image.reshape(self.count, *dense.shape[1:]) * self.scale


class _WithLinear(nn.Module):
    """Two layers with a GELU between them, plus a linear map."""

    def __init__(self, first: nn.Module, second: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.linear = first, second, linear

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.second(F.gelu(self.first(x))) + self.linear(x)
        return mixed
