"""A pretrained network as a feature extractor, and its settings in YAML."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from recast_pl.backbones.builders import Source, Statistics, find_source
from recast_pl.errors import BackboneError, one_line
from recast_pl.rules import ImageSize, height_and_width, size_text


@dataclass(frozen=True)
class BackboneConfig:
    """Which pretrained network to adapt.

    Args:
        name: A timm name (`vit_small_patch16_224`), a model for timm on the Hugging Face hub
            (`hf-hub:timm/resnet10t.c3_in1k`), a torchvision name (`torchvision/resnet34`; the prefix may be left out
            if timm has no model of that name), or the dotted path of a function that returns an `nn.Module` from
            images to features, such as `recast_pl.backbones.efficientnet_lite0`.
        weights: `hub` for the published weights (for a function: the weights it comes with), `random`, or the path
            of a `.safetensors`, `.pth` or `.pt` file: the weights, or a checkpoint that has them under `state_dict` or
            `model`. A ViT's position embedding is resampled to the input size.
        args: Further arguments of the network's constructor.
        mean: Mean of each channel, to normalise images in [0, 1]; None for the network's own.
        std: Standard deviation of each channel; None for the network's own.

    Raises:
        BackboneError: If `mean` or `std` is not three numbers, or `std` is not positive.
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
                raise BackboneError(f"backbone.{key}={values} must be 3 numbers, and those of std above 0")

    @property
    def source(self) -> Source:
        """The timm model, torchvision model or function of this name; raises BackboneError if there is none."""
        return find_source(self.name, self.weights, self.args)

    def build(self, image_size: ImageSize) -> "Backbone":
        """Creates the network in evaluation mode and loads its weights.

        Args:
            image_size: Height and width of the input in pixels, as one number if they are equal.

        Raises:
            BackboneError: If the name, the weights or the input size cannot be used.
        """
        net, mean, std = self.source.features(image_size)
        return Backbone(net, self.mean or mean, self.std or std, image_size, self.name)


class Backbone(nn.Module):
    """A network from images to feature vectors that normalises its input.

    Args:
        net: Maps normalised images (B, 3, S, S) to features (B, D).
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
        image_size: Height and width of the images in pixels.
        name: Its name in messages and summaries.

    Raises:
        BackboneError: If `net` does not take such images, or does not return one vector for each.
    """

    mean: Tensor
    std: Tensor
    projection: nn.Parameter | None
    """The matrix (width, D) of `project`."""

    def __init__(self, net: nn.Module, mean: Statistics, std: Statistics, image_size: ImageSize, name: str) -> None:
        super().__init__()
        self.net = net.eval()
        self.name, self.image_size = name, image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.register_parameter("projection", None)
        self.num_features = self.check_size(image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) with values in [0, 1]."""
        features: Tensor = self.net((images - self.mean).div_(self.std))
        return features if self.projection is None else features @ self.projection.T

    def project(self, matrix: Tensor) -> None:
        """Multiplies features by a fixed matrix (width, D) from now on, so that D becomes the width."""
        # a frozen parameter, not a buffer: DDP broadcasts buffers at every forward pass
        self.projection = nn.Parameter(matrix.to(self.mean), requires_grad=False)
        self.num_features = len(matrix)

    def _remedy(self) -> str:
        """What to do about a network that does not take the images."""
        channels = next((m.in_channels for m in self.net.modules() if isinstance(m, nn.Conv2d)), 3)
        if channels != 3:
            return (
                f"it has {channels} input channels and images have 3, grey ones too; leave out backbone.args.in_chans"
            )
        fixed = getattr(self.net, "image_size", None)
        if isinstance(fixed, int) and fixed != self.image_size:
            return (
                f"set data.image_size to {fixed}, or choose a model of timm that is resampled to the size of the "
                "images, such as vit_base_patch16_224 or vit_small_patch16_224"
            )
        return "set data.image_size to a size it takes"

    @torch.no_grad()
    def check_size(self, size: ImageSize) -> int:
        """The number of features D of an image of a size in pixels; raises BackboneError if the network takes none."""
        try:
            features = self(torch.zeros(1, 3, *height_and_width(size)).to(self.mean))
        except (AssertionError, RuntimeError, ValueError) as cause:
            raise BackboneError(
                f"backbone {self.name!r} does not take {size_text(size)} images ({one_line(cause)}); {self._remedy()}"
            ) from cause
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(getattr(features, "shape", ())) or type(features).__name__
            raise BackboneError(
                f"backbone {self.name!r} returned {shape} for one image; it must return one vector (1, D)"
            )
        return features.shape[1]
