"""A pretrained model by name, with hub, local or random weights, as a module from images to features."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import Tensor, nn

from recast_pl.backbones.weights import drop_classifier, existing, load_into, not_loaded
from recast_pl.compat.timm import MissingKeys
from recast_pl.errors import BackboneError

if TYPE_CHECKING:
    from recast_pl.backbones.backbone import BackboneConfig

Statistics = tuple[float, ...]


class Recipe(NamedTuple):
    """How a library makes a network.

    Args:
        constructor: Dotted path of a function.
        arguments: Of the function, by name.
    """

    constructor: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.constructor}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    def make(self) -> nn.Module:
        """The network, with random weights, in evaluation mode."""
        module, _, function = self.constructor.rpartition(".")
        net: nn.Module = getattr(importlib.import_module(module), function)(**self.arguments)
        return net.eval()


class Classifier(NamedTuple):
    """A pretrained classifier.

    Args:
        net: Maps preprocessed images (B, 3, S, S) to logits (B, classes), in evaluation mode.
        preprocess: Makes such an image (3, S, S) of an RGB picture.
    """

    net: nn.Module
    preprocess: Callable[[Image.Image], Tensor]


Built = tuple[nn.Module, Statistics, Statistics]

Builder = Callable[["BackboneConfig", int], Built]


def find_builder(name: str) -> Builder:
    if timm.is_model(name):
        return from_timm
    if name.removeprefix("torchvision/") in torchvision.models.list_models(module=torchvision.models):
        return from_torchvision
    if "." in name and "/" not in name:
        return from_function
    known = timm.list_models() + torchvision.models.list_models(module=torchvision.models)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}" if close else "timm.list_models() lists names"
    raise BackboneError(f"unknown backbone {name!r}; {hint}? A function is given by its dotted path")


def from_timm(config: "BackboneConfig", image_size: int) -> Built:
    cfg = timm.get_pretrained_cfg(config.name) or PretrainedCfg()
    file = None if config.weights in ("hub", "random") else existing(config.weights)
    overlay = {"file": str(file)} if file else None
    try:
        with MissingKeys() as missing:
            net = timm.create_model(
                config.name,
                pretrained=config.weights != "random",
                pretrained_cfg_overlay=overlay,
                **{"num_classes": 0, **input_size(config.name, image_size), **config.args},
            )
        missing.refuse()
    except Exception as cause:  # hub, file and constructor errors have no common type
        raise not_loaded(config, cause) from cause
    return net, cfg.mean, cfg.std


def input_size(name: str, image_size: int) -> dict[str, int]:
    """The argument that tells a model of timm of its input size, where it must be told."""
    cfg = timm.get_pretrained_cfg(name) or PretrainedCfg()
    return {"img_size": image_size} if cfg.fixed_input_size and image_size != cfg.input_size[-1] else {}


def from_torchvision(config: "BackboneConfig", image_size: int) -> Built:
    net = torchvision_net(config)
    drop_classifier(net, config.name.removeprefix("torchvision/"))
    return net, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def torchvision_net(config: "BackboneConfig") -> nn.Module:
    name = config.name.removeprefix("torchvision/")
    try:
        net: nn.Module = torchvision.models.get_model(
            name, weights="DEFAULT" if config.weights == "hub" else None, **config.args
        )
    except Exception as cause:
        raise not_loaded(config, cause) from cause
    if config.weights not in ("hub", "random"):
        load_into(net, existing(config.weights), config)
    return net


def from_function(config: "BackboneConfig", image_size: int, classifier: bool = False) -> Built:
    module_name, _, attribute = config.name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as cause:
        raise BackboneError(f"cannot import backbone {config.name!r} ({cause}); check its dotted path") from cause
    takes = inspect.signature(function).parameters
    offered = {"image_size": image_size} | ({"classifier": True} if classifier else {})
    try:
        net = function(**{name: value for name, value in offered.items() if name in takes}, **config.args)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise not_loaded(config, cause) from cause
    if not isinstance(net, nn.Module):
        raise BackboneError(f"backbone {config.name!r} returned a {type(net).__name__}; it must return an nn.Module")
    if config.weights not in ("hub", "random"):
        load_into(net, existing(config.weights), config)
    own = getattr(net, "pretrained_cfg", {})
    return net, own.get("mean", IMAGENET_DEFAULT_MEAN), own.get("std", IMAGENET_DEFAULT_STD)
