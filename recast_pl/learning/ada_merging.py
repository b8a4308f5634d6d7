"""AdaMerging: factors of the changes of each layer and task, fitted without labels.

Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024 (layer-wise, task arithmetic).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from recast_pl.backbones.backbone import Backbone

_RATE, _BATCH = 1e-3, 16  # of Adam, and images of a task in a step, as in the paper


def fit_factors(
    network: Backbone,
    layers: Mapping[Tensor, Tensor],
    tasks: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    steps: int,
    scale: float,
) -> dict[Tensor, Tensor]:
    """Minimizes the entropy of the predictions of all tasks over λ in θ₀ + Σ_t λ_lt·(θ_t − θ₀).

    Args:
        network: Gives features (B, D); none of its parameters is changed.
        layers: For each parameter that tasks change, θ₀ and θ_t of T tasks (1 + T, *shape).
        tasks: For each task its images (V, 3, S, S), on the device, and its head: `weight` (C, D) and `bias` (C,).
        steps: Of Adam; each takes 16 images of each task.
        scale: All λ at the start.

    Returns:
        The merged value (*shape) of each parameter.
    """
    device = network.mean.device
    values = [value.to(device) for value in layers.values()]
    factors = nn.Parameter(torch.full((len(values), len(tasks)), scale, device=device))
    optimizer, choose = torch.optim.Adam([factors], lr=_RATE), torch.Generator().manual_seed(0)
    by_parameter: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    names = [by_parameter[parameter] for parameter in layers]

    def merged() -> list[Tensor]:
        pairs = zip(factors, values, strict=True)
        return [value[0] + torch.tensordot(factor, value[1:] - value[0], 1) for factor, value in pairs]

    for _ in range(steps):
        optimizer.zero_grad()
        for images, head in tasks:
            batch = images[torch.randint(len(images), (_BATCH,), generator=choose)]
            features = functional_call(network, dict(zip(names, merged(), strict=True)), (batch,))
            logits = F.linear(features, head["weight"].to(device), head["bias"].to(device))
            (-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        return dict(zip(layers, merged(), strict=True))
