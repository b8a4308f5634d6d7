"""Batches in which each image has a task of its own: one pass of the network, in which layers tell the tasks apart."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recast_pl.backbones.backbone import Backbone
from recast_pl.inference.sites import Call, Rooms, Site, Values, Way, find_sites, repeat
from recast_pl.inference.states import TaskStates
from recast_pl.learning.acceleration import MergedWeights
from recast_pl.methods.piece import Piece


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

    def choose(self, images: Tensor, rows: Sequence[int]) -> dict[Site, Way] | None:
        """What `together` is to do; None if `apart` is cheaper, or the only way. Arguments are those of `features`."""
        if not self._states.alike(rows):
            return None
        if len(rows) * self._states.numbers(rows[0]) > sum(p.numel() for p in self._backbone.parameters()):
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

    def together(self, images: Tensor, rows: Sequence[int], counts: Sequence[int], ways: Mapping[Site, Way]) -> Tensor:
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
        for piece, state in zip(self._pieces, self._states.of_all(rows), strict=True):
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
        whole = _measure(lambda c: self.together(repeat(image, sum(c)), rows, c, ways), "products", image.device)
        rest = Cost(whole.each - 2 * sum(c.each for c in layers), whole.image - sum(c.image for c in layers))
        apart = _measure(lambda c: self.apart(repeat(image, sum(c)), rows, c), "weights", image.device)
        return Survey(costs, rest, apart)

    def _calls(self, sites: Sequence[Site], image: Tensor) -> dict[Site, Call] | None:
        """With what each site is called for an image; None if one is not, or if images are not its first dimension."""
        calls: dict[Site, Call] = {}
        for count in (2, 3):  # of which another dimension may have one, but not both
            with ExitStack() as stack:
                seen = {site: stack.enter_context(site.listening()) for site in sites}
                self._backbone(repeat(image, count))
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

    layers: Mapping[Site, Mapping[Way, Cost]]
    rest: Cost
    apart: Cost

    def choose(self, tasks: int, images: int) -> dict[Site, Way] | None:
        """The cheapest way of each site, for so many tasks and images; None if a pass for each task is cheaper."""
        together, ways = self.rest.of(1, images), dict[Site, Way]()
        for site, costs in self.layers.items():
            seconds = {way: cost.of(tasks if way == "weights" else 1, images) for way, cost in costs.items()}
            ways[site] = min(seconds, key=seconds.__getitem__)
            together += seconds[ways[site]]
        return ways if together <= self.apart.of(tasks, images) else None


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
