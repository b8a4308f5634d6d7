"""Adapt one pretrained vision model to any number of tasks: each a patch of a few dozen numbers and a head.

An implementation of RECAST (Tasnim and Plummer, *Reparameterized, Compact weight Adaptation for Sequential
Tasks*, ICLR 2025).
"""

from recast_pl.backbones import Backbone, BackboneConfig
from recast_pl.data.module import SequentialTaskDataModule
from recast_pl.data.tasks import TaskConfig
from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.module import MimicryModule
from recast_pl.decomposition.surgery import install
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import RecastError
from recast_pl.til.module import TILModule
from recast_pl.til.outputs import CLR, AdaptFormer
from recast_pl.til.patch import TaskPatch
from recast_pl.til.piece import LinearProbe, Piece
from recast_pl.til.weights import DoRA, FullFineTune, LoRA, Piggyback, Recast, RoSA

__all__ = [
    "CLR",
    "AdaptFormer",
    "Backbone",
    "BackboneConfig",
    "BankLayout",
    "Decomposition",
    "DoRA",
    "FullFineTune",
    "LinearProbe",
    "LoRA",
    "MimicryModule",
    "Piece",
    "Piggyback",
    "Recast",
    "RecastError",
    "RoSA",
    "SequentialTaskDataModule",
    "TILModule",
    "TaskConfig",
    "TaskPatch",
    "decompose",
    "install",
]
__version__ = "0.1.0"
