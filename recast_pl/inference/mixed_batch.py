"""Batches whose images belong to several tasks, classified by one pass of the network."""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.backbones.backbone import Backbone
from recast_pl.compat.torch import replaced_forward
from recast_pl.decomposition.parametrization import Inputs, Mixture, multiplies_only
from recast_pl.learning.acceleration import MergedWeights
from recast_pl.methods.adaptation import Adaptation
from recast_pl.methods.piece import ADDED, Piece

_ENTRY_COST = 16
"""How many multiplications within a matrix product take as long as one pass over an entry of a weight or an output.

Measured with RECAST on ViT-S and one CPU core: 11 to 13, and above 25 where memory is slow. A matrix product is limited
by arithmetic, a pass over entries by memory.
"""

_CHAIN = "parametrizations.weight."
"""The start of the names, within a layer, of the tensors that its weight is generated from."""

_ENOUGH_IMAGES = 8
"""From so many images per task on, a pass for each task costs a CPU no more than a common pass.

Measured with RECAST and spectral templates on ViT-S at 98×98.
"""


class StateEntry(NamedTuple):
    """One tensor of a task's states: the index of its piece, its name, shape and type."""

    piece: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class PackedState(NamedTuple):
    """The states of a task's pieces in little memory; each tensor object would take a kilobyte more.

    Args:
        entries: The tensors; tasks with the same tensors share this tuple.
        content: Their bytes, one tensor after the other.
    """

    entries: tuple[StateEntry, ...]
    content: bytes


class Mix(NamedTuple):
    """Which task each image of a batch belongs to, and what the tasks change.

    Args:
        values: For each parameter or buffer that tasks change its values in T tasks (T, *shape).
        counts: How many consecutive images belong to each task (T,).
        task_of: The index of each image's task (B,).
    """

    values: Mapping[Tensor, Tensor]
    counts: list[int]
    task_of: Tensor


class MixedBatch:
    """Computes the features of a batch whose images belong to several tasks.

    One pass of the network serves all tasks if each of them changes the same parameters, and if the first dimension of
    all that a layer with such a parameter receives and returns is that of the images.
    Otherwise, and on a CPU also from `_ENOUGH_IMAGES` per task on, the network runs once for each task.

    In a common pass, each layer that differs between tasks uses one of two strategies:

    - *weights*: for each task, load its values, generate the weight and apply the layer to the images of the task;
    - *products*: multiply all images by the layer's templates (or by its frozen weight), and combine the products with
      the coefficients of each image's task.

    A layer that can use products does so where they take fewer operations, see `TaskLayer.products_are_cheaper`.
    These rules depend on shapes and counts alone, so that equal batches give equal results.

    Args:
        backbone: The network with the pieces attached, on its device.
        pieces: The pieces of the method.
    """

    def __init__(self, backbone: Backbone, pieces: Sequence[Piece]) -> None:
        self._backbone, self._pieces = backbone, pieces
        self._merged, self._buffers = MergedWeights(), dict[Any, Tensor]()
        self._entries: dict[tuple[StateEntry, ...], tuple[StateEntry, ...]] = {}
        self._layers: dict[Any, list[TaskLayer] | None] = {}

    def pack(self, states: Sequence[Mapping[str, Tensor]]) -> PackedState:
        """Copies the states of a task, one for each piece, into little memory."""
        tensors = {
            StateEntry(index, name, tuple(tensor.shape), tensor.dtype): tensor.detach().cpu()
            for index, state in enumerate(states)
            for name, tensor in state.items()
        }
        entries = self._entries.setdefault(tuple(tensors), tuple(tensors))
        return PackedState(entries, b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))

    @torch.no_grad()
    def features(self, images: Tensor, tasks: Sequence[PackedState], counts: Sequence[int]) -> Tensor:
        """Features of images that are sorted by task.

        Args:
            images: (B, 3, S, S) in [0, 1].
            tasks: The states of T tasks.
            counts: How many consecutive images belong to each task (T,).

        Returns:
            Features (B, D).
        """
        enough = images.device.type == "cpu" and len(images) >= _ENOUGH_IMAGES * len(tasks)
        layers = None if enough or len(tasks) == 1 else self.layers(images, tasks)
        if layers is None:
            return self.one_by_one(images, tasks, counts)
        return self.together(images, tasks, counts, layers)

    def one_by_one(self, images: Tensor, tasks: Sequence[PackedState], counts: Sequence[int]) -> Tensor:
        """Features by one pass for each task. Arguments are those of `features`."""
        parts = []
        for task, part in zip(tasks, images.split(list(counts)), strict=True):
            for piece, state in zip(self._pieces, self._unpack([task]), strict=True):
                piece.load_task_state({name: values[0] for name, values in state.items()})
            with self._merged.of(self._backbone):
                parts.append(self._backbone(part))
        return torch.cat(parts)

    def together(
        self,
        images: Tensor,
        tasks: Sequence[PackedState],
        counts: Sequence[int],
        layers: Iterable["TaskLayer"],
        products: bool | None = None,
    ) -> Tensor:
        """Features by one pass for all tasks.

        Arguments are those of `features`; the layers that `layers` has returned; and whether those that can use
        products do so, None for the rule.
        """
        task_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(images.device)
        mix = Mix(self._values(tasks) or {}, list(counts), task_of)
        if torch.is_autocast_enabled(images.device.type):
            products = False  # they would be combined in half precision
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.mixing(mix, self._buffers, products))
            features: Tensor = self._backbone(images)
        return features

    def layers(self, images: Tensor, tasks: Sequence[PackedState]) -> list["TaskLayer"] | None:
        """The layers that differ between tasks; None if the tasks cannot share a pass."""
        if len({id(task.entries) for task in tasks}) > 1:
            return None
        numbers = len(tasks) * sum(math.prod(entry.shape) for entry in tasks[0].entries)
        if numbers > sum(p.numel() for p in self._backbone.parameters()):
            return None  # the values of all tasks at once would need more memory than the network
        key = (images.shape[1:], tasks[0].entries)
        if key not in self._layers:
            values = self._values(tasks[:1])
            layers = None if values is None else find_layers(self._backbone, values)
            fits = layers is not None and _measure(self._backbone, layers, images[:1])
            self._layers[key] = layers if fits else None
        return self._layers[key]

    def _values(self, tasks: Sequence[PackedState]) -> dict[Tensor, Tensor] | None:
        """For each parameter or buffer that tasks change its values (T, *shape); None if they change more."""
        values: dict[Tensor, Tensor] = {}
        for piece, state in zip(self._pieces, self._unpack(tasks), strict=True):
            of_piece = piece.unpack(state)
            if of_piece is None:
                return None
            values |= {tensor: new.to(tensor.device, tensor.dtype) for tensor, new in of_piece.items()}
        return values

    def _unpack(self, tasks: Sequence[PackedState]) -> list[dict[str, Tensor]]:
        """For each piece the states of T tasks with the same entries, each tensor (T, *shape)."""
        states: list[dict[str, Tensor]] = [{} for _ in self._pieces]
        content = bytearray(b"".join(task.content for task in tasks))
        sizes = [math.prod(entry.shape) * entry.dtype.itemsize for entry in tasks[0].entries]
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        columns = flat.view(len(tasks), sum(sizes)).split(sizes, 1)
        for entry, column in zip(tasks[0].entries, columns, strict=True):
            values = column.clone(memory_format=torch.contiguous_format).flatten().view(entry.dtype)
            states[entry.piece][entry.name] = values.view(len(tasks), *entry.shape)
        return states


class TaskLayer:
    """A layer some of whose parameters or buffers (`tensors`, by name within the layer) differ between tasks."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.module, self.tensors = module, dict(tensors)
        generated = parametrize.is_parametrized(module, "weight")
        self._chain: Any = module.parametrizations["weight"] if generated else ()  # type: ignore[index]
        self._mixture = next((part for part in self._chain if isinstance(part, Mixture)), None)
        self._changes = {index: part for index, part in enumerate(self._chain) if part is not self._mixture}
        self.has_products = generated and multiplies_only(module) and self._knows_products()
        """Whether the layer can use products."""
        self.size = 0
        """How many numbers the layer returns for an image; `_measure` counts them."""

    @contextmanager
    def mixing(self, mix: Mix, buffers: dict[Any, Tensor], products: bool | None) -> Iterator[None]:
        """A context in which the layer applies to each image the values of its task.

        Args:
            mix: The images and their tasks.
            buffers: Memory for generated weights, shared by all layers; it stays in the processor's cache.
            products: Whether to use products, if the layer can; None for the rule.
        """
        if self.has_products and (self.products_are_cheaper(mix.counts) if products is None else products):
            forward = partial(self._by_products, mix)
        else:
            forward = partial(self._by_weights, mix, self.module.forward)
        with _sharing(buffers, self.module), replaced_forward(self.module, forward):
            yield

    def products_are_cheaper(self, counts: Sequence[int]) -> bool:
        """The rule that chooses between weights and products, by an estimate of the operations.

        With n templates (0 for a frozen weight), c changes on top of them, a weight of R×C, T tasks and N rows (tokens
        or positions) of the images, the estimates of what one way takes and the other does not are, in multiplications
        within a matrix product:

        - weights: `_ENTRY_COST`·T·(n + c)·R·C, one pass over the weight for each template and each change;
        - products: N·(n − 1)·R·C for the further templates, and `_ENTRY_COST`·N·c·(R + C), one pass over the layer's
          input and output for each change.

        Args:
            counts: How many images belong to each task (T,).
        """
        templates = self._mixture.bank.templates if self._mixture else self._chain.original[None]  # (n or 1, R, …)
        n, changes, (r, c) = len(templates) if self._mixture else 0, len(self._changes), templates[0].flatten(1).shape
        rows = self.size // r * sum(counts)
        weights = _ENTRY_COST * len(counts) * (n + changes) * r * c
        products = rows * max(n - 1, 0) * r * c + _ENTRY_COST * rows * changes * (r + c)
        return products < weights

    def _knows_products(self) -> bool:
        """Whether the parts of the weight have products, and hold all tensors that differ and all that are trained."""
        if not all(isinstance(change, Adaptation) and change.has_product for change in self._changes.values()):
            return False
        named = {**dict(self._chain.named_parameters()), **dict(self._chain.named_buffers())}
        trained = {_CHAIN + name for name, tensor in named.items() if tensor.requires_grad}
        return trained <= self.tensors.keys() <= {_CHAIN + name for name in named if name != "original"}

    def _by_weights(self, mix: Mix, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The layer's output for all images, by its own `forward` for each task."""
        outputs = []
        for task, (own_args, own_kwargs) in enumerate(_split(args, kwargs, mix.counts)):
            for tensor in self.tensors.values():
                tensor.copy_(mix.values[tensor][task])
            outputs.append(forward(*own_args, **own_kwargs))
        return _join(outputs)

    def _by_products(self, mix: Mix, x: Tensor) -> Tensor:
        """The layer's output for all images, from products with matrices that all tasks share."""
        layer: Any = self.module
        own = {name.removeprefix(_CHAIN): mix.values[tensor][mix.task_of] for name, tensor in self.tensors.items()}
        inputs = Inputs(layer, x)
        if self._mixture is None:
            y = inputs.times(self._chain.original.flatten(1))  # (B, N, rows)
        else:
            y = self._mixture.product(inputs, own["original0"])
        for index, change in self._changes.items():
            start = f"{index}."
            parts = {name.removeprefix(start): value for name, value in own.items() if name.startswith(start)}
            _with_tensors(change, parts).product(inputs, y)
        return inputs.output(y if layer.bias is None else y.add_(layer.bias))


def find_layers(network: nn.Module, tensors: Iterable[Tensor]) -> list[TaskLayer] | None:
    """The layers that use some tensors of a network, which they may share; None if a layer contains another."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    parameters, buffers = network.named_parameters, network.named_buffers
    for name, tensor in (*parameters(remove_duplicate=False), *buffers(remove_duplicate=False)):
        names[tensor].append(name)
    found: dict[nn.Module, dict[str, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        for name in names[tensor]:
            path = _layer_of(network, name)
            found[network.get_submodule(path)][name.removeprefix(f"{path}.")] = tensor
    for module in found:
        parts = (child for name, child in module.named_children() if name != ADDED)  # those run in hooks
        if any(inner in found for part in parts for inner in part.modules()):
            return None
    return [TaskLayer(module, own) for module, own in found.items()]


def _layer_of(network: nn.Module, name: str) -> str:
    """Name of the module whose forward pass uses a parameter: attention uses those of its parts, too."""
    words = name.split(".")
    for depth, word in enumerate(words[:-1]):
        path = ".".join(words[:depth])
        if word == "parametrizations" or isinstance(network.get_submodule(path), nn.MultiheadAttention):
            return path
    return ".".join(words[:-1])


def _measure(network: nn.Module, layers: Sequence[TaskLayer], image: Tensor) -> bool:
    """Counts what layers return; whether the first dimension of all that they receive and return is that of images."""
    for count in (2, 3):  # another dimension may have one of these lengths, but not both
        lengths: dict[TaskLayer, set[Any]] = {layer: set() for layer in layers}

        def record(layer: TaskLayer, lengths: set[Any], _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs = [v for v in (output if isinstance(output, tuple) else (output,)) if isinstance(v, Tensor)]
            layer.size = sum(v.shape[1:].numel() for v in outputs)
            lengths |= {v.shape[:1] for v in (*args, *kwargs.values(), *outputs) if isinstance(v, Tensor)}

        with ExitStack() as stack:
            for layer, found in lengths.items():
                hook = partial(record, layer, found)
                stack.enter_context(layer.module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            network(image.repeat_interleave(count, 0))
        if any(found != {(count,)} for found in lengths.values()):
            return False
    return True


@contextmanager
def _sharing(buffers: dict[Any, Tensor], layer: nn.Module) -> Iterator[None]:
    """A context in which a layer's weights are mixed into memory that all layers of the same shape share."""
    mixtures = [part for part in layer.modules() if isinstance(part, Mixture)]
    for number, mixture in enumerate(mixtures):
        like = mixture.bank.templates[0]
        key = (number, like.shape, like.dtype, like.device)
        buffers[key] = mixture.workspace = buffers[key] if key in buffers else torch.empty_like(like)
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.workspace = None


def _with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """A shallow copy of a module that has other tensors in place of some parameters and buffers."""
    view = copy.copy(module)
    vars(view).update(tensors)  # attributes come before registered parameters
    return view


def _split(args: Sequence[Any], kwargs: Mapping[str, Any], counts: list[int]) -> list[tuple[Any, dict[str, Any]]]:
    """Positional and named arguments for the images of each task."""
    columns = [v.split(counts) if isinstance(v, Tensor) else [v] * len(counts) for v in (*args, *kwargs.values())]
    rows = list(zip(*columns, strict=True))
    return [(row[: len(args)], dict(zip(kwargs, row[len(args) :], strict=True))) for row in rows]


def _join(outputs: Sequence[Any]) -> Any:
    """What a layer returns for all images, from what it returns for the parts."""
    if isinstance(outputs[0], tuple):
        return tuple(_join(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(list(outputs)) if isinstance(outputs[0], Tensor) else outputs[0]
