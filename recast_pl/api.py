# ruff: noqa: F401
"""The public names of `import recast_pl`: all that this module imports."""

from recast_pl.backbones.backbone import Backbone, BackboneConfig
from recast_pl.config.sharing import pull, push
from recast_pl.data.corruptions import Corruption
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.imbalance import Imbalance
from recast_pl.data.label_noise import LabelNoise
from recast_pl.data.tasks import ClassSubset, TaskConfig
from recast_pl.decomposition.autoencoder import TemplateAutoencoder
from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.encoder import CoefficientEncoder
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.decomposition.parametrization import install
from recast_pl.decomposition.sources import FreeCoefficients, FreeTemplates
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import RecastError
from recast_pl.inference.prediction import Choice, Prediction, RoutedPrediction
from recast_pl.inference.predictor import Predictor, load
from recast_pl.learning.averaging import AverageEpochs
from recast_pl.learning.budget import Budget
from recast_pl.learning.classp import CLASSP
from recast_pl.learning.patch import SharedState, TaskPatch
from recast_pl.learning.router import Router
from recast_pl.learning.schedule import QuarterCosine, WarmUp
from recast_pl.learning.signature import Signature
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.adaptformer import AdaptFormer
from recast_pl.methods.atlas import ATLAS
from recast_pl.methods.chosen import Chosen
from recast_pl.methods.clr import CLR
from recast_pl.methods.cotta import CoTTA
from recast_pl.methods.derpp import DERPP
from recast_pl.methods.dora import DoRA
from recast_pl.methods.er_ace import ERACE
from recast_pl.methods.ewc import EWC
from recast_pl.methods.fecam import FeCAM
from recast_pl.methods.fine_tune import FineTune, FullFineTune
from recast_pl.methods.gdumb import GDumb
from recast_pl.methods.gradient_sums import GradientSums
from recast_pl.methods.growth import Growth
from recast_pl.methods.hat import HAT
from recast_pl.methods.head_scale import HeadScale
from recast_pl.methods.hypernetwork import Hypernetwork
from recast_pl.methods.ider import IDER
from recast_pl.methods.inflora import InfLoRA
from recast_pl.methods.joint_classifier import JointClassifier
from recast_pl.methods.kappa_tune import KappaTune
from recast_pl.methods.l2_sp import L2SP
from recast_pl.methods.l2p import L2P
from recast_pl.methods.lift import LIFT
from recast_pl.methods.linear_probe import LinearProbe
from recast_pl.methods.lora import LoRA
from recast_pl.methods.lora_xs import LoRAXS
from recast_pl.methods.lwf import LwF
from recast_pl.methods.napa_vq import NAPAVQ
from recast_pl.methods.ncm import NCM
from recast_pl.methods.partial_fine_tune import PartialFineTune
from recast_pl.methods.piece import Piece
from recast_pl.methods.piggyback import Piggyback
from recast_pl.methods.projection import Projection
from recast_pl.methods.ranpac import RanPAC
from recast_pl.methods.recast import Recast
from recast_pl.methods.rosa import RoSA
from recast_pl.methods.rounded_fine_tune import RoundedFineTune
from recast_pl.methods.rounded_lora import RoundedLoRA
from recast_pl.methods.scale import Scale
from recast_pl.methods.spectral import Spectral
from recast_pl.methods.streaming_lda import LDA
from recast_pl.methods.tiny_lora import TinyLoRA
from recast_pl.methods.uni_lora import UniLoRA
from recast_pl.methods.weight_aligning import WeightAligning
from recast_pl.studies.engines import Engine, Processes, Ray, Slurm
