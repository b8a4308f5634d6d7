"""Features of images by a frozen network, which heads are fitted to."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Features (N, D) and labels (N,) of one split."""

    features: Tensor
    labels: Tensor

    @torch.no_grad()
    def score(self, head: nn.Linear) -> tuple[float, float]:
        """Accuracy in [0, 1] and cross-entropy of a head; both are NaN if there are no samples."""
        features = self.features.to(head.weight.dtype)  # in double precision with `64-true`
        logits = head(features)
        accuracy = (logits.argmax(1) == self.labels).double().mean()
        return float(accuracy), float(F.cross_entropy(logits, self.labels))


@torch.no_grad()
def extract_features(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision) -> Features:
    """Computes the features of a split, in single precision.

    Args:
        network: Maps images (B, 3, S, S) to features (B, D).
        batches: Images and labels (B,).
        precision: The trainer's.
    """
    features, labels = [], []
    for images, targets in batches:
        with precision.forward_context():
            features.append(network(images).float())
        labels.append(targets)
    return Features(torch.cat(features), torch.cat(labels))
