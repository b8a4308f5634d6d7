"""What is measured while tasks are trained and tested."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.utilities import dim_zero_cat


class Percent(MeanMetric):
    """The mean of values in [0, 1], in percent, as users see every accuracy."""

    def compute(self) -> Tensor:
        """The mean, in double precision: divided by 100 it is again the exact mean."""
        return 100 * super().compute().cpu().double()


class Predictions(Metric):
    """Pairs (label, predicted class) of all images (N, 2), from all processes."""

    full_state_update = False
    pairs: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("pairs", default=[], dist_reduce_fx="cat")

    def update(self, labels: Tensor, predicted: Tensor) -> None:
        """Adds images: labels (B,) and predicted classes (B,)."""
        self.pairs.append(torch.stack([labels, predicted], 1))

    def compute(self) -> Tensor:
        """All pairs (N, 2), in no particular order."""
        return dim_zero_cat(self.pairs)
