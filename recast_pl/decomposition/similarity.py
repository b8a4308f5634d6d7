"""How similar a decomposed network is to the dense one: in its weights, and in the outputs of its layers."""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
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
    """Comparison of a generated weight W* with the pretrained weight W.

    Args:
        name: Name of the weight.
        cosine: Cosine similarity of the two flattened weights.
        relative_error: ‖W* − W‖ / ‖W‖ in the Frobenius norm.
    """

    name: str
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class FeatureSimilarity:
    """Comparison of the outputs of one module in the decomposed and in the dense network.

    Args:
        name: Name of the module; `features` for the output of the network.
        kind: `layer` for a module with a generated weight, `block` for the repeated part of the network around it, or
            `features`.
        mean: Cosine similarity of the flattened outputs for one image, mean over images.
        lowest: The lowest of these similarities.
    """

    name: str
    kind: str
    mean: float
    lowest: float


@torch.no_grad()
def weight_similarity(decomposition: Decomposition, network: nn.Module) -> tuple[TargetSimilarity, ...]:
    """Compares generated weights with those of the network that was decomposed; raises as `check_fits`."""
    check_fits(network, decomposition)
    found = []
    for name, weight in decomposition.reconstruct().items():
        dense = network.get_parameter(name).double().flatten()
        generated = weight.to(dense).flatten()
        cosine = float(F.cosine_similarity(generated, dense, dim=0))
        found.append(TargetSimilarity(name, cosine, float((generated - dense).norm() / dense.norm())))
    return tuple(found)


@torch.no_grad()
def feature_similarity(
    decomposition: Decomposition, backbone: Backbone, batches: Iterable[Tensor]
) -> tuple[FeatureSimilarity, ...]:
    """Compares the outputs of modules in the decomposed and in the dense network (section 3.2).

    It compares the modules with a generated weight, the blocks around them, and the features of the network.

    Args:
        decomposition: The decomposition.
        backbone: The backbone with its dense weights; it is not changed.
        batches: Images (B, 3, S, S) in [0, 1], on its device. All outputs for one batch are held at once.

    Returns:
        The similarities, in the order of computation.

    Raises:
        DecompositionError: If the decomposition does not fit the backbone.
    """
    check_fits(backbone.net, decomposition)
    generated = {
        f"net.{name}": weight.to(backbone.net.get_parameter(name))
        for name, weight in decomposition.reconstruct().items()
    }
    kinds = compared_modules(backbone.net, decomposition)
    found: dict[str, list[Tensor]] = {}
    for images in batches:
        dense, decomposed = (_outputs(backbone, kinds, weights, images) for weights in ({}, generated))
        for name, output in dense.items():
            found.setdefault(name, []).append(cosines(output, decomposed[name]))  # (B,)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    kinds["features"] = "features"
    return tuple(FeatureSimilarity(n, kinds[n], float(c.mean()), float(c.min())) for n, c in joined.items())


def compared_modules(network: nn.Module, decomposition: Decomposition) -> dict[str, str]:
    """The kinds, `layer` or `block`, of the modules whose outputs are compared, by name."""
    modules = dict(network.named_modules())
    lists = {path for path, module in modules.items() if isinstance(module, nn.Sequential | nn.ModuleList)}
    kinds: dict[str, str] = {}
    for bank in decomposition.banks:
        for target in bank.group.targets:
            layer = target.rpartition(".")[0]
            parent = layer.rpartition(".")[0]
            if isinstance(modules[parent], nn.MultiheadAttention):
                layer = parent  # attention never calls its output projection, but reads the weight of it
            kinds[layer] = "layer"
            parts = [layer[: match.start()] for match in re.finditer(r"\.|$", layer)]
            inside = (part for part in parts if part.rpartition(".")[0] in lists)  # the outermost first
            kinds.setdefault(next(inside, layer), "block")
    return kinds


def reported(kinds: Mapping[str, str]) -> list[str]:
    """The modules whose mean is reported as the feature similarity: blocks, or layers in a network without blocks.

    The paper does not say which outputs table 6 compares; its released code compares those of blocks.

    Args:
        kinds: `layer` or `block` by name of the module, and `features`, as in `FeatureSimilarity`.
    """
    wanted = "block" if "block" in kinds.values() else "layer"
    return [name for name, kind in kinds.items() if kind == wanted]


@contextmanager
def recorded(network: nn.Module, modules: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A context that records the last output of each named module, in the order of computation.

    Of a module with several outputs, such as attention with its weights, it records the first.
    """
    outputs: dict[str, Tensor] = {}

    def record(_: nn.Module, __: Any, output: Any, name: str) -> None:
        outputs[name] = (output if isinstance(output, Tensor) else next(iter(output))).detach()

    with ExitStack() as hooks:
        for name in modules:
            hook = network.get_submodule(name).register_forward_hook(partial(record, name=name))
            hooks.callback(hook.remove)
        yield outputs


def mean_cosine(targets: Sequence[TargetSimilarity]) -> float:
    """The weight cosine of a decomposition: the mean over its weights."""
    return statistics.mean(target.cosine for target in targets)


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarity (B,) in float64 of the flattened outputs for each image, (B, ...) and (B, ...)."""
    return F.cosine_similarity(left.flatten(1).double(), right.flatten(1).double(), dim=1)


def _outputs(backbone: Backbone, names: Iterable[str], weights: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Outputs of the named modules and of the backbone, computed with some other weights."""
    with recorded(backbone.net, names) as outputs:
        features = functional_call(backbone, weights, (images,))
    return outputs | {"features": features.detach()}
