"""How near a decomposed network is to the dense one: in its weights, and in what its layers give."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from recast_pl.backbones.backbone import Backbone
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.parametrization import check_fits


@dataclass(frozen=True)
class TargetSimilarity:
    """How near a generated weight is to the pretrained one.

    Args:
        name: Of the weight.
        cosine: Of the two, flattened.
        relative_error: ‖W* − W‖ / ‖W‖.
    """

    name: str
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class FeatureSimilarity:
    """How near the features of the decomposed network are to those of the dense one.

    Args:
        name: Of the module whose output is compared; `features` for what the network returns.
        kind: `layer` for a module with a generated weight, `block` for the repeated part of the network around it, or
            `features`.
        mean: Cosine of the flattened outputs for an image, mean over images.
        lowest: Its lowest value.
    """

    name: str
    kind: str
    mean: float
    lowest: float


@torch.no_grad()
def weight_similarity(decomposition: Decomposition, network: nn.Module) -> tuple[TargetSimilarity, ...]:
    """Compares generated weights with those of the network that was decomposed.

    Args:
        decomposition: The decomposition.
        network: With dense weights.

    Raises:
        DecompositionError: If the network has no such weights.
    """
    check_fits(network, decomposition)
    found = []
    for name, weight in decomposition.reconstruct().items():
        ours, theirs = weight.double().flatten(), network.get_parameter(name).double().flatten()
        cosine = float(F.cosine_similarity(ours, theirs, dim=0))
        found.append(TargetSimilarity(name, cosine, float((ours - theirs).norm() / theirs.norm())))
    return tuple(found)


@torch.no_grad()
def feature_similarity(
    decomposition: Decomposition, backbone: Backbone, batches: Iterable[Tensor]
) -> tuple[FeatureSimilarity, ...]:
    """Compares the features of the decomposed network with those of the dense one, module by module (section 3.2).

    Args:
        decomposition: The decomposition.
        backbone: With dense weights; it is not changed.
        batches: Images (B, 3, S, S) in [0, 1]. All outputs of a batch are held at once.

    Returns:
        Of each module with a generated weight, of each block around one, and of the network, in order of computation.

    Raises:
        DecompositionError: If the backbone has no such weights.
    """
    check_fits(backbone.net, decomposition)
    generated = {f"net.{name}": weight for name, weight in decomposition.reconstruct().items()}
    sites = _sites(backbone.net, decomposition)
    found: dict[str, list[Tensor]] = {}
    for images in batches:
        dense, decomposed = (_outputs(backbone, sites, weights, images) for weights in ({}, generated))
        for name, output in dense.items():
            found.setdefault(name, []).append(cosines(output, decomposed[name]))  # (B,)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    kinds = sites | {"features": "features"}
    return tuple(FeatureSimilarity(n, kinds[n], float(c.mean()), float(c.min())) for n, c in joined.items())


@contextmanager
def recorded(network: nn.Module, modules: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A context that keeps what modules give.

    Args:
        network: The network.
        modules: Names of modules in it.

    Yields:
        The last output of each by name, in the order in which they are computed; of one that gives several things, such
        as attention and its weights, the first.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = (output if isinstance(output, Tensor) else next(iter(output))).detach()

        return hook

    with ExitStack() as hooks:
        for name in modules:
            hooks.callback(network.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield outputs


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosines (B,) in float64 of each image's flattened outputs, (B, ...) and (B, ...)."""
    return F.cosine_similarity(left.flatten(1).double(), right.flatten(1).double(), dim=1)


def _sites(network: nn.Module, decomposition: Decomposition) -> dict[str, str]:
    """Modules whose outputs are compared, with their kinds."""
    lists = {path for path, module in network.named_modules() if isinstance(module, nn.Sequential | nn.ModuleList)}
    sites: dict[str, str] = {}
    for bank in decomposition.banks:
        for target in bank.group.targets:
            layer = target.rpartition(".")[0]
            sites[layer] = "layer"
            parts = [layer[: match.start()] for match in re.finditer(r"\.|$", layer)]
            inside = (part for part in parts if part.rpartition(".")[0] in lists)  # the outermost first
            sites.setdefault(next(inside, layer), "block")
    return sites


def _outputs(backbone: Backbone, sites: Iterable[str], weights: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Outputs of modules, and the features, with some weights exchanged."""
    with recorded(backbone.net, sites) as outputs:
        features = functional_call(backbone, weights, (images,))
    return outputs | {"features": features.detach()}
