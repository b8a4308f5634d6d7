"""Pretrained networks by name, with weights from a hub or a file, as modules from images to features."""

from recast_pl.backbones.backbone import Backbone, BackboneConfig
from recast_pl.backbones.lite0 import efficientnet_lite0

__all__ = ["Backbone", "BackboneConfig", "efficientnet_lite0"]
