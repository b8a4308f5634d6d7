"""Whether a classifier is right as often as it says, before and after its logits are divided by a temperature.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv:1706.04599): the expected calibration error is
equation 3, with 15 bins of equal width; temperature scaling is equation 9.
"""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15

_RANGE = math.log(0.05), math.log(20)  # if every validation image is right by far, the best temperature is 0


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which the cross-entropy of logits / T is lowest, within 0.05 and 20.

    Args:
        logits: Of validation images (N, C).
        labels: Their classes (N,).
    """
    values = logits.double()

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(values / math.exp(logarithm), labels))

    return math.exp(float(minimize_scalar(loss, bounds=_RANGE, method="bounded").x))


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error in percent.

    Args:
        confidence: Probability of the predicted class of each image (N,).
        correct: Whether that class is the right one (N,).
    """
    # the predicted class against all others together, so that tasks with different numbers of classes can be joined
    pairs = torch.stack([confidence, torch.zeros_like(confidence)], 1)  # (N, 2)
    return 100 * float(multiclass_calibration_error(pairs, (~correct).long(), num_classes=2, n_bins=BINS, norm="l1"))
