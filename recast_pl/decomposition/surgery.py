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
    """

    def __init__(self, bank: TemplateBank, coefficient_sets: int) -> None:
        super().__init__()
        # referred to without being registered: the bank appears once in the module tree, not in every layer
        self.__dict__["bank"] = bank
        self.coefficient_sets = coefficient_sets

    def forward(self, coefficients: Tensor) -> Tensor:
        """The weight (*shape) that coefficients (K, n) stand for."""
        bank: TemplateBank = self.__dict__["bank"]
        return bank.mix(coefficients)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """The coefficients (K, n) nearest to a dense weight, in all sets the same.

        They come as a 1-tuple: a bare tensor would be written into the pretrained parameter in place.
        """
        coefficients = project(weight, self.__dict__["bank"].templates)
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
    for bank in decomposition.banks:
        for name in bank.group.targets:
            _check_target(model, name, bank.group.shape)
    banks = nn.ModuleList(TemplateBank(bank.templates.clone()) for bank in decomposition.banks)
    installed: dict[str, nn.Parameter] = {}
    for bank, module in zip(decomposition.banks, banks, strict=True):
        assert isinstance(module, TemplateBank)
        for name, values in zip(bank.group.targets, bank.coefficients, strict=True):
            installed[name] = _parametrize(model, name, module, values)
    model.add_module("template_banks", banks)
    return installed


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


def _parametrize(model: nn.Module, name: str, bank: TemplateBank, values: Tensor) -> nn.Parameter:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, attribute, Mixture(bank, len(values)))
    original = getattr(module.parametrizations, attribute).original0
    assert isinstance(original, nn.Parameter)
    with torch.no_grad():
        original.copy_(values)  # the decomposition's own values, where the projection agrees only to rounding
    original.requires_grad_()
    return original
