"""A trained task as a plain model: weights, an exported program or an ONNX graph."""

import copy
import io
import json

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import parametrize

from recast_pl.backbones.backbone import Backbone
from recast_pl.errors import BackboneError, ExportError
from recast_pl.files import pack_tensors
from recast_pl.inference.export.exported import Exported, check_difference, facts, noise, preprocessing, tracing
from recast_pl.inference.export.graph import Session, trace
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule

_BATCHES = {"images": {0: Dim("batch")}}
"""The dimensions of the inputs that may have any length."""


class DenseModel(nn.Module):
    """A backbone and a head: from images (B, 3, S, S) in [0, 1] to logits (B, classes), normalisation included."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


@torch.no_grad()
def export_safetensors(module: TILModule, patch: TaskPatch) -> Exported:
    """The weights of a plain timm or torchvision model whose classifier is the task's head.

    Raises:
        ExportError: If no plain model computes the same as the network.
    """
    network, images = dense_copy(module), noise(patch)
    backbone = network.backbone
    try:
        recipe = module.backbone_config.source.recipe(backbone.net, len(patch.classes), patch.image_size)
        plain = recipe.make()
        weights = _plain_weights(network, plain)
        plain.load_state_dict(weights)
        difference = check_difference(plain((images - backbone.mean) / backbone.std), network(images))
    except (BackboneError, ExportError, RuntimeError, TypeError, ValueError, KeyError) as cause:
        raise ExportError(
            f"no plain model computes the same as {' + '.join(module.method)} on {module.backbone_config.name!r}: it "
            f"changes more than weights or its architecture is unknown; use onnx or torch_export ({str(cause)[:200]})"
        ) from cause
    normalisation = {"mean": patch.mean, "std": patch.std}
    told = facts(patch, preprocessing=preprocessing(patch, "(image - mean) / std for each channel")) | normalisation
    told |= {"constructor": recipe.constructor, "arguments": recipe.arguments}
    usage = f"{recipe}.load_state_dict(safetensors.torch.load_file(FILE)), images normalised by the file's mean and std"
    return Exported(pack_tensors(weights, told), difference, usage)


@torch.no_grad()
def export_torch(module: TILModule, patch: TaskPatch) -> Exported:
    """An `ExportedProgram` from images (B, 3, S, S) in [0, 1] to logits (B, classes), for any B.

    Raises:
        ExportError: If the network cannot be traced.
    """
    network, images = dense_copy(module), noise(patch)
    with tracing():
        program = torch.export.export(network, (images,), dynamic_shapes=_BATCHES)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"recast_pl.json": json.dumps(facts(patch))})
    loaded = torch.export.load(io.BytesIO(content.getvalue())).module()
    difference = check_difference(loaded(images), network(images))
    return Exported(content.getvalue(), difference, "torch.export.load(FILE).module()(images), with images in [0, 1]")


@torch.no_grad()
def export_onnx(module: TILModule, patch: TaskPatch, opset: int | None = None) -> Exported:
    """An ONNX graph from `images` (B, 3, S, S) in [0, 1] to `logits` (B, classes), for any B.

    Args:
        module: The network.
        patch: Its active task.
        opset: Version of ONNX's operators; None for that of PyTorch's exporter.

    Raises:
        ExportError: If the network cannot be traced, or is too large for an ONNX file.
    """
    network, inputs = dense_copy(module), {"images": noise(patch)}
    content = trace(network, inputs, _BATCHES, ["logits"], facts(patch), opset)
    difference = check_difference(Session(content).logits(inputs), network(inputs["images"]))
    usage = "onnxruntime.InferenceSession(FILE).run(['logits'], {'images': images}), with images in [0, 1]"
    return Exported(content, difference, usage)


def dense_copy(module: TILModule) -> DenseModel:
    """A copy of the active task's network and head in which generated weights are plain parameters.

    `remove_parametrizations` would change a class that the copy shares with the original.
    """
    network = DenseModel(*_without_projection(*copy.deepcopy(module.current()))).cpu().requires_grad_(False).eval()
    for layer in network.modules():
        if parametrize.is_parametrized(layer):
            dense = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}  # type: ignore[union-attr]
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            for name, weight in dense.items():
                layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return network


def _without_projection(backbone: Backbone, head: nn.Linear) -> tuple[Backbone, nn.Linear]:
    """The same with a head over all features of the network: W·(P·f) is (W·P)·f."""
    if backbone.projection is None:
        return backbone, head
    classes, features = head.out_features, backbone.projection.shape[1]
    whole = nn.Linear(features, classes).to(head.weight)
    whole.load_state_dict({"weight": head.weight @ backbone.projection, "bias": head.bias})
    backbone.projection, backbone.num_features = None, features
    return backbone, whole


def _plain_weights(network: DenseModel, plain: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model: the network's own tensors, and the head under the name of the classifier."""
    own, head = network.backbone.net.state_dict(), network.head.state_dict()
    for name, place in plain.state_dict().items():
        if name not in own:  # the classifier, which the backbone lacks
            own[name] = head[name.rpartition(".")[2]].view_as(place)
    return {name: tensor.clone() for name, tensor in own.items()}
