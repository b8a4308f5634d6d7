"""Which weights are decomposed, and which of them share a template bank."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn

from recast_pl.decomposition.solve import Basis
from recast_pl.errors import DecompositionError

Shape = tuple[int, ...]

_DECOMPOSABLE = {nn.Linear: "weight", nn.Conv2d: "weight", nn.MultiheadAttention: "in_proj_weight"}


@dataclass(frozen=True)
class BankLayout:
    r"""How weights share template banks (section 3.1 and 3.3 of the paper).

    Layers of one kind (names equal but for their numbers, shapes equal) are divided, in order of depth, into
    groups of consecutive layers; each group has a template bank of its own.

    Args:
        targets: Regular expressions, searched in the names of weights of `nn.Linear`, `nn.Conv2d` and
            `nn.MultiheadAttention` (`in_proj_weight`), such as `mlp\.fc[12]\.weight`.
        groups: G, the number of groups of each kind; it must divide the number of layers. None, with no
            `layers_per_group` either, is one group.
        layers_per_group: Layers that share a bank, instead of G; the last group holds the rest.
        templates: n, the templates of each bank. None for as many as the group has layers, which is exact.
        coefficient_sets: K. Sets are averaged, so that K > 1 is algebraically redundant (equation 2); it is
            kept for comparison with the paper.
        basis: Which templates, of those that the closed form may choose from with equal error: `svd`, the leading
            singular directions of the group; `layers`, the weights of the layers themselves, with a coefficient of 1
            each, which needs n = L; `random`, a rotation of `svd` drawn anew, but always the same, for each group.
    """

    targets: Sequence[str]
    groups: int | None = None
    layers_per_group: int | None = None
    templates: int | None = None
    coefficient_sets: int = 1
    basis: Basis = "svd"


@dataclass(frozen=True)
class Group:
    """Layers that share one template bank.

    Args:
        name: The kind of layer, with its numbers as `*`, and the number of the group: `mlp.*.fc1.weight:0`.
        targets: The names of the weights, in order of depth.
        shape: The shape of each weight.
        templates: n, the templates of the bank.
    """

    name: str
    targets: tuple[str, ...]
    shape: Shape
    templates: int

    @property
    def kind(self) -> str:
        """The name without the number of the group."""
        return self.name.rpartition(":")[0]


def find_targets(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Parameter]:
    """Finds the weights whose names match.

    Args:
        model: Any module.
        patterns: Regular expressions, see `BankLayout.targets`.

    Returns:
        Weights by name, in the order in which the model lists them.

    Raises:
        DecompositionError: If a pattern is invalid or matches nothing.
    """
    candidates = _candidates(model)
    matched = set()
    for pattern in patterns:
        found = {name for name in candidates if _compile(pattern).search(name)}
        if not found:
            examples = ", ".join(list(candidates)[:3]) or "none"
            raise DecompositionError(
                f"target {pattern!r} matches none of the {len(candidates)} weights that can be decomposed "
                f"(such as {examples}); correct the pattern"
            )
        matched |= found
    return {name: weight for name, weight in candidates.items() if name in matched}


def group_targets(shapes: Mapping[str, Shape], layout: BankLayout) -> list[Group]:
    """Divides weights into groups that share a bank.

    Args:
        shapes: Shape of each target, in order of depth.
        layout: How to share.

    Returns:
        The groups, in order of depth of their first layer within each kind.

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
            groups.append(Group(name, members, shape, _templates(name, members, layout)))
    return groups


def weight_sites(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The weights of linear, convolution and attention layers, whether they are parameters or generated.

    Args:
        model: Any module.

    Returns:
        For the name of each weight its layer and the layer's attribute, in the order in which the model lists them.
    """
    sites: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for kind, attribute in _DECOMPOSABLE.items():
            if isinstance(module, kind) and getattr(module, attribute) is not None:
                assert isinstance(module, nn.Module)  # which the type checker forgets
                sites[f"{path}.{attribute}".lstrip(".")] = (module, attribute)
    return sites


def _candidates(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights that can be decomposed; those generated already are no parameters of their layer any more."""
    found = {}
    for name, (module, attribute) in weight_sites(model).items():
        parameter = dict(module.named_parameters(recurse=False)).get(attribute)
        if parameter is not None:
            found[name] = parameter
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as cause:
        raise DecompositionError(f"target {pattern!r} is no regular expression ({cause}); correct it") from cause


def _check_layout(layout: BankLayout) -> None:
    if layout.groups is not None and layout.layers_per_group is not None:
        raise DecompositionError(
            f"groups={layout.groups} and layers_per_group={layout.layers_per_group} exclude each other; give one"
        )
    for name in ("groups", "layers_per_group", "templates", "coefficient_sets"):
        value = getattr(layout, name)
        if value is not None and value < 1:
            raise DecompositionError(f"{name}={value} must be at least 1")
    if layout.basis not in get_args(Basis):
        raise DecompositionError(f"basis={layout.basis!r} is none of {', '.join(get_args(Basis))}; choose one")


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


def _templates(name: str, members: Sequence[str], layout: BankLayout) -> int:
    wanted = layout.templates or len(members)
    if wanted > len(members):
        raise DecompositionError(
            f"templates={wanted} is more than the {len(members)} layers of group {name}, which "
            f"{len(members)} templates represent exactly; lower templates, or leave it out"
        )
    if layout.basis == "layers" and wanted < len(members):
        raise DecompositionError(
            f"basis='layers' takes each of the {len(members)} layers of group {name} as a template, templates={wanted} "
            "has room for fewer; leave templates out, or choose basis='svd'"
        )
    return wanted
