"""Puts a decomposition into a network: its weights are generated from coefficients at every use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.compat.torch import convolve
from recast_pl.decomposition.bank import Decomposition, TemplateBank
from recast_pl.decomposition.solve import project
from recast_pl.errors import DecompositionError


class Inputs:
    """What a layer is given, as rows that its weight multiplies.

    Args:
        layer: With a weight (rows, *columns), whose columns are flattened here.
        x: Its input (B, …), of B samples.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        self.layer, self.x = layer, x
        self.size: tuple[int, ...] | None = None
        """Height and width of the output of a convolution, once it is known."""

    def rows(self) -> Tensor:
        """The N rows of each sample (B, N, columns): its tokens, or the patches under a kernel."""
        layer, x = self.layer, self.x
        if isinstance(layer, nn.Linear):
            return x.reshape(len(x), -1, x.shape[-1])  # (B, …, columns) to (B, N, columns)
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # type: ignore[arg-type]

    def times(self, matrix: Tensor) -> Tensor:
        """Products (B, N, m) of all rows with a matrix (m, columns)."""
        layer, x = self.layer, self.x
        if isinstance(layer, nn.Linear):
            return F.linear(self.rows(), matrix)
        maps: Tensor = convolve(layer, x, matrix.view(len(matrix), -1, *layer.kernel_size))  # (B, m, H, W)
        self.size = maps.shape[2:]
        return maps.flatten(2).mT  # (B, N, m)

    def output(self, y: Tensor) -> Tensor:
        """Products (B, N, rows) in the shape of the layer's output."""
        return y.view(*self.x.shape[:-1], -1) if self.size is None else y.mT.unflatten(2, self.size)


class Mixture(nn.Module):
    """The parametrization of one weight: equations 1 and 2, from coefficients (K, n) to a weight (*shape).

    Args:
        bank: The group's templates.
        coefficient_sets: K.
        owner: Whether the bank is registered here. One layer of each group owns it and the others refer to it, so
            that it appears once in the module tree and the state dict, and no container gets a child it would call.
    """

    bank: TemplateBank
    room: Tensor | None = None
    """Memory (*shape) for the weight, where nothing is trained and no other weight needs it; None for new memory."""

    def __init__(self, bank: TemplateBank, coefficient_sets: int, owner: bool) -> None:
        super().__init__()
        self.coefficient_sets = coefficient_sets
        if owner:
            self.bank = bank
        else:
            self.__dict__["bank"] = bank

    def forward(self, coefficients: Tensor) -> Tensor:
        """The weight (*shape) that coefficients (K, n) stand for."""
        return self.bank.mix(coefficients, self.room)

    def product(self, inputs: "Inputs", coefficients: Tensor) -> Tensor:
        """What becomes of samples, each multiplied by the weight of its own coefficients, which is not generated.

        Args:
            inputs: Of B samples.
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
        """The coefficients (K, n) nearest to a dense weight, in all sets the same.

        They come as a 1-tuple: a bare tensor would be written into the pretrained parameter in place.
        """
        coefficients = project(weight, self.bank.templates)
        return (coefficients.repeat(self.coefficient_sets, 1),)


def install(model: nn.Module, decomposition: Decomposition) -> dict[str, nn.Parameter]:
    """Replaces weights of a network by templates and coefficients, in place.

    Args:
        model: The network the decomposition was made of, not yet decomposed.
        decomposition: Its templates and coefficients.

    Returns:
        The coefficients (K, n) of each target by name. They alone are to be trained; templates are frozen.

    Raises:
        DecompositionError: If a target is missing, of another shape, or decomposed already.
    """
    check_fits(model, decomposition)
    installed: dict[str, nn.Parameter] = {}
    for bank in decomposition.banks:
        templates = TemplateBank(bank.templates.clone())
        for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
            mixture = Mixture(templates, len(values), owner=name == bank.group.targets[0])
            installed[name] = _parametrize(model, name, mixture, values)
    return installed


def check_fits(model: nn.Module, decomposition: Decomposition) -> None:
    """Makes sure that a network has, as parameters, the weights that a decomposition stands for.

    Args:
        model: The network.
        decomposition: The decomposition.

    Raises:
        DecompositionError: If a target is missing, of another shape, or decomposed already.
    """
    for bank in decomposition.banks:
        for name in bank.group.targets:
            _check_target(model, name, bank.group.shape)


def _check_target(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, attribute = name.rpartition(".")
    try:
        parameter = dict(model.get_submodule(path).named_parameters(recurse=False)).get(attribute)
    except AttributeError:
        parameter = None
    if parameter is None or tuple(parameter.shape) != shape:
        found = tuple(parameter.shape) if parameter is not None else "no such weight"
        raise DecompositionError(
            f"the decomposition has {name} of shape {shape}, the backbone has {found}; "
            "use the backbone that was decomposed, and decompose each weight once"
        )


def _parametrize(model: nn.Module, name: str, mixture: Mixture, values: Tensor) -> nn.Parameter:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, attribute, mixture)
    original = getattr(module.parametrizations, attribute).original0
    assert isinstance(original, nn.Parameter)
    with torch.no_grad():
        original.copy_(values)  # the decomposition's own values, where the projection agrees only to rounding
    original.requires_grad_()
    return original
