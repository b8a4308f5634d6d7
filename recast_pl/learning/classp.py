"""CLASSP: an optimizer that moves an entry only for a large gradient, and less the more it has moved before.

Ludwig, "CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment Suppression and Sparsity
Promotion", 2024 (arXiv:2405.09637).

    where g² > threshold:  a ← a + |g|^p  and  w ← w − lr · g / (ε + a)^(1/p);  elsewhere neither changes

With p = 2 and a threshold of 0 this is AdaGrad. The published code differs from the paper's text: it compares the
threshold with whether *any* entry of a tensor has a gradient, and then moves all of them; and it discards the power of
|g|. Here both are as in the text. As in the code, a contains the present gradient: without it, the first step of an
entry would be lr·g/ε^(1/p), with the default values 20,000 times the gradient.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from recast_pl.errors import RunError


class CLASSP(Optimizer):
    """Moves entries with a large gradient, each at a rate that falls with its gradients so far (Ludwig, 2024).

    The state `sum` of a parameter (*shape) is a, the sum of |g|^p over the steps in which an entry moved. Each task has
    an optimizer of its own; the piece `GradientSums` lets the sums go on from task to task, as in the paper.

    Args:
        params: Parameters, or groups of them, each of which may have values of its own for the others.
        lr: Learning rate, at least 0. With p = 1, it is the distance that an entry moves the first time.
        threshold: What the square of a gradient's entry must exceed, at least 0. Clipping and the mean over a batch
            make gradients smaller; it is compared with what is left.
        power: p, above 0.
        epsilon: ε, above 0.

    Raises:
        RunError: If a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.2,
        threshold: float = 0.5,
        power: float = 1.0,
        epsilon: float = 1e-5,
    ) -> None:
        if lr < 0 or threshold < 0:
            raise RunError(f"CLASSP: lr={lr} and threshold={threshold} must not be negative")
        if power <= 0 or epsilon <= 0:
            raise RunError(f"CLASSP: power={power} and epsilon={epsilon} must be above 0")
        super().__init__(params, {"lr": lr, "threshold": threshold, "power": power, "epsilon": epsilon})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, whose sums begin at 0."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["sum"] = torch.zeros_like(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step, after `closure`, if there is one, has computed the loss and its gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        summed, gradient = self.state[parameter]["sum"], parameter.grad
        assert gradient is not None
        gradient = torch.where(gradient.square() > group["threshold"], gradient, 0)
        summed += gradient.abs() ** group["power"]
        parameter.addcdiv_(gradient, (group["epsilon"] + summed) ** (1 / group["power"]), value=-group["lr"])
