"""Pieces that generate or change weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from recast_pl.decomposition.targets import weight_sites
from recast_pl.errors import MethodError, PatchError
from recast_pl.til.adaptations import (
    Adaptation,
    BinaryMask,
    LowRank,
    MagnitudeDirection,
    Sparse,
    weight_below,
)
from recast_pl.til.piece import ADDED, Piece, check_state, select

Part = Literal["q", "k", "v"]

ATTENTION = r"(attn\.qkv\.|self_attention\.in_proj_)weight$"

MLP = r"mlp\.(fc[12]|0|3)\.weight$"

CONVOLUTIONS = r"layer\d\.\d+\.conv\d\.weight$"
"""Names of weights in timm's and torchvision's vision transformers and residual networks."""


class WeightPiece(Piece):
    """A piece that puts an `Adaptation` on each of its targets.

    Args:
        targets: Regular expressions, searched in the names of weights (any sequence); of several, those that match
            nothing are left out, so that they may name the weights of different backbones.
        learning_rate: Rate of the parameters; None for that of the head.
    """

    def __init__(self, targets: Sequence[str], learning_rate: float | None) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)
        self.adaptations: dict[str, Adaptation] = {}
        self._sites: dict[str, tuple[nn.Module, str]] = {}

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """Makes the adaptation of one weight.

        Args:
            name: Name of the weight.
            weight: Its present value (*shape).
        """
        raise NotImplementedError

    def attach(self, network: nn.Module) -> None:
        """Puts an adaptation on every target.

        Raises:
            MethodError: If no weight matches.
        """
        sites = {name: site for name, site in weight_sites(network).items() if f".{ADDED}." not in name}
        self._sites = {name: sites[name] for name in select(type(self).__name__, sites, self.targets)}
        for name, (module, attribute) in self._sites.items():
            adaptation = self.adapt(name, getattr(module, attribute).detach())
            parametrize.register_parametrization(module, attribute, adaptation)
            self.adaptations[name] = adaptation
            trained = {key: p for key, p in adaptation.named_parameters() if p.requires_grad}
            self.parameters |= {f"{name}:{key}": p for key, p in trained.items()}
        self.begin_task()  # so that the network computes what it did

    @torch.no_grad()
    def begin_task(self) -> None:
        """Resets every adaptation; pieces below have been reset before."""
        for name, adaptation in self.adaptations.items():
            adaptation.reset(weight_below(*self._sites[name], adaptation))


class LoRA(WeightPiece):
    """Low-rank adaptation (Hu et al., 2022): W + (α/r)·B·A. With rank 1 on q and v it is MeLo (Zhu et al., 2024).

    Args:
        rank: r.
        alpha: α; None for r, so that the scale is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights (any sequence); other weights are adapted whole.
        learning_rate: Rate of A and B; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or there are no parts.
    """

    adaptation: type[LowRank] = LowRank

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] = ("q", "v"),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if rank < 1 or not parts:
            raise MethodError(f"{type(self).__name__}: rank={rank} must be at least 1, and parts={parts} not empty")
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        self.parts = sorted("qkv".index(part) for part in set(parts))

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """Low-rank factors for the weight, or for the parts of a fused one."""
        fused = re.search(r"qkv|in_proj", name)
        return self.adaptation(weight, self.rank, self.scale, self.parts if fused else None)


class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., 2024): LoRA on directions, and a magnitude for each row.

    Args:
        rank: r.
        alpha: α; None for r, so that the scale is 1.
        targets: Regular expressions for names of weights.
        parts: Which parts of fused query-key-value weights (any sequence); other weights are adapted whole.
        learning_rate: Rate of all parameters; None for that of the head.

    Raises:
        MethodError: If the rank is below 1, or there are no parts.
    """

    adaptation = MagnitudeDirection

    def __init__(
        self,
        rank: int = 1,
        alpha: float | None = None,
        targets: tuple[str, ...] = (ATTENTION, CONVOLUTIONS),
        parts: tuple[Part, ...] = ("q", "k", "v"),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(rank, alpha, targets, parts, learning_rate)


class RoSA(WeightPiece):
    """The sparse part of robust adaptation (Nikdan et al., 2024): W + S, S free on the entries that matter most.

    The entries are those of the largest mean squared gradient over the first steps of the task, during which the rest
    of the method warms up. After `LoRA` in the list of pieces it is RoSA in full; alone it is sparse adaptation.

    Args:
        density: Fraction of each weight's entries, rounded down.
        warm_up: Steps before the entries are chosen.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the entries; None for that of the head.

    Raises:
        MethodError: If the density is not in (0, 1], or leaves a weight without an entry.
    """

    def __init__(
        self,
        density: float = 1e-5,
        warm_up: int = 8,
        targets: tuple[str, ...] = (MLP, CONVOLUTIONS),
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(targets, learning_rate)
        if not 0 < density <= 1 or warm_up < 1:
            raise MethodError(f"RoSA: density={density} must be in (0, 1], and warm_up={warm_up} at least 1")
        self.density, self.warm_up, self.steps = density, warm_up, 0

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """⌊density·numel⌋ entries."""
        count = int(self.density * weight.numel())
        if not count:
            raise MethodError(
                f"RoSA: density={self.density} leaves no entry of {name} with {weight.numel():,}; raise the density"
            )
        return Sparse(weight, count)

    def begin_task(self) -> None:
        """Forgets the entries chosen for the task before."""
        super().begin_task()
        self.steps = 0

    def begin_step(self, progress: float) -> None:
        """Watches gradients, and chooses the entries when the warm-up is over."""
        if self.steps <= self.warm_up:
            self._watch()
        if self.steps == self.warm_up:
            for sparse in self._sparse():
                sparse.choose()
        self.steps += 1

    def task_state(self) -> dict[str, Tensor]:
        """Places and values of the entries, weight after weight (Σ k,)."""
        values = torch.cat([sparse.values.detach() for sparse in self._sparse()]).cpu()
        return {"indices": torch.cat([sparse.indices for sparse in self._sparse()]).int().cpu(), "values": values}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes places and values back."""
        counts = [len(sparse.indices) for sparse in self._sparse()]
        check_state("RoSA", state, {"indices": (sum(counts),), "values": (sum(counts),)})
        parts = zip(state["indices"].split(counts), state["values"].split(counts), strict=True)
        for (name, sparse), (indices, values) in zip(self._named_sparse(), parts, strict=True):
            if int(indices.min()) < 0 or int(indices.max()) >= sparse.size:
                raise PatchError(f"the patch has an entry outside of {name} with {sparse.size:,}; learn the task anew")
            sparse.reset(values)
            sparse.chosen = True
            sparse.indices.copy_(indices)
            sparse.values.copy_(values)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
        """Places and values of T tasks (T, k) for each weight."""
        counts = [len(sparse.indices) for sparse in self._sparse()]
        indices, values = (states[name].split(counts, 1) for name in ("indices", "values"))
        of_places = {sparse.indices: part.long() for sparse, part in zip(self._sparse(), indices, strict=True)}
        return of_places | {sparse.values: part for sparse, part in zip(self._sparse(), values, strict=True)}

    def training_state(self) -> dict[str, Tensor]:
        """Steps done, and the entries or, before they are chosen, what they will be chosen by."""
        if 0 < self.steps <= self.warm_up:
            self._watch()
        named = self._named_sparse()
        entries = {f"indices:{name}": sparse.indices for name, sparse in named if sparse.chosen}
        sums = {f"squares:{name}": sparse.squares for name, sparse in named if sparse.squares is not None}
        return {"steps": torch.tensor(self.steps)} | entries | sums

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes the steps, and entries or sums, back."""
        self.steps = int(state["steps"])
        for name, sparse in self._named_sparse():
            sparse.chosen, sparse.dense = f"indices:{name}" in state, None
            sparse.squares = state.get(f"squares:{name}")
            sparse.indices = state.get(f"indices:{name}", sparse.indices).to(sparse.values.device)

    def _watch(self) -> None:
        for name, sparse in self._named_sparse():
            module, attribute = self._sites[name]
            sparse.watch(getattr(module, attribute).shape)

    def _named_sparse(self) -> list[tuple[str, Sparse]]:
        return [(name, a) for name, a in self.adaptations.items() if isinstance(a, Sparse)]

    def _sparse(self) -> list[Sparse]:
        return [sparse for _, sparse in self._named_sparse()]


class Piggyback(WeightPiece):
    """A binary mask on every weight (Mallya et al., 2018), learned through real-valued scores; on disk a bit each.

    Args:
        start: First value of the scores.
        threshold: What a score must exceed for its weight to be kept; below `start`, so that nothing changes at first.
        targets: Regular expressions for names of weights.
        learning_rate: Rate of the scores; None for that of the head.

    Raises:
        MethodError: If the scores would start at or below the threshold.
    """

    def __init__(
        self,
        start: float = 1e-2,
        threshold: float = 5e-3,
        targets: tuple[str, ...] = (r"weight$",),
        learning_rate: float | None = 1e-4,
    ) -> None:
        super().__init__(targets, learning_rate)
        if start <= threshold:
            raise MethodError(f"Piggyback: start={start} must exceed threshold={threshold}, or every weight is masked")
        self.start, self.threshold = start, threshold

    def adapt(self, name: str, weight: Tensor) -> Adaptation:
        """Scores for the weight."""
        return BinaryMask(weight, self.start, self.threshold)

    def task_state(self) -> dict[str, Tensor]:
        """The masks, weight after weight, eight to a byte."""
        bits = [(scores.detach() > self.threshold).flatten() for scores in self.parameters.values()]
        return {"mask": torch.from_numpy(np.packbits(torch.cat(bits).cpu().numpy()))}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Sets scores that give the masks; their own values are not kept."""
        sizes = [scores.numel() for scores in self.parameters.values()]
        check_state("Piggyback", state, {"mask": (-(-sum(sizes) // 8),)})
        bits = torch.from_numpy(np.unpackbits(state["mask"].numpy(), count=sum(sizes))).bool()
        for scores, part in zip(self.parameters.values(), bits.split(sizes), strict=True):
            scores.copy_(torch.where(part.view_as(scores), self.start, 0.0).to(scores))


class FineTune(Piece):
    """All weights, trained by one task after the other: alone the lower bound, and what the guards of old tasks need.

    Args:
        learning_rate: Rate of the weights; None for that of the head, which is much for a whole network.
    """

    isolated = False

    def __init__(self, learning_rate: float | None = 2e-5) -> None:
        super().__init__(learning_rate)
        self.start: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> None:
        """Takes all parameters of the network that no piece before trains."""
        self.parameters = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.start = self._copies()

    def restart(self) -> None:
        """Back to the pretrained weights."""
        self._load(self.start, self.parameters)


class FullFineTune(FineTune):
    """All weights, one copy for each task: the upper bound, at the price of a network for each task.

    Args:
        learning_rate: Rate of the weights; None for that of the head, which is much for a whole network.
    """

    isolated = True

    def begin_task(self) -> None:
        """Every task starts from the pretrained weights."""
        self.restart()
