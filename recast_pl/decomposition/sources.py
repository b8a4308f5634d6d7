"""Sources of the templates and of the coefficients of a gradient fit, which trains both; here they are parameters."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class TemplateSource(nn.Module, ABC):
    """A module that produces the templates of a group.

    After the fit, only the templates that `forward` returns are kept.
    """

    @abstractmethod
    def forward(self, dense: Tensor) -> Tensor:
        """The current templates (n, *shape), for the weights (L, *shape) of the group."""

    @abstractmethod
    def draw(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """The templates (n, *shape) for one training step, with noise, and the source's own term of the loss."""

    def receive(self, templates: Tensor, term: Tensor, gradient: Tensor) -> None:
        """Sets the gradients of the parameters.

        Args:
            templates: The templates (n, *shape) that `draw` returned.
            term: The term of the loss that `draw` returned, a scalar.
            gradient: Gradient (n, *shape) of the rest of the loss with respect to the templates.
        """
        torch.autograd.backward([templates, term], [gradient, None])


class CoefficientSource(nn.Module, ABC):
    """A module that produces the coefficients of a group.

    After the fit, only the coefficients that `forward` returns are kept.
    """

    @abstractmethod
    def forward(self, dense: Tensor) -> Tensor:
        """The current coefficients (L, K, n), for the weights (L, *shape) of the group."""


class FreeTemplates(TemplateSource):
    """Templates that are parameters, initialised by Kaiming's normal distribution: algorithm 2 of the paper.

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
        """Uses the gradient (n, *shape) without a copy."""
        self.templates.grad = gradient


class FreeCoefficients(CoefficientSource):
    """Coefficients that are parameters: algorithm 2 of the paper.

    Args:
        dense: The weights (L, *shape) of the group.
        start: Initial coefficients (L, K, n).
    """

    def __init__(self, dense: Tensor, start: Tensor) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(start)

    def forward(self, dense: Tensor) -> Tensor:
        """The parameters themselves (L, K, n)."""
        return self.coefficients
