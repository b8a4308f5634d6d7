"""The three sources of a pretrained network: timm, torchvision, and a function named by its dotted path."""

import difflib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import timm
import torchvision
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg, load_model_config_from_hf
from torch import Tensor, nn

from recast_pl.backbones.weights import find_file, read_file
from recast_pl.compat.timm import refuse_missing_weights
from recast_pl.errors import BackboneError, one_line
from recast_pl.rules import ImageSize, height_and_width

_HUB = "hf-hub:"

Statistics = tuple[float, ...]
"""One number for each of the three channels."""


FeatureNet = tuple[nn.Module, Statistics, Statistics]
"""A network from normalised images (B, 3, S, S) to features (B, D), and the mean and deviation to normalise with."""


class Classifier(NamedTuple):
    """A network from images (B, 3, S, S) to logits (B, classes); `preprocess` turns a picture into such an image."""

    net: nn.Module
    preprocess: Callable[[Image.Image], Tensor]


class Recipe(NamedTuple):
    """The call that creates a network with its own library: the dotted path of a function, and its arguments."""

    constructor: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.constructor}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    def make(self) -> nn.Module:
        """Creates the network, with random weights, in evaluation mode."""
        module, _, function = self.constructor.rpartition(".")
        net: nn.Module = getattr(importlib.import_module(module), function)(**self.arguments)
        return net.eval()


@dataclass(frozen=True)
class Source(ABC):
    """Where a network comes from.

    Args:
        name: The network's name in its source.
        weights: `hub`, `random`, or the path of a file.
        args: Further arguments of the constructor.
    """

    name: str
    weights: str
    args: dict[str, Any]

    @abstractmethod
    def features(self, image_size: ImageSize) -> FeatureNet:
        """Creates the network without a classifier, for images of this height and width in pixels."""

    @abstractmethod
    def classifier(self) -> Classifier:
        """Creates the network in evaluation mode, with the classifier and preprocessing it was pretrained with."""

    @abstractmethod
    def recipe(self, net: nn.Module, classes: int, image_size: ImageSize) -> Recipe:
        """Returns the call that creates the architecture of `net`, with a new classifier, without this package.

        Args:
            net: The network that `features` created.
            classes: Number of outputs of the new classifier.
            image_size: Height and width of the input in pixels.

        Raises:
            BackboneError: If neither timm nor torchvision has this architecture.
        """

    def load_file(self, net: nn.Module) -> None:
        """Loads the weights into the network if they are a file."""
        if self.weights in ("hub", "random"):
            return
        path = find_file(self.weights)
        try:
            net.load_state_dict(read_file(path))
        except Exception as cause:  # torch.load can raise nearly anything for a damaged file
            raise self.failure(cause) from cause

    def failure(self, cause: Exception) -> BackboneError:
        """The error for a network that could not be created."""
        return BackboneError(
            f"cannot build backbone {self.name!r} with weights {self.weights!r}: {one_line(cause)}; "
            "check that name, weights and model.backbone.args belong together"
        )


class _Published(NamedTuple):
    """What a hub says about a model of timm: its architecture, its pretraining, and arguments of its constructor."""

    architecture: str
    pretraining: PretrainedCfg
    args: dict[str, Any]


class TimmSource(Source):
    """A model of timm, by its name there, or on the Hugging Face hub: `hf-hub:OWNER/NAME`."""

    def features(self, image_size: ImageSize) -> FeatureNet:
        """Creates the network without a classifier; timm resamples position embeddings to the image size."""
        published = self._published()
        net = self._create({"num_classes": 0, **_input_size(published, image_size)})
        return net, published.pretraining.mean, published.pretraining.std

    def classifier(self) -> Classifier:
        """Creates the network with as many classes as its published weights have."""
        net = self._create({"num_classes": self._published().pretraining.num_classes})
        return Classifier(net.eval(), _timm_preprocessing(net, self.args.get("img_size")))

    def recipe(self, net: nn.Module, classes: int, image_size: ImageSize) -> Recipe:
        """Returns a call of `timm.create_model`, which needs no hub."""
        published = self._published()
        arguments = {**published.args, **_input_size(published, image_size), **self.args}
        return Recipe("timm.create_model", {"model_name": published.architecture, **arguments, "num_classes": classes})

    def _published(self) -> _Published:
        if not self.name.startswith(_HUB):
            return _Published(self.name, timm.get_pretrained_cfg(self.name) or PretrainedCfg(), {})
        try:
            pretraining, architecture, args = load_model_config_from_hf(self.name.removeprefix(_HUB))
        except Exception as cause:  # as in `_create`
            raise self.failure(cause) from cause
        return _Published(architecture, PretrainedCfg(**pretraining), args or {})

    def _create(self, arguments: dict[str, Any]) -> nn.Module:
        file = {"file": str(find_file(self.weights)), "source": ""} if self.weights not in ("hub", "random") else None
        try:
            with refuse_missing_weights():
                net: nn.Module = timm.create_model(
                    self.name,
                    pretrained=self.weights != "random",
                    pretrained_cfg_overlay=file,
                    **{**arguments, **self.args},
                )
        except Exception as cause:  # hub, file and constructor errors have no common type
            raise self.failure(cause) from cause
        return net


class TorchvisionSource(Source):
    """A classification model of torchvision."""

    def features(self, image_size: ImageSize) -> FeatureNet:
        """Creates the network and replaces its classifier by the identity."""
        net = self._create()
        linears = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise BackboneError(f"torchvision's {self.name!r} has no linear classifier; choose another backbone")
        parent, _, attribute = linears[-1].rpartition(".")  # in every such model the last one is the classifier
        setattr(net.get_submodule(parent), attribute, nn.Identity())
        return net, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def classifier(self) -> Classifier:
        """Creates the network as published, with the preprocessing of its default weights."""
        published: Any = torchvision.models.get_model_weights(self.name)
        return Classifier(self._create().eval(), published.DEFAULT.transforms())

    def recipe(self, net: nn.Module, classes: int, image_size: ImageSize) -> Recipe:
        """Returns a call of `torchvision.models.get_model`."""
        return Recipe("torchvision.models.get_model", {"name": self.name, **self.args, "num_classes": classes})

    def _create(self) -> nn.Module:
        published = "DEFAULT" if self.weights == "hub" else None
        try:
            net: nn.Module = torchvision.models.get_model(self.name, weights=published, **self.args)
        except Exception as cause:
            raise self.failure(cause) from cause
        self.load_file(net)
        return net


class FunctionSource(Source):
    """A function that returns a network; it is passed `image_size` and `classifier` if it takes them."""

    def features(self, image_size: ImageSize) -> FeatureNet:
        """Calls the function; a `pretrained_cfg` as in timm gives the normalisation, or else that of ImageNet."""
        net = self._call({"image_size": image_size})
        published = getattr(net, "pretrained_cfg", {})
        return net, published.get("mean", IMAGENET_DEFAULT_MEAN), published.get("std", IMAGENET_DEFAULT_STD)

    def classifier(self) -> Classifier:
        """Calls the function, which must then return a classifier; timm derives the preprocessing from it."""
        net = self._call({"image_size": 224, "classifier": True})
        return Classifier(net.eval(), _timm_preprocessing(net))

    def recipe(self, net: nn.Module, classes: int, image_size: ImageSize) -> Recipe:
        """Returns a call of `timm.create_model`, if timm created the network that the function returned."""
        architecture = getattr(net, "pretrained_cfg", {}).get("architecture", "")
        if not timm.is_model(architecture):
            raise BackboneError(
                f"backbone {self.name!r} is not a network of timm or torchvision; choose one of theirs to export it"
            )
        return Recipe("timm.create_model", {"model_name": architecture, "num_classes": classes})

    def _call(self, offered: dict[str, Any]) -> nn.Module:
        module, _, attribute = self.name.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as cause:
            raise BackboneError(f"cannot import backbone {self.name!r} ({cause}); check its dotted path") from cause
        try:
            takes = inspect.signature(function).parameters
            net = function(**{name: value for name, value in offered.items() if name in takes}, **self.args)
        except (TypeError, ValueError, RuntimeError) as cause:
            raise self.failure(cause) from cause
        if not isinstance(net, nn.Module):
            raise BackboneError(f"backbone {self.name!r} returned a {type(net).__name__}; it must return an nn.Module")
        self.load_file(net)
        return net


def find_source(name: str, weights: str, args: dict[str, Any]) -> Source:
    """Finds the source of a backbone; for the arguments see `BackboneConfig`.

    Raises:
        BackboneError: If no source has the name.
    """
    if name.startswith((_HUB, "hf_hub:")):
        return TimmSource(name.replace("hf_hub:", _HUB, 1), weights, args)
    if timm.is_model(name):
        return TimmSource(name, weights, args)
    torchvision_names = torchvision.models.list_models(module=torchvision.models)
    if name.removeprefix("torchvision/") in torchvision_names:
        return TorchvisionSource(name.removeprefix("torchvision/"), weights, args)
    if "." in name and "/" not in name:
        return FunctionSource(name, weights, args)
    close = difflib.get_close_matches(name, timm.list_models() + torchvision_names, n=3)
    hint = f"did you mean {' or '.join(close)}" if close else "timm.list_models() lists names"
    raise BackboneError(f"unknown backbone {name!r}; {hint}? A function is given by its dotted path")


def _input_size(published: _Published, image_size: ImageSize) -> dict[str, ImageSize]:
    """The constructor argument for the input size, for models of timm that need one."""
    pretraining = published.pretraining
    needed = pretraining.fixed_input_size and height_and_width(image_size) != tuple(pretraining.input_size[1:])

    return {"img_size": image_size} if needed else {}


def _timm_preprocessing(net: nn.Module, size: ImageSize | None = None) -> Callable[[Image.Image], Tensor]:
    """The preprocessing of a network's pretraining, for another input size in pixels unless it is None."""
    other = {} if size is None else {"input_size": (3, *height_and_width(size))}
    transform: Callable[[Image.Image], Tensor] = create_transform(**resolve_model_data_config(net, other))  # type: ignore[no-untyped-call]
    return transform
