"""RECAST itself: weights that are mixed from templates."""

from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import RenderableType
from torch import Tensor, nn

from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.parametrization import install
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import DecompositionError, MethodError
from recast_pl.methods.piece import Piece, check_state


class Recast(Piece):
    """RECAST: a task is the coefficients with which frozen templates are mixed into weights (equations 1, 2).

    Args:
        layout: Which weights, and how they share templates: solved in closed form when training starts.
        decomposition: Path of a `decomposition.safetensors` to use instead, from `MimicryModule` or a run.
        learning_rate: Rate of the coefficients; None for that of the head. About ten times that does well.
        gradient_tokens: Part of the tokens from which the gradient of the coefficients is estimated, without bias.
            1 is exact; 0.25 is faster where MLPs of a vision transformer are decomposed.

    Raises:
        DecompositionError: If neither or both of layout and decomposition are given.
        MethodError: If `gradient_tokens` is not above 0 and at most 1, or, below 1, a target is no linear layer's.
    """

    def __init__(
        self,
        layout: BankLayout | None = None,
        decomposition: str | None = None,
        learning_rate: float | None = None,
        gradient_tokens: float = 1.0,
    ) -> None:
        super().__init__(learning_rate)
        if not 0 < gradient_tokens <= 1:
            raise MethodError(f"Recast: gradient_tokens={gradient_tokens} must be above 0 and at most 1")
        self.gradient_tokens = gradient_tokens
        if (layout is None) == (decomposition is None):
            given = "neither" if layout is None else "both"
            raise DecompositionError(f"Recast needs a layout or a decomposition file; {given} is given")
        self.layout, self.path = layout, None if decomposition is None else Path(decomposition)
        self.decomposition = Decomposition(())

    def attach(self, network: nn.Module) -> None:
        """Decomposes the network, or takes the decomposition given, and puts it in place."""
        if self.path is not None:
            self.decomposition = Decomposition.load(self.path)
        else:
            assert self.layout is not None
            self.decomposition = decompose(network, self.layout)
        self.parameters = install(network, self.decomposition)
        for name in self.parameters if self.gradient_tokens < 1 else ():
            path, _, attribute = name.rpartition(".")
            layer = network.get_submodule(path)
            if not (isinstance(layer, nn.Linear) and attribute == "weight"):
                raise MethodError(
                    f"Recast: gradient_tokens={self.gradient_tokens} needs weights of nn.Linear, {name} is none; "
                    "leave it at 1, or the target out"
                )
            sample_gradients(layer, self.gradient_tokens)

    @torch.no_grad()
    def begin_task(self) -> None:
        """Every task starts from the coefficients of the pretrained weights."""
        for bank in self.decomposition.banks:
            for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
                self.parameters[name].data = values.to(self.parameters[name].device, copy=True)  # (K, n)

    def task_state(self) -> dict[str, Tensor]:
        """The mean over the sets of each weight's coefficients, one after the other (Σ n,).

        One tensor, because a file spends some 80 bytes on naming each. The mean is all that equation 2 uses.
        """
        means = [parameter.detach().mean(0) for parameter in self.parameters.values()]
        return {"coefficients": torch.cat(means).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes the means back as a single set (1, n), for which equation 2 gives the very same bits."""
        check_state("Recast", state, {"coefficients": (sum(p.shape[1] for p in self.parameters.values()),)})
        for parameter, (mean,) in self.unpack({"coefficients": state["coefficients"][None]}).items():
            parameter.data = mean.to(parameter.device, copy=True)  # (1, n)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The means of T tasks as sets (T, 1, n) of each weight."""
        means = states["coefficients"].split([p.shape[1] for p in self.parameters.values()], 1)  # (T, n) of each weight
        return {parameter: mean[:, None] for parameter, mean in zip(self.parameters.values(), means, strict=True)}

    def describe(self) -> list[RenderableType]:
        """The table of groups, templates and coefficients."""
        return [self.decomposition.table()]

    def save_base(self, folder: Path) -> None:
        """Writes `decomposition.safetensors`: later sessions use its bits, however they would solve it."""
        path = folder / "decomposition.safetensors"
        if not path.exists():
            self.decomposition.save(path)

    def load_base(self, folder: Path) -> None:
        """Uses the run folder's decomposition."""
        path = folder / "decomposition.safetensors"
        if path.exists():
            self.path = path


def sample_gradients(layer: nn.Linear, fraction: float) -> None:
    """Lets the gradient of a layer's weight be an unbiased estimate from a sample of the tokens, with less work.

    Tokens are drawn with replacement, in proportion to the norms of the gradients that reach them. A coefficient's
    gradient is one inner product ⟨dW, T⟩ over all entries of the weight, which evens the estimate's noise out.
    Gradients of everything else stay exact, and so does all under `torch.compile`.

    Args:
        layer: With a weight that is generated from what is trained; in place.
        fraction: Part of the tokens, above 0 and at most 1.
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
        """For x (..., in) and W (out, in)."""
        ctx.fraction = fraction
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and b exact, of W estimated."""
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
    """Some rows of gradients (N, out) and x (N, in), scaled so that gradientsᵀ·x stays the same in the mean."""
    count = max(1, round(fraction * len(x)))
    # an overflow must reach the result, where a gradient scaler looks for it
    norms = gradients.float().norm(dim=1).nan_to_num(1e30, posinf=1e30).clamp_min(1e-30)
    chances = norms / norms.sum()
    drawn = chances.multinomial(count, replacement=True)
    return gradients[drawn] / (count * chances[drawn])[:, None].to(gradients.dtype), x[drawn]
