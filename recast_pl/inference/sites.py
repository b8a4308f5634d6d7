"""Layers that tell apart the tasks of the images that they are given, one after the other."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.parametrization import Inputs, Mixture
from recast_pl.methods.adaptation import Adaptation
from recast_pl.methods.piece import ADDED

Way = Literal["weights", "products"]
"""How a layer tells tasks apart: it runs on the images of each task with the weight generated for it, or on all images
at once, mixing products of each image with what weights consist of."""

Values = Mapping[Tensor, Tensor]
"""For parameters and buffers of layers their values in T tasks (T, *shape)."""

Rooms = dict[Any, Tensor]
"""Memory for generated weights, which all layers of a shape use one after the other, so that it stays in the cache."""


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Args:
        args: Its arguments.
        kwargs: And those by name.
        images: Length of the first dimension of all tensors that go in and come out; None if they differ.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    images: int | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal where costs are."""
        return tuple(getattr(value, "shape", value) for value in (*self.args, *self.kwargs.values()))

    def repeat(self, site: "Site", way: Way, values: Values, rooms: Rooms, counts: Sequence[int]) -> None:
        """Calls again, with its first image as often as it takes."""
        args = [repeat(value, sum(counts)) for value in self.args]
        kwargs = {name: repeat(value, sum(counts)) for name, value in self.kwargs.items()}
        with site.telling_apart(way, values, counts, rooms):
            site.module.forward(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Site:
    """A module that computes with numbers that differ from task to task.

    Args:
        module: Whose forward pass reads them.
        tensors: The parameters and buffers that hold them.
    """

    module: nn.Module
    tensors: list[Tensor]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal where costs are."""
        parts = (type(part) for part in self.module.modules())
        return (*parts, *(tensor.shape for tensor in (*self.module.parameters(), *self.tensors)))

    @property
    def ways(self) -> list[Way]:
        """How it can tell tasks apart."""
        return ["weights", "products"] if self._has_products() else ["weights"]

    @contextmanager
    def telling_apart(self, way: Way, values: Values, counts: Sequence[int], rooms: Rooms) -> Iterator[None]:
        """Within it, the module tells tasks apart.

        Args:
            way: One of `ways`.
            values: Those of the tasks in the batch.
            counts: How many images, one after the other, are of each of these tasks.
            rooms: Memory for weights.
        """
        forward, kept = self.module.forward, [tensor.data for tensor in self.tensors]

        def by_weights(*args: Any, **kwargs: Any) -> Any:
            with _roomy(self.module, rooms):
                return self._by_task(forward, values, counts, args, kwargs)

        def by_products(x: Tensor) -> Tensor:
            self._hold(values, torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)))
            return _product(self.module, x)  # type: ignore[arg-type]

        with _replaced(self.module, by_products if way == "products" else by_weights):
            try:
                yield
            finally:
                for tensor, data in zip(self.tensors, kept, strict=True):
                    tensor.data = data

    @contextmanager
    def listening(self) -> Iterator[list[Call]]:
        """Within it, calls of the module are noted."""
        calls, forward = list[Call](), self.module.forward

        def listen(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            outputs = output if isinstance(output, tuple) else (output,)
            lengths = {v.shape[:1] for v in (*args, *kwargs.values(), *outputs) if isinstance(v, Tensor)}
            calls.append(Call(args, kwargs, lengths.pop()[0] if len(lengths) == 1 and all(lengths) else None))
            return output

        with _replaced(self.module, listen):
            yield calls

    def _by_task(
        self, forward: Callable[..., Any], values: Values, counts: Sequence[int], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        parts = [_split(value, counts) for value in (*args, *kwargs.values())]
        outputs = []
        for task, given in enumerate(zip(*parts, strict=True)):
            self._hold(values, task)
            outputs.append(forward(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True))))
        return _join(outputs)

    def _hold(self, values: Values, index: int | Tensor) -> None:
        """Lets the tensors hold the values of a task, or those of B images with a first dimension (B, …)."""
        for tensor in self.tensors:
            tensor.data = values[tensor][index]

    def _has_products(self) -> bool:
        """Whether products take the part of the module's forward pass, and of all that differs from task to task."""
        layer, own = self.module, {id(tensor) for tensor in self.tensors}
        if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward:
            plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        else:
            plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        made = _made_of(layer) if plain else None
        if made is None:
            return False
        mixture, source, changes = made
        if not all(
            isinstance(change, Adaptation) and type(change).product is not Adaptation.product for change in changes
        ):
            return False
        needed = {id(p) for change in changes for p in change.parameters() if p.requires_grad}
        needed |= {id(source)} if mixture is not None else set()
        others = {id(b) for change in changes for b in change.buffers()} | {id(layer.bias)}
        others |= {id(source)} if isinstance(layer, nn.Linear) else set()
        return needed <= own <= needed | others


def find_sites(network: nn.Module, tensors: Iterable[Tensor]) -> list[Site] | None:
    """The modules whose forward passes read tensors.

    Args:
        network: The network.
        tensors: Some of its parameters and buffers.

    Returns:
        The modules; None if a tensor belongs to none or several, or a module's pass contains another's.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, tensor in (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ):
        owners[id(tensor)].append(name)
    found: dict[nn.Module, list[Tensor]] = {}
    for tensor in tensors:
        names = owners[id(tensor)]
        if len(names) != 1:
            return None
        found.setdefault(_runner(network, names[0]), []).append(tensor)
    for module in found:
        parts = (child for name, child in module.named_children() if name != ADDED)  # which runs in hooks
        if any(inner in found for part in parts for inner in part.modules()):
            return None
    return [Site(module, held) for module, held in found.items()]


def _runner(network: nn.Module, name: str) -> nn.Module:
    """The module in whose forward pass a parameter or buffer is used; attention reads the weights of its parts."""
    path, generated, _ = f".{name}".partition(".parametrizations.")
    words = (path if generated else path.rpartition(".")[0]).split(".")[1:]
    above = [network.get_submodule(".".join(words[:depth])) for depth in range(len(words) + 1)]
    return next((module for module in above if isinstance(module, nn.MultiheadAttention)), above[-1])


def _made_of(layer: nn.Module) -> tuple[Mixture | None, Tensor, list[nn.Module]] | None:
    """Of a weight the templates, their coefficients, and what changes it; without templates a plain weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None, layer.weight, []  # type: ignore[return-value]
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    if isinstance(chain[0], Mixture):
        return chain[0], chain.original0, list(chain)[1:]
    return (None, chain.original, list(chain)) if chain.is_tensor else None


def _product(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The layer's output for x (B, …), where what makes its weight has a first dimension (B, …)."""
    made = _made_of(layer)
    assert made is not None
    (mixture, source, changes), inputs = made, Inputs(layer, x)
    if mixture is not None:
        y = mixture.product(inputs, source)  # (B, N, rows)
    elif source.ndim == 3:
        y = inputs.rows() @ source.mT  # (B, N, columns) @ (B, columns, rows)
    else:
        y = inputs.times(source.flatten(1))
    for change in changes:
        assert isinstance(change, Adaptation)
        change.product(inputs, y)
    if layer.bias is not None:
        y += layer.bias if layer.bias.ndim == 1 else layer.bias[:, None]
    return inputs.output(y)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, a module has another forward pass."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _roomy(module: nn.Module, rooms: Rooms) -> Iterator[None]:
    """Within it, the weights of a module are generated into memory that is there already."""
    mixtures = [part for part in module.modules() if isinstance(part, Mixture)]
    for number, mixture in enumerate(mixtures):
        like = mixture.bank.templates[0]
        mixture.room = rooms.setdefault((number, like.shape, like.dtype, like.device), torch.empty_like(like))
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.room = None


def _split(value: Any, counts: Sequence[int]) -> Sequence[Any]:
    return value.split(list(counts)) if isinstance(value, Tensor) else [value] * len(counts)


def repeat(value: Any, count: int) -> Any:
    """The first image of a batch so many times; what is no tensor as it is."""
    return value[:1].repeat_interleave(count, 0) if isinstance(value, Tensor) else value


def _join(outputs: Sequence[Any]) -> Any:
    """What a module returns for all images, from what it returns for parts of them."""
    if isinstance(outputs[0], tuple):
        return tuple(_join(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(list(outputs)) if isinstance(outputs[0], Tensor) else outputs[0]
