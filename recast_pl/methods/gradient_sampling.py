"""Cheaper training of coefficients: the gradient of a weight is estimated from a sample of the tokens.

The estimate is unbiased: rows are drawn with replacement in proportion to the norm of their gradient, and divided by
their probability. It is not part of the RECAST paper.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sample_gradients(layer: nn.Linear, fraction: float) -> None:
    """Makes a layer estimate the gradient of its weight from a sample of the tokens.

    A coefficient's gradient is one inner product ⟨dW, T⟩ over all entries of the weight, which averages the noise of
    the estimate. All other gradients stay exact, and so does everything under `torch.compile`.

    Args:
        layer: A layer whose weight is generated from trained parameters; changed in place.
        fraction: Fraction of the tokens, above 0 and at most 1.
    """

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not (weight.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return F.linear(x, weight, bias)
        y: Tensor = _SampledLinear.apply(x, weight, bias, fraction)
        return y

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


class _SampledLinear(torch.autograd.Function):
    """x·Wᵀ + b, with the gradient of W from a sample of the rows of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fraction: float) -> Tensor:
        """The output (..., out) for x (..., in), W (out, in) and b (out,)."""
        ctx.fraction = fraction
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The exact gradients of x and b, and the estimate for W."""
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (..., out) to (N, out)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        sampled, inputs = _sample(rows, x.flatten(0, -2), ctx.fraction)
        return of_x, (sampled.T @ inputs.to(sampled.dtype)).to(weight.dtype), of_bias, None


def _sample(gradients: Tensor, x: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Draws rows of gradients (N, out) and x (N, in), scaled so that the mean of gradientsᵀ·x stays the same."""
    count = max(1, round(fraction * len(x)))
    # an overflow must reach the result, where a gradient scaler looks for it
    norms = gradients.float().norm(dim=1).nan_to_num(1e30, posinf=1e30).clamp_min(1e-30)
    probabilities = norms / norms.sum()
    drawn = probabilities.multinomial(count, replacement=True)
    return gradients[drawn] / (count * probabilities[drawn])[:, None].to(gradients.dtype), x[drawn]
