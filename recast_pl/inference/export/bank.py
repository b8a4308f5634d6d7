"""One ONNX graph for all tasks of a run: what a task has learnt is an input of the graph.

    numbers (N,)    all that the pieces have learnt, one after another: coefficients, entries, low-rank factors
    indices (M,)    the whole numbers that some pieces need besides, such as the places of chosen entries
    the head        weight (classes, D) and bias (classes,); of a compact patch its codes, steps and bias

The graph splits the numbers as mixed batches do, by `Piece.unpack`, and uses them in place of the parameters and
buffers that a task sets. So it works with every piece that tells by `unpack` what a task sets. Beside logits the graph
gives features. From those that the start of all tasks gives, a router finds the task of an image.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from recast_pl.errors import ExportError
from recast_pl.files import pack_tensors
from recast_pl.inference.export.exported import FORMAT, Exported, check_difference, facts, noise
from recast_pl.inference.export.graph import Session, trace
from recast_pl.inference.mixed_batch import StateEntry
from recast_pl.inference.prediction import REFUSE, WORTH_A_LOOK
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.router import Router
from recast_pl.learning.til_module import TILModule
from recast_pl.methods.piece import Piece
from recast_pl.methods.rounding import pack_codes, unpack_codes

Inputs = dict[str, Tensor]
"""What a graph receives beside the images, by name."""


@dataclass(frozen=True)
class Bank:
    """An exported model, and what it receives of each task.

    Args:
        model: The file of the model.
        tasks: The inputs of each task to an ONNX graph, by its name.
        files: The same as safetensors files, with names of classes, for a graph that needs them.
        router: A safetensors file by which the task of an image is found; None if there is none.
    """

    model: Exported
    tasks: dict[str, Inputs] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    router: bytes | None = None


class BankModel(nn.Module):
    """A network with the pieces of a method, which receives what a task has learnt as inputs.

    Args:
        module: The network; a task is active.
        entries: The tensors of a task's state.
        bits: Of each weight of the head; None for single precision.
    """

    def __init__(self, module: TILModule, entries: Sequence[StateEntry], bits: int | None) -> None:
        super().__init__()
        self.backbone, _ = module.current()
        self.pieces, self.entries, self.bits = module.pieces, entries, bits
        self.names: dict[Tensor, str] = {}
        """Names of all parameters and buffers in the backbone."""
        for name, tensor in (*self.backbone.named_parameters(), *self.backbone.named_buffers()):
            self.names.setdefault(tensor, name)

    def forward(
        self,
        images: Tensor,
        bias: Tensor,
        weight: Tensor | None = None,
        codes: Tensor | None = None,
        steps: Tensor | None = None,
        numbers: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and features (B, D) of images (B, 3, S, S) in [0, 1]; the others are a task's inputs."""
        features = functional_call(self.backbone, self._values(numbers, indices), (images,))  # (B, D)
        if codes is not None and steps is not None and self.bits is not None:
            weight = unpack_codes(codes, features.shape[1], self.bits) * steps[:, None]
        assert weight is not None
        return F.linear(features, weight, bias), features

    def _values(self, numbers: Tensor | None, indices: Tensor | None) -> dict[str, Tensor]:
        """What a task sets: parameters and buffers of the backbone by name."""
        states: list[dict[str, Tensor]] = [{} for _ in self.pieces]
        for given, fractions in ((numbers, True), (indices, False)):
            chosen = [entry for entry in self.entries if entry.dtype.is_floating_point is fractions]
            if given is None or not chosen:
                continue
            parts = given.split([math.prod(entry.shape) for entry in chosen])
            for entry, part in zip(chosen, parts, strict=True):
                states[entry.piece][entry.name] = part.reshape(1, *entry.shape)
        values: dict[str, Tensor] = {}
        for piece, state in zip(self.pieces, states, strict=True):
            for tensor, value in (piece.unpack(state) or {}).items():
                values[self.names[tensor]] = value[0].to(tensor.dtype)
        return values


@torch.no_grad()
def export_bank(
    module: TILModule, patches: Sequence[TaskPatch], router: Router | None = None, opset: int | None = None
) -> Bank:
    """One graph for some tasks of a run, and the inputs of each task.

    Args:
        module: Built on the base of the run, on the CPU.
        patches: The tasks. The graph receives heads of few bits if all tasks have them.
        router: Finds the task of an image; None for no file of the router.
        opset: Version of ONNX's operators; None for that of PyTorch's exporter.

    Raises:
        ExportError: If the graph cannot receive what a task has learnt, or the network cannot be traced.
    """
    patches = [replace(patch, head=dict(module.head_of(patch))) for patch in map(_as_read, patches)]
    bits = _common_bits(patches)
    entries = _check(module, patches)
    tasks = {patch.task: _learnt(patch.pieces) | _head(patch, bits) for patch in patches}
    first = patches[0]
    images, classes = {0: Dim("batch")}, {0: Dim("classes")}
    shapes = {name: None if name in ("numbers", "indices") else classes for name in tasks[first.task]}
    facts_of_bank = {"format": FORMAT, "kind": "bank"}
    facts_of_bank |= {name: facts(first)[name] for name in ("image_size", "preprocessing", "method", "base")}
    module.activate(first)
    content = trace(
        BankModel(module, entries, bits),
        {"images": noise(first)} | tasks[first.task],
        {"images": images} | shapes,
        ["logits", "features"],
        facts_of_bank,
        opset,
    )
    usage = f"onnxruntime.InferenceSession(FILE).run(['logits'], {{images, {', '.join(tasks[first.task])}}})"
    model = Exported(content, _compare(module, patches, tasks, content), f"{usage}, with images in [0, 1]")
    files = {patch.task: pack_tensors(tasks[patch.task], _facts(patch)) for patch in patches}
    return Bank(model, tasks, files, None if router is None else _router_file(module, router))


def _as_read(patch: TaskPatch) -> TaskPatch:
    """A patch in single precision, whose compact head is kept."""
    return replace(patch.widened(), rounded=patch.rounded)


def _common_bits(patches: Sequence[TaskPatch]) -> int | None:
    """Bits of each weight of the heads; None unless all are rounded alike."""
    bits = {
        patch.rounded.bits
        if patch.rounded is not None and torch.equal(patch.head["weight"], patch.rounded.state["weight"])
        else None
        for patch in patches
    }
    return bits.pop() if len(bits) == 1 else None


def _check(module: TILModule, patches: Sequence[TaskPatch]) -> tuple[StateEntry, ...]:
    """The tensors of a task's state; raises ExportError if one graph cannot receive those of all tasks."""
    method, advice = " + ".join(module.method), "choose onnx, with a file for each task"
    for patch in patches:
        module.activate(patch)
        if patch.image_size != patches[0].image_size:
            sizes = f"{patches[0].image_size} and {patch.image_size}"
            raise ExportError(f"tasks {patches[0].task!r} and {patch.task!r} have images of sizes {sizes}; {advice}")
        if _entries(patch.pieces) != _entries(patches[0].pieces):
            raise ExportError(f"tasks {patches[0].task!r} and {patch.task!r} differ in shape; {advice}")
    for piece, state in zip(module.pieces, patches[0].pieces, strict=True):
        if not _tells(piece, state):
            raise ExportError(f"{type(piece).__name__} of {method} sets more than numbers of the network; {advice}")
    entries, own = _entries(patches[0].pieces), sum(p.numel() for p in module.current()[0].parameters())
    numbers = sum(math.prod(entry.shape) for entry in entries)
    if 2 * numbers > own:
        raise ExportError(f"a task of {method} has {numbers:,} numbers, nearly as many as the network; {advice}")
    return entries


def _tells(piece: Piece, state: Mapping[str, Tensor]) -> bool:
    """Whether `Piece.unpack` describes all that a task sets."""
    return not state or piece.unpack({name: tensor[None] for name, tensor in state.items()}) is not None


def _entries(states: Sequence[Mapping[str, Tensor]]) -> tuple[StateEntry, ...]:
    return tuple(
        StateEntry(index, name, tuple(tensor.shape), tensor.dtype)
        for index, state in enumerate(states)
        for name, tensor in state.items()
    )


def _learnt(states: Sequence[Mapping[str, Tensor]]) -> Inputs:
    """The numbers and the whole numbers of a task's states, as far as there are any."""
    tensors = [tensor.detach().flatten() for state in states for tensor in state.values()]
    parts = {
        "numbers": [tensor.float() for tensor in tensors if tensor.is_floating_point()],
        "indices": [tensor for tensor in tensors if not tensor.is_floating_point()],
    }
    return {name: torch.cat(part) for name, part in parts.items() if part}


def _head(patch: TaskPatch, bits: int | None) -> Inputs:
    if bits is None or patch.rounded is None:
        return {name: patch.head[name].detach().float() for name in ("weight", "bias")}
    codes = pack_codes(patch.rounded.codes, bits).contiguous()
    return {"codes": codes, "steps": patch.rounded.steps.float(), "bias": patch.rounded.bias}


def _compare(module: TILModule, patches: Sequence[TaskPatch], tasks: Mapping[str, Inputs], content: bytes) -> float:
    """The largest difference of any task's logits; raises ExportError if rounding cannot explain it."""
    session, largest = Session(content), 0.0
    for patch in patches:
        module.activate(patch)
        found = session.logits({"images": noise(patch)} | tasks[patch.task])
        largest = max(largest, check_difference(found, module(noise(patch))))
    return largest


def _facts(patch: TaskPatch) -> dict[str, Any]:
    return {"format": FORMAT, "kind": "feed"} | {name: facts(patch)[name] for name in ("task", "classes", "base")}


@torch.no_grad()
def _router_file(module: TILModule, router: Router) -> bytes:
    """The numbers that every task starts from, and the linear scores of all classes for the features they give.

    It holds what `Router.linear` and `Router.strangeness` say, and `task_of` (K,), the position of the task of each
    class. The metadata names the tasks, and states the temperature of `recast_pl.learning.router.task_probabilities`,
    the share of known images to refuse, and from which probability on a second task classifies the image, too.
    """
    with isolate_rng():
        for piece in module.pieces:
            piece.begin_task()
        start = [piece.task_state() for piece in module.pieces]
    scores = router.linear | router.strangeness | {"task_of": router.task_of}
    told = {"format": FORMAT, "kind": "router", "base": module.base, "tasks": router.tasks}
    limits = {"temperature": router.temperature, "refuse": REFUSE, "worth_a_look": WORTH_A_LOOK}
    return pack_tensors(_learnt(start) | scores, told | limits)
