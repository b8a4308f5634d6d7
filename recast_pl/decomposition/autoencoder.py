"""Where the templates of a gradient fit come from: numbers of their own, or an encoder that reads the weights."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import DecompositionError


class TemplateSource(nn.Module, ABC):
    """What a gradient fit trains to have the templates of a group; the coefficients are learnt beside it.

    `Trainer` and optimizer see its parameters alone; what is kept at the end are the templates of `forward`.
    """

    @abstractmethod
    def forward(self, dense: Tensor) -> Tensor:
        """The templates (n, *shape) as they stand, for the weights (L, *shape) of the group."""

    @abstractmethod
    def draw(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The templates (n, *shape) of a step of training, noise and all, and the source's own term of the loss."""

    def receive(self, templates: Tensor, term: Tensor, gradient: Tensor) -> None:
        """Sets the gradients of the parameters.

        Args:
            templates: As drawn (n, *shape).
            term: As drawn, a scalar.
            gradient: That of the rest of the loss with respect to the templates (n, *shape).
        """
        torch.autograd.backward([templates, term], [gradient, None])


class FreeTemplates(TemplateSource):
    """Templates that are parameters and start Kaiming normal: algorithm 2 as it is printed.

    Args:
        dense: The weights (L, *shape) of the group.
        count: n, the number of templates.
    """

    def __init__(self, dense: Tensor, count: int) -> None:
        super().__init__()
        templates = torch.empty(count, *dense.shape[1:])
        for template in templates:
            nn.init.kaiming_normal_(template)
        self.templates = nn.Parameter(templates)

    def forward(self, dense: Tensor) -> Tensor:
        """The parameters themselves (n, *shape)."""
        return self.templates

    def draw(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters themselves (n, *shape), and 0."""
        return self.templates, self.templates.new_zeros(())

    def receive(self, templates: Tensor, term: Tensor, gradient: Tensor) -> None:
        """Takes the gradient (n, *shape) as it is, without a copy."""
        self.templates.grad = gradient


class TemplateAutoencoder(TemplateSource):
    """A variational autoencoder from the weights of a group to its templates (figure 5, where VAEs do worst).

    The paper does not say how its autoencoder is built. Here the weights are an image (rows by columns, one channel for
    each layer; a convolution's kernel is flattened), which convolutions turn patch by patch into mean and log-variance
    of latent numbers, and these into the patches of n templates. Encoder and decoder are a hidden layer beside a linear
    map, without which Adam takes several times the epochs. In training the latent numbers are drawn, z = μ + σ·ε, and
    the loss has a term β·KL(N(μ, σ²) ‖ N(0, 1)) (Kingma and Welling, 2014); the templates that are kept are those of μ.

    Args:
        dense: The weights (L, *shape) of the group.
        count: n, the number of templates.
        patch: Height and width of a patch, in weights; what does not fill the last one counts as zeros.
        hidden: Width of the hidden layers.
        latent: Latent numbers of a patch; None for as many as it has weights, L·patch². Trained weights are close to
            noise: fewer latent numbers lose about that part of them.
        kl_weight: β of the mean over latent numbers, in units of the mean square of the weights; 0 for no such term.

    Raises:
        DecompositionError: If patch, hidden or latent are below 1, or the weight of the term is below 0.
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
        for name, value in (("patch", patch), ("hidden", hidden), ("latent", latent)):
            if value < 1:
                raise DecompositionError(f"TemplateAutoencoder: {name}={value} must be at least 1")
        if kl_weight < 0:
            raise DecompositionError(f"TemplateAutoencoder: kl_weight={kl_weight} must be at least 0")
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
        """The templates (n, *shape) of the latent means."""
        mean, _ = self._encode(dense)
        return self._decode(mean, dense)

    def draw(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The templates (n, *shape) of drawn latent numbers, and β·KL."""
        mean, log_variance = self._encode(dense)
        latent = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        return self._decode(latent, dense), self.kl_weight * divergence

    def _encode(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of the latent numbers, (1, latent, H, W) of H×W patches."""
        image = dense.flatten(2)[None] / self.scale  # (1, L, rows, columns)
        rows, columns = (-size % self.patch for size in image.shape[2:])
        mean, log_variance = self.encoder(F.pad(image, (0, columns, 0, rows))).chunk(2, dim=1)
        return mean, log_variance

    def _decode(self, latent: Tensor, dense: Tensor) -> Tensor:
        rows, columns = dense.flatten(2).shape[1:]
        image: Tensor = self.decoder(latent)[0, :, :rows, :columns]  # (n, rows, columns)
        return image.reshape(self.count, *dense.shape[1:]) * self.scale


class _WithLinear(nn.Module):
    """A layer with a hidden one, plus a linear map."""

    def __init__(self, first: nn.Module, second: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.linear = first, second, linear

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.second(F.gelu(self.first(x))) + self.linear(x)
        return mixed
