"""Which weights are decomposed, and which of them share a template bank."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recast_pl.decomposition.quantization import TemplatePrecision
from recast_pl.decomposition.solve import Basis
from recast_pl.errors import DecompositionError

Shape = tuple[int, ...]

_DECOMPOSABLE = {nn.Linear: "weight", nn.Conv2d: "weight", nn.MultiheadAttention: "in_proj_weight"}


@dataclass(frozen=True)
class BankLayout:
    r"""How weights share template banks (sections 3.1 and 3.3 of the paper).

    Weights of one kind have equal shapes and names, except for parts of a name that are numbers, as in `blocks.3`. In
    order of depth, they are divided into groups of consecutive layers, and each group has its own template bank.

    Args:
        targets: Regular expressions, searched in the names of weights of `nn.Linear`, `nn.Conv2d` and
            `nn.MultiheadAttention` (`in_proj_weight`), such as `mlp\.fc[12]\.weight`.
        groups: G, the number of groups of each kind; it must divide the number of layers. None, with no
            `layers_per_group` either, means one group.
        layers_per_group: Number of layers that share a bank, instead of G; the last group takes the rest.
        templates: n, the number of templates of each bank. None for as many as the group has layers, which is exact.
        coefficient_sets: K. The sets are averaged, so K > 1 is algebraically redundant (equation 2); it is kept for
            comparison with the paper.
        basis: Which of the equally good templates the closed form returns: `svd`, the leading singular directions of
            the group; `layers`, the weights of the layers themselves times a constant, which needs n = L;
            `random`, a random rotation of `svd`, fixed for each group.
        precision: How a file holds the templates. `full`: in the type of the weights. `int8`: in 8 bits per number,
            with a scale for each output channel; `int8_power`: with levels closer together near 0. Rounded templates
            change the network a little, before any task is learnt. In memory they are in full precision.
    """

    targets: Sequence[str]
    groups: int | None = None
    layers_per_group: int | None = None
    templates: int | None = None
    coefficient_sets: int = 1
    basis: Basis = "svd"
    precision: TemplatePrecision = "full"


@dataclass(frozen=True)
class Group:
    """Layers that share one template bank.

    Args:
        name: The kind of weight, with `*` for its numbers, and the number of the group: `mlp.*.fc1.weight:0`.
        targets: The names of the weights, in order of depth.
        shape: The shape of each weight.
        templates: n, the number of templates of the bank.
    """

    name: str
    targets: tuple[str, ...]
    shape: Shape
    templates: int

    @property
    def kind(self) -> str:
        """The name without the number of the group."""
        return self.name.rpartition(":")[0]


def weight_owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Finds the weights of linear, convolution and attention layers, both parameters and generated weights.

    Returns:
        For the name of each weight, the layer that owns it and the layer's attribute, in the order of the model.
    """
    owners: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        attribute = next((name for kind, name in _DECOMPOSABLE.items() if isinstance(module, kind)), None)
        if attribute is not None and getattr(module, attribute) is not None:
            owners[f"{path}.{attribute}".lstrip(".")] = (module, attribute)
    return owners


def find_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Finds the weights whose names match a pattern (see `BankLayout.targets`), in the order of the model.

    Raises:
        DecompositionError: If there are no patterns, if one is invalid or matches nothing, or if a weight is tied to
            another or not initialised.
    """
    if isinstance(patterns, str) or not patterns:
        raise DecompositionError(f"targets={patterns!r} must be a list of regular expressions; give at least one")
    owners = weight_owners(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    candidates = {name: parameters[name] for name in owners if name in parameters}  # the others are generated already
    matched = {name for p in patterns for name in _search(p, list(candidates), [*owners, *parameters])}
    targets = {name: weight for name, weight in candidates.items() if name in matched}
    _check_parameters(model, targets)
    return targets


def check_values(weights: Mapping[str, Tensor]) -> None:
    """Raises DecompositionError unless weights can share a bank: finite real numbers of one type on one device."""
    for name, weight in weights.items():
        if weight.is_meta or not weight.is_floating_point() or not weight.isfinite().all():
            found = "is on the meta device" if weight.is_meta else f"({weight.dtype}) is not all finite real numbers"
            raise DecompositionError(f"weight {name} {found}; load the backbone's weights before decomposing it")
    (first, reference), *others = weights.items()
    for name, weight in others:
        if (weight.dtype, weight.device) != (reference.dtype, reference.device):
            raise DecompositionError(
                f"{first} is {reference.dtype} on {reference.device} but {name} is {weight.dtype} on {weight.device}; "
                "weights that share a bank need one type and device: convert the backbone, or change the layout"
            )


def check_least(least: float, **settings: float | None) -> None:
    """Raises DecompositionError if a setting is below a number."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise DecompositionError(f"{name}={value} must be at least {least}")


def compiled(pattern: str, role: str) -> re.Pattern[str]:
    """A regular expression; raises DecompositionError, which calls it by its role, if the pattern is none."""
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise DecompositionError(f"{role} {pattern!r} is not a regular expression ({cause}); correct it") from cause


def group_targets(shapes: Mapping[str, Shape], layout: BankLayout) -> list[Group]:
    """Divides weights into groups that share a bank.

    Args:
        shapes: Shape of each target, in order of depth.
        layout: How to share.

    Returns:
        The groups, kind by kind, in order of depth within each kind.

    Raises:
        DecompositionError: If the layout does not fit the layers.
    """
    _check_layout(layout)
    kinds: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in shapes.items():
        kinds.setdefault((re.sub(r"(?<![^.])\d+(?=\.)", "*", name), shape), []).append(name)
    groups: list[Group] = []
    for (kind, shape), names in kinds.items():
        size = _group_size(kind, len(names), layout)
        for start in range(0, len(names), size):
            members = tuple(names[start : start + size])
            name = f"{kind}:{sum(g.kind == kind for g in groups)}"
            groups.append(Group(name, members, shape, _template_count(name, len(members), layout)))
    return groups


def _search(pattern: str, candidates: Sequence[str], others: Sequence[str]) -> list[str]:
    """The candidates that match a pattern. If there are none, another match may help to correct the pattern."""
    search = compiled(pattern, "target").search
    found = [name for name in candidates if search(name)]
    if not found:
        examples = ", ".join(candidates[:3]) or "none"
        other = next((name for name in others if search(name)), None)
        hint = f", only {other}, which is generated already or not of a linear, convolution or attention layer"
        raise DecompositionError(
            f"target {pattern!r} matches none of the {len(candidates)} weights that can be decomposed "
            f"(such as {examples}){hint if other else ''}; correct the pattern"
        )
    return found


def _check_parameters(model: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
    """Refuses weights without a shape, and tied weights, which would get coefficients of their own."""
    users: dict[nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users[parameter].append(f"{path}.{attribute}".lstrip("."))
    for name, weight in targets.items():
        if is_lazy(weight):
            raise DecompositionError(f"weight {name} has no shape yet; call the network once before decomposing it")
        if len(users[weight]) > 1:
            raise DecompositionError(
                f"{' and '.join(users[weight])} are one tied weight, which a decomposition would separate; "
                "leave it out of the targets"
            )


def _check_layout(layout: BankLayout) -> None:
    if layout.groups is not None and layout.layers_per_group is not None:
        raise DecompositionError(
            f"groups={layout.groups} and layers_per_group={layout.layers_per_group} exclude each other; give one"
        )
    names = ("groups", "layers_per_group", "templates", "coefficient_sets")
    check_least(1, **{name: getattr(layout, name) for name in names})
    for name, choices in (("basis", get_args(Basis)), ("precision", get_args(TemplatePrecision))):
        if getattr(layout, name) not in choices:
            raise DecompositionError(f"{name}={getattr(layout, name)!r} is unknown; choose one of {', '.join(choices)}")


def _group_size(kind: str, layers: int, layout: BankLayout) -> int:
    if layout.layers_per_group is not None:
        return layout.layers_per_group
    groups = layout.groups or 1
    if layers % groups:
        divisors = ", ".join(str(d) for d in range(1, layers + 1) if layers % d == 0)
        raise DecompositionError(
            f"groups={groups} does not divide the {layers} layers of {kind}; choose one of {divisors}, "
            "or set layers_per_group instead"
        )
    return layers // groups


def _template_count(name: str, layers: int, layout: BankLayout) -> int:
    wanted = layout.templates or layers
    if wanted > layers:
        raise DecompositionError(
            f"templates={wanted} is more than the {layers} layers of group {name}, which {layers} templates represent "
            "exactly; lower templates, or leave it out"
        )
    if layout.basis == "layers" and wanted < layers:
        raise DecompositionError(
            f"basis='layers' takes each of the {layers} layers of group {name} as a template, but templates={wanted}; "
            "leave templates out, or choose basis='svd'"
        )
    return wanted
