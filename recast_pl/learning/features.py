"""Features of images by a frozen network, which heads are fitted to."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from recast_pl.learning.histogram import certainty, histogram


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
    def confidence(self, head: nn.Linear) -> tuple[int, ...]:
        """A histogram of how sure a head is of the classes of the images."""
        return histogram(certainty(head(self.features.to(head.weight.dtype)).softmax(1).amax(1)))


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


def gather_features(share: Features) -> Features:
    """All features of a split, in order, from the shares of all processes; process r of R has samples r, r + R, ….

    A sample whose label is -1 is left out: it stands for an empty share.
    """
    features, labels = gather_all_tensors(share.features), gather_all_tensors(share.labels)
    total = sum(len(part) for part in labels)
    everything = Features(features[0].new_empty(total, features[0].shape[1]), labels[0].new_empty(total))
    for rank, (some, their) in enumerate(zip(features, labels, strict=True)):
        everything.features[rank :: len(labels)], everything.labels[rank :: len(labels)] = some, their
    known = everything.labels >= 0
    return Features(everything.features[known], everything.labels[known])
