"""Puts a decomposition into a network: its weights are generated from coefficients at every use."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.bank import Decomposition, TemplateBank
from recast_pl.decomposition.solve import project
from recast_pl.errors import DecompositionError


class Mixture(nn.Module):
    """The parametrization of one weight: equations 1 and 2, from coefficients (K, n) to a weight (*shape).

    Args:
        bank: The group's templates.
        coefficient_sets: K.
        owner: Whether the bank is registered here. One layer of each group owns it and the others refer to it, so
            that it appears once in the module tree and the state dict, and no container gets a child it would call.
    """

    bank: TemplateBank

    def __init__(self, bank: TemplateBank, coefficient_sets: int, owner: bool) -> None:
        super().__init__()
        self.coefficient_sets = coefficient_sets
        if owner:
            self.bank = bank
        else:
            self.__dict__["bank"] = bank

    def forward(self, coefficients: Tensor) -> Tensor:
        """The weight (*shape) that coefficients (K, n) stand for."""
        return self.bank.mix(coefficients)

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
        parameter = model.get_submodule(path)._parameters.get(attribute)
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
