"""Export of a trained task as a plain model, an ONNX graph or an exported program, which do not need recast_pl."""

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call
from torch.nn.utils import parametrize

from recast_pl.backbones.backbone import Backbone
from recast_pl.errors import BackboneError, ExportError
from recast_pl.files import pack_tensors
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.recast import Recast
from recast_pl.optional_imports import extra
from recast_pl.rules import height_and_width

_FORMAT = 2  # of the metadata

_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest logit, that rounding may cause."""

_BATCHES = {"images": {0: Dim("batch")}}
"""The dimensions of the inputs that may have any length."""

_ONNX_BYTES = 2**31 - 2**20
"""Bytes of weights that fit into an ONNX file, whose limit is 2 GiB with the graph."""


@dataclass(frozen=True)
class Exported:
    """A file to be written.

    Args:
        content: Its bytes.
        difference: Largest difference between its logits and those of the run's own network, on two images of noise.
        usage: How to use it, in one line.
    """

    content: bytes
    difference: float
    usage: str


class DenseModel(nn.Module):
    """A backbone and a head: from images (B, 3, S, S) in [0, 1] to logits (B, classes), normalisation included."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class BankModel(nn.Module):
    """A backbone with the template bank, which receives coefficients and head as inputs and so serves all tasks.

    Args:
        backbone: A backbone whose weights are generated from single sets of coefficients (1, n).
        coefficients: n for each of these coefficients, by name in the backbone, in the order of a patch.
    """

    def __init__(self, backbone: Backbone, coefficients: Mapping[str, int]) -> None:
        super().__init__()
        self.backbone, self.coefficients = backbone, dict(coefficients)

    def forward(self, images: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits (B, classes).

        Args:
            images: (B, 3, S, S) in [0, 1].
            coefficients: Those of the task (Σ n,).
            weight: That of the task's head (classes, D).
            bias: That of the task's head (classes,).
        """
        parts = coefficients.split(list(self.coefficients.values()))  # each (n,)
        state = {name: part[None] for name, part in zip(self.coefficients, parts, strict=True)}
        features = functional_call(self.backbone, state, (images,))  # (B, D)
        return nn.functional.linear(features, weight, bias)


@torch.no_grad()
def export_safetensors(module: TILModule, patch: TaskPatch) -> Exported:
    """The weights of a plain timm or torchvision model whose classifier is the task's head.

    Raises:
        ExportError: If no plain model computes the same as the network.
    """
    network, images = dense_copy(module), _noise(patch)
    backbone = network.backbone
    try:
        recipe = module.backbone_config.source.recipe(backbone.net, len(patch.classes), patch.image_size)
        plain = recipe.make()
        weights = _plain_weights(network, plain)
        plain.load_state_dict(weights)
        difference = _difference(plain((images - backbone.mean) / backbone.std), network(images))
    except (BackboneError, ExportError, RuntimeError, TypeError, ValueError, KeyError) as cause:
        raise ExportError(
            f"no plain model computes the same as {' + '.join(module.method)} on {module.backbone_config.name!r}: it "
            f"changes more than weights or its architecture is unknown; use onnx or torch_export ({str(cause)[:200]})"
        ) from cause
    normalisation = {"mean": patch.mean, "std": patch.std}
    facts = _facts(patch, "(image - mean) / std for each channel") | normalisation
    facts |= {"constructor": recipe.constructor, "arguments": recipe.arguments}
    usage = f"{recipe}.load_state_dict(safetensors.torch.load_file(FILE)), images normalised by the file's mean and std"
    return Exported(pack_tensors(weights, facts), difference, usage)


@torch.no_grad()
def export_torch(module: TILModule, patch: TaskPatch) -> Exported:
    """An `ExportedProgram` from images (B, 3, S, S) in [0, 1] to logits (B, classes), for any B.

    Raises:
        ExportError: If the network cannot be traced.
    """
    network, images = dense_copy(module), _noise(patch)
    with _tracing():
        program = torch.export.export(network, (images,), dynamic_shapes=_BATCHES)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"recast_pl.json": json.dumps(_facts(patch))})
    loaded = torch.export.load(io.BytesIO(content.getvalue())).module()
    difference = _difference(loaded(images), network(images))
    return Exported(content.getvalue(), difference, "torch.export.load(FILE).module()(images), with images in [0, 1]")


def export_onnx(module: TILModule, patch: TaskPatch) -> Exported:
    """An ONNX graph from `images` (B, 3, S, S) in [0, 1] to `logits` (B, classes), for any B.

    Raises:
        ExportError: If the network cannot be traced, or is too large for an ONNX file.
    """
    network = dense_copy(module)
    return _onnx(network, {"images": _noise(patch)}, _BATCHES, network, _facts(patch))


def export_bank(module: TILModule, patch: TaskPatch) -> Exported:
    """An ONNX graph that holds the template bank and receives a task's coefficients and head as inputs.

    Every task of the run gives the same graph, which takes any number of classes.

    Raises:
        ExportError: If a task is more than coefficients and a head, or as for `export_onnx`.
    """
    sizes = {}
    for target, parameter in _recast(module).parameters.items():
        path, _, attribute = target.rpartition(".")
        sizes[f"net.{path}.parametrizations.{attribute}.original0"] = parameter.shape[1]
    classes = {0: Dim("classes")}
    shapes = {**_BATCHES, "coefficients": None, "weight": classes, "bias": classes}
    facts = {"kind": "bank"} | {name: _facts(patch)[name] for name in ("format", "image_size", "preprocessing", "base")}
    inputs = {"images": _noise(patch), **_inputs_of_task(module, patch)}
    return _onnx(BankModel(copy.deepcopy(module.current()[0]), sizes), inputs, shapes, dense_copy(module), facts)


def bank_inputs(module: TILModule, patch: TaskPatch) -> bytes:
    """The inputs of a task to the graph of `export_bank`, as a safetensors file with the class names.

    The file holds `coefficients` (Σ n,), and `weight` (classes, D) and `bias` (classes,) of the head.

    Raises:
        ExportError: If a task is more than coefficients and a head.
    """
    return pack_tensors(_inputs_of_task(module, patch), {**_facts(patch), "kind": "feed"})


ExportFormat = Literal["safetensors", "onnx", "torch_export", "onnx_bank"]

FORMATS: dict[ExportFormat, tuple[Callable[[TILModule, TaskPatch], Exported], str]] = {
    "safetensors": (export_safetensors, ".safetensors"),
    "onnx": (export_onnx, ".onnx"),
    "torch_export": (export_torch, ".pt2"),
    "onnx_bank": (export_bank, ".onnx"),
}
"""For each format the suffix of the file, and the function that makes it from a module and its active task."""


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


@torch.no_grad()
def _onnx(
    network: nn.Module, inputs: dict[str, Tensor], shapes: Any, dense: DenseModel, facts: Mapping[str, Any]
) -> Exported:
    """Traces a network into a graph with metadata, and compares it with the dense network."""
    *_, runtime = (extra(package, "export") for package in ("onnx", "onnxscript", "onnxruntime"))
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _ONNX_BYTES:
        raise ExportError(f"{size / 1e9:.1f} GB of weights are too many for an ONNX file; choose torch_export")
    with _tracing():
        program: Any = torch.onnx.export(
            network, kwargs=inputs, dynamic_shapes=shapes, output_names=["logits"], dynamo=True, verbose=False
        )
    texts = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    program.model.metadata_props.update(texts)
    content: bytes = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    usage = f"onnxruntime.InferenceSession(FILE).run(['logits'], {{{', '.join(inputs)}}}), with images in [0, 1]"
    return Exported(content, _difference(torch.from_numpy(logits), dense(inputs["images"])), usage)


def _plain_weights(network: DenseModel, plain: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model: the network's own tensors, and the head under the name of the classifier."""
    own, head = network.backbone.net.state_dict(), network.head.state_dict()
    for name, place in plain.state_dict().items():
        if name not in own:  # the classifier, which the backbone lacks
            own[name] = head[name.rpartition(".")[2]].view_as(place)
    return {name: tensor.clone() for name, tensor in own.items()}


def _recast(module: TILModule) -> Recast:
    """The one piece of a method whose tasks are coefficients and a head."""
    trained = [piece for piece in module.pieces if piece.parameters]
    if len(trained) != 1 or not isinstance(trained[0], Recast):
        raise ExportError(
            "onnx_bank needs tasks that are coefficients of one Recast and a head; those of "
            f"{' + '.join(module.method)} are not; choose onnx, with a file for each task"
        )
    return trained[0]


def _inputs_of_task(module: TILModule, patch: TaskPatch) -> dict[str, Tensor]:
    state = patch.pieces[module.pieces.index(_recast(module))]
    return {name: tensor.float() for name, tensor in {**state, **patch.head}.items()}


def _facts(patch: TaskPatch, normalisation: str = "none: it is inside the graph") -> dict[str, Any]:
    """What the metadata says: the task, and all that `decode_file` and the caller do to an image before the model."""
    height, width = height_and_width(patch.image_size)
    shape = "square" if height == width else f"part of which height : width is {height} : {width}"
    preprocessing = {
        "file": "upright, as its EXIF orientation says; transparent parts on white; 16-bit grey scaled to 8 bits",
        "colour": "RGB",
        "crop": f"the largest centred {shape}",
        "resize": {"height": height, "width": width},
        "interpolation": "bicubic, antialiased, rounded to 8 bits",
        "range": [0, 1],
        "normalisation": normalisation,
        "layout": ["batch", "channel", "height", "width"],
    }
    names = ("task", "classes", "image_size", "method", "base")
    values = {name: getattr(patch, name) for name in names}
    return {"format": _FORMAT, "kind": "model", **values, "preprocessing": preprocessing}


def _noise(patch: TaskPatch) -> Tensor:
    """Two images (2, 3, S, S), because tracing would take a batch of one as a constant."""
    return torch.rand(2, 3, *height_and_width(patch.image_size), generator=torch.Generator().manual_seed(0))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits; raises ExportError if rounding cannot explain it."""
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(f"its logits differ by {difference:.2g} from those of the run; choose another format")
    return difference


@contextmanager
def _tracing() -> Iterator[None]:
    """A context that turns any error of tracing into an ExportError, and hides warnings about folded constants."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as cause:  # tracing calls any code, which may raise anything
        text = " ".join(str(cause).split())[:300]
        raise ExportError(f"the network cannot be traced ({text}); choose --format safetensors") from cause
