"""Adversarial images, within a distance that people hardly see.

FGSM: Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015 (arXiv:1412.6572).

    x' = x + ε · sign(∇_x L(x, y))

PGD: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (arXiv:1706.06083),
equation 1 of its section 2.1.

    x_{t+1} = Π(x_t + α · sign(∇_x L(x_t, y)))

Π projects onto the images within ε of x in every channel of every pixel, and within [0, 1]. α is 2.5 ε over the number
of steps, as in the authors' experiments.

Deviation: Madry et al. start from a random image within ε. Here the first step is FGSM, and of all points on the way
the one with the highest loss is kept. So results do not depend on chance, one step is FGSM, and more steps are never
weaker.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recast_pl.methods.piece import Classifier


def pgd(network: Classifier, images: Tensor, labels: Tensor, epsilon: float, steps: int) -> Tensor:
    """Images on which a network has a high loss, by projected gradient ascent; with one step this is FGSM.

    Args:
        network: The network, in evaluation mode.
        images: (B, 3, S, S) in [0, 1].
        labels: Their classes (B,).
        epsilon: Largest change of a channel of a pixel, for images in [0, 1].
        steps: Number of steps, at least 1.

    Returns:
        The attacked images (B, 3, S, S) in [0, 1], without gradients.
    """
    lowest, highest = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)

    def ascend(point: Tensor, gradient: Tensor, size: float) -> Tensor:
        return (point + size * gradient.sign()).clamp(lowest, highest)

    point = best = ascend(images, _losses(network, images, labels)[1], epsilon)
    record = torch.full(labels.shape, -torch.inf, device=images.device)
    for _ in range(steps if steps > 1 else 0):  # a single step has nothing to compare with
        losses, gradient = _losses(network, point, labels)
        best = torch.where((losses > record)[:, None, None, None], point, best)
        record = torch.maximum(losses, record)
        point = ascend(point, gradient, 2.5 * epsilon / steps)
    return best


@torch.enable_grad()
def _losses(network: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image (B,) and its gradient with respect to the image (B, 3, S, S)."""
    images = images.detach().requires_grad_()
    losses = F.cross_entropy(network(images).float(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach(), gradient
