"""A pretrained model as a feature extractor."""

from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torchvision
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from torch import Tensor, nn

from recast_pl.backbones.builders import (
    Classifier,
    Recipe,
    Statistics,
    find_builder,
    from_function,
    from_timm,
    from_torchvision,
    input_size,
    torchvision_net,
)
from recast_pl.backbones.weights import one_line
from recast_pl.errors import BackboneError


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
        net, mean, std = find_builder(self.name)(self, image_size)
        return Backbone(net, self.mean or mean, self.std or std, image_size, self.name)

    def build_classifier(self) -> "Classifier":
        """Creates the model with the classifier that it was pretrained with, and the preprocessing that goes with it.

        A function given by its dotted path must return a classifier, for which it is asked if it takes `classifier`.

        Raises:
            BackboneError: If the name or the weights cannot be used.
        """
        builder = find_builder(self.name)
        if builder is from_torchvision:
            weights: Any = torchvision.models.get_model_weights(self.name.removeprefix("torchvision/"))
            return Classifier(torchvision_net(self).eval(), weights.DEFAULT.transforms())
        if builder is from_timm:
            published = timm.get_pretrained_cfg(self.name) or PretrainedCfg()
            config = replace(self, args={"num_classes": published.num_classes, **self.args})
            net, *_ = from_timm(config, published.input_size[-1])
        else:
            net, *_ = from_function(self, 224, classifier=True)
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
        builder = find_builder(self.name)
        if builder is from_torchvision:
            name = self.name.removeprefix("torchvision/")
            return Recipe("torchvision.models.get_model", {"name": name, **self.args, "num_classes": classes})
        name = self.name if builder is from_timm else getattr(net, "pretrained_cfg", {}).get("architecture", "")
        if not timm.is_model(name):
            raise BackboneError(f"backbone {self.name!r} is a network of neither timm nor torchvision")
        arguments = {**input_size(name, image_size), **self.args} if builder is from_timm else {}
        return Recipe("timm.create_model", {"model_name": name, **arguments, "num_classes": classes})


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
                f"backbone {self.name!r} does not take {size}×{size} images ({one_line(cause)}); "
                "set data.image_size to a size it takes"
            ) from cause
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(getattr(features, "shape", ())) or type(features).__name__
            raise BackboneError(
                f"backbone {self.name!r} returned {shape} for one image; it must return one vector (1, D)"
            )
        return features.shape[1]
