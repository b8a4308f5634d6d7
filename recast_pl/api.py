"""All that `import recast_pl` offers."""

from recast_pl.backbones import Backbone, BackboneConfig
from recast_pl.data.module import SequentialTaskDataModule
from recast_pl.data.tasks import TaskConfig
from recast_pl.decomposition.autoencoder import FreeTemplates, TemplateAutoencoder
from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.module import MimicryModule
from recast_pl.decomposition.surgery import install
from recast_pl.decomposition.targets import BankLayout
from recast_pl.engines import Engine, Processes, Ray, Slurm
from recast_pl.errors import RecastError
from recast_pl.predictor import Prediction, Predictor, load
from recast_pl.til.growth import Growth
from recast_pl.til.minimal import LoRAXS, Scale, Spectral
from recast_pl.til.module import TILModule
from recast_pl.til.outputs import CLR, HAT, AdaptFormer
from recast_pl.til.patch import SharedState, TaskPatch
from recast_pl.til.penalties import EWC, LwF
from recast_pl.til.piece import LinearProbe, Piece
from recast_pl.til.prompts import L2P
from recast_pl.til.recast import Recast
from recast_pl.til.replay import DERPP, ERACE, GDumb
from recast_pl.til.subspaces import InfLoRA
from recast_pl.til.weights import DoRA, FineTune, FullFineTune, LoRA, Piggyback, RoSA

__all__ = [
    "CLR",
    "DERPP",
    "ERACE",
    "EWC",
    "HAT",
    "L2P",
    "AdaptFormer",
    "Backbone",
    "BackboneConfig",
    "BankLayout",
    "Decomposition",
    "DoRA",
    "Engine",
    "FineTune",
    "FreeTemplates",
    "FullFineTune",
    "GDumb",
    "Growth",
    "InfLoRA",
    "LinearProbe",
    "LoRA",
    "LoRAXS",
    "LwF",
    "MimicryModule",
    "Piece",
    "Piggyback",
    "Prediction",
    "Predictor",
    "Processes",
    "Ray",
    "Recast",
    "RecastError",
    "RoSA",
    "Scale",
    "SequentialTaskDataModule",
    "SharedState",
    "Slurm",
    "Spectral",
    "TILModule",
    "TaskConfig",
    "TaskPatch",
    "TemplateAutoencoder",
    "decompose",
    "install",
    "load",
]
