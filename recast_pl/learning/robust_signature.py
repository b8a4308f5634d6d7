"""Robust weight signatures: what training on degraded images adds to the first layers, for other tasks to use.

Cai et al., "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", ICML 2023. As in the authors'
code, projections are taken in each layer apart. They also average the statistics of batch normalisation, which belong
to the network here and stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def robust_signature(robust: Sequence[Tensor], clean: Sequence[Tensor], layers: int) -> list[Tensor]:
    """The part of the robust changes that training on clean images does not explain, in the first layers.

        τ_r − (τ_r·τ_c / τ_c·τ_c)·τ_c

    Args:
        robust: Changes by training on degraded images, a tensor for each layer, from the first to the last.
        clean: Changes by training on the same images as they are, of the same shapes.
        layers: How many layers have a signature; it is 0 in the others.

    Returns:
        A tensor for each layer, orthogonal to the clean change.
    """
    found = []
    for index, (change, explained) in enumerate(zip(robust, clean, strict=True)):
        square = explained.square().sum()
        share = (change * explained).sum() / square if square > 0 else square  # no clean change explains nothing
        found.append(change - share * explained if index < layers else torch.zeros_like(change))
    return found
