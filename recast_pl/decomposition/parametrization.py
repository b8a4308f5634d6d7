"""Installs a decomposition in a network: its weights are generated from coefficients at every use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.compat.torch import convolve
from recast_pl.decomposition.bank import Decomposition, TemplateBank
from recast_pl.decomposition.solve import project
from recast_pl.decomposition.targets import check_values
from recast_pl.errors import DecompositionError


class Inputs:
    """The input of a layer, as rows that the weight of the layer multiplies.

    Args:
        layer: A layer with a weight (rows, *columns), whose columns are flattened here.
        x: Its input (B, …), of B samples.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.size: tuple[int, ...] | None = None
        """Height and width of the output of a convolution; None until `times` or `products` has computed them."""

    def rows(self) -> Tensor:
        """The N rows of each sample (B, N, columns): its tokens, or the patches under the kernel."""
        layer, x = self.layer, self.x
        if isinstance(layer, nn.Linear):
            return x.reshape(len(x), -1, x.shape[-1])  # (B, …, columns) to (B, N, columns)
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # type: ignore[arg-type]

    def times(self, matrix: Tensor) -> Tensor:
        """Products (B, N, m) of all rows with a matrix (m, columns)."""
        layer, x = self.layer, self.x
        if isinstance(layer, nn.Linear):
            return F.linear(self.rows(), matrix)
        return self.products(convolve(layer, x, matrix.view(len(matrix), -1, *layer.kernel_size)))

    def products(self, output: Tensor) -> Tensor:
        """Reshapes the output of the layer to products (B, N, rows)."""
        if isinstance(self.layer, nn.Linear):
            return output.reshape(len(output), -1, output.shape[-1])
        self.size = output.shape[2:]
        return output.flatten(2).mT

    def output(self, y: Tensor) -> Tensor:
        """Reshapes products (B, N, rows) to the output of the layer."""
        return y.view(*self.x.shape[:-1], -1) if self.size is None else y.mT.unflatten(2, self.size)


def multiplies_only(layer: nn.Module) -> bool:
    """Whether a layer multiplies its input by its weight as `Inputs` does, adds its bias, and does no more."""
    if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer).forward is nn.Linear.forward


class Mixture(nn.Module):
    """The parametrization of one weight: equations 1 and 2, from coefficients (K, n) to a weight (*shape).

    Args:
        bank: The templates of the group.
        coefficient_sets: K.
        owner: Whether to register the bank here. One layer of each group owns the bank and the others only refer to
            it, so that it appears once in the module tree and in the state dict.
    """

    bank: TemplateBank
    workspace: Tensor | None = None
    """Memory (*shape) for the generated weight, if nothing is trained and nothing else uses it; None for new memory."""

    def __init__(self, bank: TemplateBank, coefficient_sets: int, owner: bool) -> None:
        super().__init__()
        self.coefficient_sets = coefficient_sets
        if owner:
            self.bank = bank
        else:
            self.__dict__["bank"] = bank

    def forward(self, coefficients: Tensor) -> Tensor:
        """The weight (*shape) of coefficients (K, n)."""
        return self.bank.mix(coefficients, self.workspace)

    def product(self, inputs: Inputs, coefficients: Tensor) -> Tensor:
        """Multiplies each sample by the weight of its own coefficients, without generating these weights.

        Args:
            inputs: B samples.
            coefficients: (B, K, n).

        Returns:
            Σ_i c_bi·T_i·x_b (B, N, rows).
        """
        first, *factors = coefficients.mean(1).T[..., None, None]  # n times (B, 1, 1)
        template, *templates = self.bank.templates.flatten(2)  # n times (rows, columns)
        y = inputs.times(template).mul_(first)
        for factor, template in zip(factors, templates, strict=True):
            y.addcmul_(inputs.times(template), factor)
        return y

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """The coefficients (K, n) nearest to a dense weight, equal in all sets."""
        coefficients = project(weight, self.bank.templates).repeat(self.coefficient_sets, 1)
        return (coefficients,)  # a tuple, because torch would write a bare tensor into the pretrained parameter


def install(model: nn.Module, decomposition: Decomposition) -> dict[str, nn.Parameter]:
    """Replaces weights of a network by templates and coefficients, in place.

    Args:
        model: The network that was decomposed, still with its dense weights. The templates take over the type and
            device of these weights.
        decomposition: Templates and coefficients.

    Returns:
        The coefficients (K, n) of each target by name. Only they can be trained; templates are frozen.

    Raises:
        DecompositionError: As for `check_fits`.
    """
    check_fits(model, decomposition)
    installed: dict[str, nn.Parameter] = {}
    for bank in decomposition.banks:
        weight = model.get_parameter(bank.group.targets[0])
        templates = TemplateBank(bank.templates.to(weight, copy=True))
        for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
            path, _, attribute = name.rpartition(".")
            module, owner = model.get_submodule(path), name == bank.group.targets[0]
            parametrize.register_parametrization(module, attribute, Mixture(templates, len(values), owner))
            installed[name] = getattr(module.parametrizations, attribute).original0
            with torch.no_grad():  # exactly those of the decomposition, which the projection gives only up to rounding
                installed[name].copy_(values).requires_grad_()
    return installed


def check_fits(model: nn.Module, decomposition: Decomposition) -> None:
    """Checks that a network has, as parameters, the weights that a decomposition stands for.

    Raises:
        DecompositionError: If a target is missing, of another shape, or decomposed already, or if the weights of a
            group have no finite values or differ in type or device.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for bank in decomposition.banks:
        for name in bank.group.targets:
            found = tuple(parameters[name].shape) if name in parameters else "no such weight"
            if found != bank.group.shape:
                raise DecompositionError(
                    f"the decomposition has {name} of shape {bank.group.shape}, the backbone has {found}; "
                    "use the backbone that was decomposed, and decompose each weight once"
                )
        check_values({name: parameters[name] for name in bank.group.targets})
