"""Batches in which each image has a task of its own: one pass of the network, in which layers tell the tasks apart."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.backbones import Backbone
from recast_pl.decomposition.surgery import Inputs, Mixture
from recast_pl.til.adaptations import Adaptation
from recast_pl.til.efficiency import MergedWeights
from recast_pl.til.piece import ADDED, Piece
from recast_pl.til.states import TaskStates

Way = Literal["weights", "products"]
"""How a layer tells tasks apart: it runs on the images of each task with the weight generated for it, or on all images
at once, mixing products of each image with what weights consist of."""
Values = Mapping[Tensor, Tensor]
"""For parameters and buffers of layers their values in T tasks (T, *shape)."""
Rooms = dict[Any, Tensor]
"""Memory for generated weights, which all layers of a shape use one after the other, so that it stays in the cache."""


class Cost(NamedTuple):
    """Seconds that something takes, as measured.

    Args:
        each: For each time that it is done.
        image: For each image.
    """

    each: float
    image: float

    def of(self, times: int, images: int) -> float:
        """Seconds for so many times, and images in all."""
        return times * self.each + images * self.image


class MixedTasks:
    """Features of images of several tasks, by one pass of the network for all of them, or one for each task.

    In one pass, each layer that tells tasks apart does so in its cheaper way. Costs are measured when images of a size
    first come.

    Args:
        backbone: With the pieces attached, on its device.
        pieces: The method.
        states: What the tasks are.
    """

    def __init__(self, backbone: Backbone, pieces: Sequence[Piece], states: TaskStates) -> None:
        self._backbone, self._pieces, self._states = backbone, pieces, states
        self._merged, self._rooms = MergedWeights(), Rooms()
        self._surveys: dict[Any, Survey | None] = {}

    @torch.no_grad()
    def features(self, images: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Features (B, D), without gradients.

        Args:
            images: (B, 3, S, S) in [0, 1].
            rows: Of the tasks, among the states.
            counts: How many images, one after the other, are of each.
        """
        ways = self.choose(images, rows) if len(rows) > 1 else None
        return self.apart(images, rows, counts) if ways is None else self.together(images, rows, counts, ways)

    def choose(self, images: Tensor, rows: Sequence[int]) -> "dict[Site, Way] | None":
        """What `together` is to do; None if `apart` is cheaper, or the only way. Arguments are those of `features`."""
        if len(rows) * self._states.numbers > sum(p.numel() for p in self._backbone.parameters()):
            return None  # copies of whole networks, side by side, would need too much memory
        autocast = torch.is_autocast_enabled(images.device.type)
        key = (images.shape[1:], autocast)
        if key not in self._surveys:
            self._surveys[key] = self._survey(images[:1], rows[:2], autocast)
        survey = self._surveys[key]
        return None if survey is None else survey.choose(len(rows), len(images))

    def apart(self, images: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Features by a pass for each task, on merged weights. Arguments are those of `features`."""
        parts = []
        for row, part in zip(rows, images.split(list(counts)), strict=True):
            for piece, state in zip(self._pieces, self._states.of(row), strict=True):
                piece.load_task_state(state)
            with self._merged.of(self._backbone):
                parts.append(self._backbone(part))
        return torch.cat(parts)

    def together(
        self, images: Tensor, rows: Sequence[int], counts: Sequence[int], ways: "Mapping[Site, Way]"
    ) -> Tensor:
        """Features by one pass, in which each site goes its way. Further arguments are those of `features`."""
        values = self._values(rows) or {}
        with ExitStack() as stack:
            for site, way in ways.items():
                stack.enter_context(site.telling_apart(way, values, counts, self._rooms))
            features: Tensor = self._backbone(images)
        return features

    def _values(self, rows: Sequence[int]) -> Values | None:
        """What layers hold in each task; None if there is more to a task."""
        values: dict[Tensor, Tensor] = {}
        device = self._backbone.mean.device
        for piece, state in zip(self._pieces, self._states.of(torch.tensor(rows)), strict=True):
            unpacked = piece.unpack({name: tensor.to(device) for name, tensor in state.items()})
            if unpacked is None:
                return None
            values |= unpacked
        return values

    def _survey(self, image: Tensor, rows: Sequence[int], autocast: bool) -> "Survey | None":
        """What things cost for images like one (1, 3, S, S); None if layers cannot tell tasks apart."""
        values = self._values(rows)
        sites = None if values is None else find_sites(self._backbone, values)
        calls = None if sites is None else self._calls(sites, image)
        if values is None or calls is None:
            return None
        if not calls:  # tasks differ in nothing but their heads
            return Survey({}, Cost(0, 0), Cost(0, 0))
        measured: dict[Any, Cost] = {}  # layers of a kind cost the same
        costs: dict[Site, dict[Way, Cost]] = {site: {} for site in calls}
        for site, call in calls.items():
            for way in site.ways[: 1 if autocast else None]:  # products would be mixed in half precision
                key = (way, site.kind, call.kind)
                if key not in measured:
                    measured[key] = _measure(partial(call.repeat, site, way, values, self._rooms), way, image.device)
                costs[site][way] = measured[key]
        layers = [cost["weights"] for cost in costs.values()]
        ways: dict[Site, Way] = dict.fromkeys(costs, "weights")
        whole = _measure(lambda c: self.together(_repeat(image, sum(c)), rows, c, ways), "products", image.device)
        rest = Cost(whole.each - 2 * sum(c.each for c in layers), whole.image - sum(c.image for c in layers))
        apart = _measure(lambda c: self.apart(_repeat(image, sum(c)), rows, c), "weights", image.device)
        return Survey(costs, rest, apart)

    def _calls(self, sites: "Sequence[Site]", image: Tensor) -> "dict[Site, Call] | None":
        """With what each site is called for an image; None if one is not, or if images are not its first dimension."""
        calls: dict[Site, Call] = {}
        for count in (2, 3):  # of which another dimension may have one, but not both
            with ExitStack() as stack:
                seen = {site: stack.enter_context(site.listening()) for site in sites}
                self._backbone(_repeat(image, count))
            if not all(found and all(call.images == count for call in found) for found in seen.values()):
                return None
            calls = {site: found[0] for site, found in seen.items()}
        return calls


@dataclass(frozen=True)
class Survey:
    """What is known of costs.

    Args:
        layers: Of each site, by way; in the way of weights for each task, in that of products once a batch.
        rest: Of one pass for all, without the sites, once a batch.
        apart: Of one pass for each task.
    """

    layers: "Mapping[Site, Mapping[Way, Cost]]"
    rest: Cost
    apart: Cost

    def choose(self, tasks: int, images: int) -> "dict[Site, Way] | None":
        """The cheapest way of each site, for so many tasks and images; None if a pass for each task is cheaper."""
        together, ways = self.rest.of(1, images), dict["Site", Way]()
        for site, costs in self.layers.items():
            seconds = {way: cost.of(tasks if way == "weights" else 1, images) for way, cost in costs.items()}
            ways[site] = min(seconds, key=seconds.__getitem__)
            together += seconds[ways[site]]
        return ways if together <= self.apart.of(tasks, images) else None


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
        args = [_repeat(value, sum(counts)) for value in self.args]
        kwargs = {name: _repeat(value, sum(counts)) for name, value in self.kwargs.items()}
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


def _repeat(value: Any, count: int) -> Any:
    return value[:1].repeat_interleave(count, 0) if isinstance(value, Tensor) else value


def _join(outputs: Sequence[Any]) -> Any:
    """What a module returns for all images, from what it returns for parts of them."""
    if isinstance(outputs[0], tuple):
        return tuple(_join(parts) for parts in zip(*outputs, strict=True))
    return torch.cat(list(outputs)) if isinstance(outputs[0], Tensor) else outputs[0]


def _measure(action: Callable[[list[int]], Any], way: Way, device: torch.device) -> Cost:
    """What an action costs that is given the numbers of images of two tasks."""
    few, many = (min(_seconds(action, [count, count], device) for _ in range(2)) for count in (1, 4))
    image = max(0.0, (many - few) / 6)
    return Cost(max(0.0, few - 2 * image) / (2 if way == "weights" else 1), image)


def _seconds(action: Callable[[list[int]], Any], counts: list[int], device: torch.device) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    start = time.perf_counter()
    action(counts)
    wait()
    return time.perf_counter() - start
