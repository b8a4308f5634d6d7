"""Piggyback: a binary mask on every weight.

Mallya, Davis and Lazebnik, "Piggyback: Adapting a Single Network to Multiple Tasks by Learning to Mask Weights",
ECCV 2018.

    W' = W ⊙ [S > threshold]; the scores S receive the gradient of the mask (straight-through estimate)

A patch stores one bit for each weight. Batch normalisation keeps the pretrained statistics.
"""

import numpy as np
import torch
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.adaptation import Adaptation, WeightPiece
from recast_pl.methods.piece import check_state


class BinaryMask(Adaptation):
    """W ⊙ [scores > threshold]; all scores begin at `start`."""

    def __init__(self, weight: Tensor, start: float, threshold: float) -> None:
        super().__init__()
        self.start, self.threshold = start, threshold
        self.scores = nn.Parameter(torch.full_like(weight, start))

    def reset(self, weight: Tensor) -> None:
        """All scores are the same."""
        nn.init.constant_(self.scores, self.start)

    def change(self, weight: Tensor) -> Tensor:
        """The masked weight; the second term is zero and carries the gradient of the scores."""
        return weight * (self.scores > self.threshold) + (self.scores - self.scores.detach()) * weight.detach()


class Piggyback(WeightPiece[BinaryMask]):
    """A binary mask on every weight (Mallya et al., 2018), trained through real-valued scores; one bit each on disk.

    Args:
        start: First value of the scores.
        threshold: What a score must exceed to keep its weight; below `start`, so that nothing changes at first.
        targets: Regular expressions for names of weights.
        learning_rate: Learning rate of the scores; None for that of the head.

    Raises:
        MethodError: If `start` is not above the threshold.
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

    def adapt(self, name: str, weight: Tensor) -> BinaryMask:
        """Scores for the weight."""
        return BinaryMask(weight, self.start, self.threshold)

    def task_state(self) -> dict[str, Tensor]:
        """The masks, weight after weight, eight entries to a byte."""
        bits = [(scores.detach() > self.threshold).flatten() for scores in self.parameters.values()]
        return {"mask": torch.from_numpy(np.packbits(torch.cat(bits).cpu().numpy()))}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Sets scores that give the masks; the trained scores are not stored."""
        sizes = [scores.numel() for scores in self.parameters.values()]
        check_state("Piggyback", state, {"mask": (-(-sum(sizes) // 8),)}, mask=torch.uint8)
        bits = torch.from_numpy(np.unpackbits(state["mask"].numpy(), count=sum(sizes))).bool()
        for scores, part in zip(self.parameters.values(), bits.split(sizes), strict=True):
            scores.copy_(torch.where(part.view_as(scores), self.start, 0.0).to(scores))
