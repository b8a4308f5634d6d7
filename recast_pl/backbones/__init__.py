"""A pretrained model by name, with hub, local or random weights, as a module from images to features."""

from recast_pl.backbones.backbone import Backbone, BackboneConfig
from recast_pl.backbones.lite0 import efficientnet_lite0

__all__ = ["Backbone", "BackboneConfig", "efficientnet_lite0"]
