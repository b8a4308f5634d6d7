"""A learnt task for programs that know nothing of this one: a plain model, an ONNX graph, an exported program."""

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

_FORMAT = 1

_TOLERANCE = 1e-3
"""Largest difference of a logit, relative to the largest, that is rounding and not a fault."""

_BATCHES = {"images": {0: Dim("batch")}}
"""Of the inputs' dimensions those that may be of any size."""

_ONNX_BYTES = 2**31 - 2**20
"""What a file of ONNX has room for, less what the graph takes."""


@dataclass(frozen=True)
class Exported:
    """A file to be written.

    Args:
        content: Its bytes.
        difference: Largest difference between its logits and those of the run's own network, on two images of noise.
        usage: How to use it, in a line.
    """

    content: bytes
    difference: float
    usage: str


class Classifier(nn.Module):
    """A backbone and a head: from images (B, 3, S, S) in [0, 1] to logits (B, classes), normalisation inside.

    Args:
        backbone: From images to features (B, D).
        head: From features to logits.
    """

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits


class SwappableClassifier(nn.Module):
    """The same with the bank inside: coefficients and head come with every call, so that one graph serves all tasks.

    Args:
        backbone: With coefficients in place of its weights, a single set (1, n) for each.
        coefficients: Name of each of them in the backbone, and n, in the order of a patch.
    """

    def __init__(self, backbone: Backbone, coefficients: Mapping[str, int]) -> None:
        super().__init__()
        self.backbone, self.coefficients = backbone, dict(coefficients)

    def forward(self, images: Tensor, coefficients: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits (B, classes).

        Args:
            images: (B, 3, S, S) in [0, 1].
            coefficients: Of a task (Σ n,).
            weight: Of its head (classes, D).
            bias: Of its head (classes,).
        """
        parts = coefficients.split(list(self.coefficients.values()))  # each (n,)
        state = {name: part[None] for name, part in zip(self.coefficients, parts, strict=True)}
        features = functional_call(self.backbone, state, (images,))  # (B, D)
        return nn.functional.linear(features, weight, bias)


@torch.no_grad()
def export_safetensors(module: TILModule, patch: TaskPatch) -> Exported:
    """The weights of a plain model of timm or torchvision, whose classifier is the task's head.

    Args:
        module: With the task active.
        patch: The task.

    Raises:
        ExportError: If no plain model computes what the network does.
    """
    network, images = dense_copy(module), _noise(patch)
    backbone = network.backbone
    try:
        recipe = module.backbone_config.recipe(backbone.net, len(patch.classes), patch.image_size)
        plain = recipe.make()
        weights = _plain_weights(network, plain)
        plain.load_state_dict(weights)
        difference = _difference(plain((images - backbone.mean) / backbone.std), network(images))
    except (BackboneError, ExportError, RuntimeError, TypeError, ValueError, KeyError) as cause:
        raise ExportError(
            f"no plain model computes what {' + '.join(module.method)} on {module.backbone_config.name!r} does, as it "
            f"changes more than weights or is no architecture by name; choose onnx or torch_export ({str(cause)[:200]})"
        ) from cause
    facts = {**_facts(patch), "constructor": recipe.constructor, "arguments": recipe.arguments}
    usage = f"{recipe}.load_state_dict(safetensors.torch.load_file(FILE)), images normalised by the file's mean and std"
    return Exported(pack_tensors(weights, facts), difference, usage)


@torch.no_grad()
def export_torch(module: TILModule, patch: TaskPatch) -> Exported:
    """An `ExportedProgram` from images (B, 3, S, S) in [0, 1] to logits (B, classes), for any B.

    Args:
        module: With the task active.
        patch: The task.

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

    Args:
        module: With the task active.
        patch: The task.

    Raises:
        ExportError: If the network cannot be traced, or is larger than such a file can be.
    """
    network = dense_copy(module)
    return _onnx(network, {"images": _noise(patch)}, _BATCHES, network, _facts(patch))


def export_bank(module: TILModule, patch: TaskPatch) -> Exported:
    """An ONNX graph with the template bank inside, which takes what a task is as inputs: those of `feed`.

    Args:
        module: With a task active, learnt by RECAST alone.
        patch: The task; any of the run gives the same graph, for any number of classes.

    Raises:
        ExportError: If a task is more than coefficients and a head, or as for `export_onnx`.
    """
    sizes = {}
    for target, parameter in _recast(module).parameters.items():
        path, _, attribute = target.rpartition(".")
        sizes[f"net.{path}.parametrizations.{attribute}.original0"] = parameter.shape[1]
    network = SwappableClassifier(copy.deepcopy(_parts(module)[0]), sizes)
    classes = {0: Dim("classes")}
    shapes = {**_BATCHES, "coefficients": None, "weight": classes, "bias": classes}
    facts = {"kind": "bank"} | {name: _facts(patch)[name] for name in ("format", "image_size", "base")}
    return _onnx(network, {"images": _noise(patch), **feed(module, patch)}, shapes, dense_copy(module), facts)


def feed(module: TILModule, patch: TaskPatch) -> dict[str, Tensor]:
    """What the graph of `export_bank` takes for a task, beside images.

    Args:
        module: Of the run.
        patch: The task.

    Returns:
        `coefficients` (Σ n,), and of the head `weight` (classes, D) and `bias` (classes,).

    Raises:
        ExportError: If a task is more than coefficients and a head.
    """
    state = patch.pieces[module.pieces.index(_recast(module))]
    return {name: tensor.float() for name, tensor in {**state, **patch.head}.items()}


def feed_file(module: TILModule, patch: TaskPatch) -> bytes:
    """The same as a safetensors file, with the class names.

    Args:
        module: Of the run.
        patch: The task.

    Raises:
        ExportError: If a task is more than coefficients and a head.
    """
    return pack_tensors(feed(module, patch), {**_facts(patch), "kind": "feed"})


Format = Literal["safetensors", "onnx", "torch_export", "onnx_bank"]

Export = Callable[[TILModule, TaskPatch], Exported]

FORMATS: dict[Format, tuple[Export, str]] = {
    "safetensors": (export_safetensors, ".safetensors"),
    "onnx": (export_onnx, ".onnx"),
    "torch_export": (export_torch, ".pt2"),
    "onnx_bank": (export_bank, ".onnx"),
}
"""For each format what makes a file of it, and the file's ending."""


def dense_copy(module: TILModule) -> Classifier:
    """The network of the active task with its weights generated for good, and its head; the original stays as it is.

    `remove_parametrizations` would take the weights' properties from the class that a copy shares with the original.

    Args:
        module: With a task active.
    """
    network = Classifier(*copy.deepcopy(_parts(module))).cpu().requires_grad_(False).eval()
    for layer in network.modules():
        if parametrize.is_parametrized(layer):
            dense = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}  # type: ignore[union-attr]
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer.parametrizations
            for name, weight in dense.items():
                layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return network


def run_onnx(content: bytes, inputs: Mapping[str, Tensor]) -> Tensor:
    """What ONNX Runtime makes of a graph's inputs, on the CPU.

    Args:
        content: Of the file.
        inputs: Tensors by name.

    Returns:
        The logits (B, classes).
    """
    session = extra("onnxruntime", "export").InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


@torch.no_grad()
def _onnx(
    network: nn.Module, inputs: dict[str, Tensor], shapes: Any, dense: Classifier, facts: Mapping[str, Any]
) -> Exported:
    """Traces a network into a graph with metadata, and compares it with the dense network."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        extra(package, "export")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _ONNX_BYTES:
        raise ExportError(f"{size / 1e9:.1f} GB of weights are too many for a file of ONNX; choose torch_export")
    with _tracing():
        program: Any = torch.onnx.export(
            network, kwargs=inputs, dynamic_shapes=shapes, output_names=["logits"], dynamo=True, verbose=False
        )
    texts = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    program.model.metadata_props.update(texts)
    content: bytes = program.model_proto.SerializeToString()
    difference = _difference(run_onnx(content, inputs), dense(inputs["images"]))
    usage = f"onnxruntime.InferenceSession(FILE).run(['logits'], {{{', '.join(inputs)}}}), with images in [0, 1]"
    return Exported(content, difference, usage)


def _plain_weights(network: Classifier, plain: nn.Module) -> dict[str, Tensor]:
    """The state of a plain model: what the network has by the same name, and the head under that of the classifier."""
    own, head = network.backbone.net.state_dict(), network.head.state_dict()
    for name, place in plain.state_dict().items():
        if name not in own:  # the classifier, which the backbone lacks
            own[name] = head[name.rpartition(".")[2]].view_as(place)
    return {name: tensor.clone() for name, tensor in own.items()}


def _recast(module: TILModule) -> Recast:
    """The one piece of a method whose tasks are coefficients."""
    recast = [piece for piece in module.pieces if isinstance(piece, Recast)]
    if len(recast) != 1 or any(piece.parameters for piece in module.pieces if piece is not recast[0]):
        raise ExportError(
            f"a bank serves tasks that are coefficients and a head, which those of {' + '.join(module.method)} are "
            "not; choose onnx, with a file for each task"
        )
    return recast[0]


def _parts(module: TILModule) -> tuple[Backbone, nn.Linear]:
    assert module.backbone is not None
    assert module.head is not None
    return module.backbone, module.head


def _facts(patch: TaskPatch) -> dict[str, Any]:
    names = ("task", "classes", "image_size", "mean", "std", "method", "base")
    return {"format": _FORMAT, "kind": "model", **{name: getattr(patch, name) for name in names}}


def _noise(patch: TaskPatch) -> Tensor:
    """Two images (2, 3, S, S); a single one would be traced as the only number there is."""
    return torch.rand(2, 3, patch.image_size, patch.image_size, generator=torch.Generator().manual_seed(0))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of logits, which must be rounding."""
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ExportError(f"its logits differ by {difference:.2g} from those of the run; choose another format")
    return difference


@contextmanager
def _tracing() -> Iterator[None]:
    """Says in one line what cannot be traced; what constants overflow to while they are folded concerns nobody."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as cause:  # tracing calls any code, which may raise anything
        text = " ".join(str(cause).split())[:300]
        raise ExportError(f"the network cannot be traced ({text}); choose --format safetensors") from cause
