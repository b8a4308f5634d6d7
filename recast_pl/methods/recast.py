"""RECAST: weights are mixed from shared templates, and a task is the coefficients of the mixture.

Tasnim and Plummer, "RECAST: Reparameterized, Compact weight Adaptation for Sequential Tasks", ICLR 2025.

    W = 1/K Σ_k Σ_i C_ki · T_i      (equations 1 and 2)

T are the n templates that a group of layers shares, C the K sets of n coefficients of one layer. Only C is trained.

Deviations: templates and the first coefficients are by default solved in closed form rather than fitted by gradient,
and a patch stores the mean over the K sets, which is all that equation 2 uses.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import MethodError
from recast_pl.methods.gradient_sampling import sample_gradients
from recast_pl.methods.piece import check_state
from recast_pl.methods.templates import TemplatePiece


class Recast(TemplatePiece):
    """RECAST: a task is the coefficients with which frozen templates are mixed into weights (equations 1 and 2).

    Args:
        layout: Which weights share templates, and how many; they are solved in closed form when training starts.
        decomposition: Path of a `decomposition.safetensors` to use instead, from `MimicryModule` or another run.
        learning_rate: Learning rate of the coefficients; None for that of the head.
        gradient_tokens: Fraction of the tokens from which the gradient of the coefficients is estimated, without bias.
            1 is exact; 0.25 is faster where MLPs of a vision transformer are decomposed.

    Raises:
        DecompositionError: If neither or both of layout and decomposition are given.
        MethodError: If `gradient_tokens` is not above 0 and at most 1, or is below 1 with a target that is not a
            weight of `nn.Linear`.
    """

    linear = True

    def __init__(
        self,
        layout: BankLayout | None = None,
        decomposition: str | None = None,
        learning_rate: float | None = None,
        gradient_tokens: float = 1.0,
    ) -> None:
        super().__init__(layout, decomposition, learning_rate)
        if not 0 < gradient_tokens <= 1:
            raise MethodError(f"Recast: gradient_tokens={gradient_tokens} must be above 0 and at most 1")
        self.gradient_tokens = gradient_tokens

    def attach(self, network: nn.Module) -> None:
        """Decomposes the network, or loads the given decomposition, and installs it."""
        super().attach(network)
        for name in self.parameters if self.gradient_tokens < 1 else ():
            path, _, attribute = name.rpartition(".")
            layer = network.get_submodule(path)
            if not (isinstance(layer, nn.Linear) and attribute == "weight"):
                raise MethodError(
                    f"Recast: gradient_tokens={self.gradient_tokens} needs weights of nn.Linear, which {name} is not; "
                    "set it to 1, or remove the target"
                )
            sample_gradients(layer, self.gradient_tokens)

    @torch.no_grad()
    def begin_task(self) -> None:
        """Every task starts from the coefficients of the pretrained weights."""
        for bank in self.decomposition.banks:
            for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
                self.parameters[name].data = values.to(self.parameters[name].device, copy=True)  # (K, n)

    def task_state(self) -> dict[str, Tensor]:
        """The mean over the sets of each weight's coefficients, in one tensor (Σ n,): naming each costs 80 bytes."""
        means = [parameter.detach().mean(0) for parameter in self.parameters.values()]
        return {"coefficients": torch.cat(means).cpu()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads the means as a single set (1, n), for which equation 2 gives exactly the same bits."""
        check_state("Recast", state, {"coefficients": (sum(p.shape[1] for p in self.parameters.values()),)})
        for parameter, (mean,) in self.unpack({"coefficients": state["coefficients"][None]}).items():
            parameter.data = mean.to(parameter.device, copy=True)  # (1, n)

    @torch.no_grad()
    def continue_from(self, state: dict[str, Tensor]) -> None:
        """All sets of coefficients start from their mean, which is what a patch keeps."""
        sets = {name: len(parameter) for name, parameter in self.parameters.items()}
        self.load_task_state(state)
        for name, parameter in self.parameters.items():
            parameter.data = parameter.repeat(sets[name], 1)  # (K, n)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """The means of T tasks as sets (T, 1, n) of each weight, in single precision whatever the network has."""
        means = states["coefficients"].float().split([p.shape[1] for p in self.parameters.values()], 1)  # each (T, n)
        return {parameter: mean[:, None] for parameter, mean in zip(self.parameters.values(), means, strict=True)}
