"""L2P: tasks share a pool of prompts; each image gets those whose keys are nearest to it.

Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022.

    chosen = the k keys of the highest cosine to q(x), the feature of the frozen network without prompts
    features = mean of the prompts' tokens after the blocks, with the chosen prompts before the image's tokens
    loss = cross-entropy − λ · Σ cos(q(x), chosen keys)

The defaults, and that each image chooses its prompts by itself with no vote over the batch, are those of Avalanche's
implementation, which RECAST's paper uses. The authors' pool has 10 prompts, and they let the batch vote.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.addition import extend
from recast_pl.methods.piece import ADDED, Piece, Step

_ENTRY_AND_EXIT = (("norm_pre", "norm"), ("encoder.dropout", "encoder.ln"))
"""Modules that all tokens pass before and after the blocks, in timm's and torchvision's vision transformers."""


class PromptPool(nn.Module):
    """Prompts of `length` tokens (D = `width`), each with a key; an image gets the `chosen` nearest to its query."""

    def __init__(self, size: int, length: int, chosen: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(size, width))
        self.prompts = nn.Parameter(torch.empty(size, length, width))
        self.chosen = chosen
        self.query: Tensor | None = None
        """Features of the network without prompts (B, D); None while they are computed."""
        self.similarity = torch.zeros(())
        """Mean over the images of Σ cos, over the chosen keys."""

    def tokens(self, query: Tensor) -> Tensor:
        """The tokens (B, k·length, D) of the prompts whose keys are nearest to queries (B, D)."""
        cosine = F.normalize(query.float(), dim=1) @ F.normalize(self.keys, dim=1).T  # (B, M)
        nearest = cosine.topk(self.chosen)
        self.similarity = nearest.values.sum(1).mean()
        return self.prompts[nearest.indices].flatten(1, 2)  # (B, k, length, D) to (B, k·length, D)


class L2P(Piece):
    """Learning to prompt (Wang et al., 2022): tasks share a pool of prompts, from which each image gets the nearest.

    Every image passes through the network twice: first without prompts, to choose them.

    Args:
        pool: M, the number of prompts.
        length: Tokens of each prompt.
        chosen: k, the prompts of an image.
        strength: λ of the term −λ·Σ cos, which draws chosen keys towards their queries.
        learning_rate: Learning rate of prompts and keys; None for that of the head. It is 0.03 for both in Avalanche.

    Raises:
        MethodError: If a number is below 1, or more prompts are chosen than there are.
    """

    isolated = False

    def __init__(
        self,
        pool: int = 20,
        length: int = 5,
        chosen: int = 5,
        strength: float = 0.1,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__(learning_rate)
        if length < 1 or not 1 <= chosen <= pool:
            raise MethodError(f"L2P: length={length} must be at least 1, and chosen={chosen} from 1 to pool={pool}")
        self.size, self.length, self.chosen, self.strength = pool, length, chosen, strength
        self.pool = PromptPool(0, 0, 0, 0)

    def attach(self, network: nn.Module) -> None:
        """Adds the pool to a vision transformer of timm or torchvision; raises a MethodError for other networks."""
        names = {name for name, _ in network.named_modules()}
        doors = next(([network.get_submodule(d) for d in pair] for pair in _ENTRY_AND_EXIT if names >= set(pair)), None)
        width: Any = getattr(network, "embed_dim", getattr(network, "hidden_dim", None))
        if doors is None or width is None:
            raise MethodError("L2P needs a vision transformer of timm or torchvision, which this backbone is not")
        self.pool = PromptPool(self.size, self.length, self.chosen, width)
        for module in (network, *doors):  # hooks find it through their own module, so that copies of a network work
            extend("L2P", module, self.pool)
        network.register_forward_pre_hook(_compute_query)
        doors[0].register_forward_hook(_prepend_prompts)
        doors[1].register_forward_hook(_average_prompts)
        self.parameters = {"keys": self.pool.keys, "prompts": self.pool.prompts}
        self.restart()

    def restart(self) -> None:
        """Draws new prompts and keys, uniformly in ±1."""
        for parameter in self.parameters.values():
            nn.init.uniform_(parameter, -1, 1)

    def loss(self, step: Step) -> Tensor:
        """−λ·Σ cos, the mean over the images."""
        return -self.strength * self.pool.similarity


def _compute_query(module: Any, args: tuple[Tensor, ...]) -> None:
    pool = module.get_submodule(ADDED)
    pool.query = None
    with torch.no_grad():
        pool.query = module.forward(*args)


def _prepend_prompts(module: Any, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    pool = module.get_submodule(ADDED)
    return tokens if pool.query is None else torch.cat([pool.tokens(pool.query).to(tokens.dtype), tokens], 1)


def _average_prompts(module: Any, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    """Replaces every token by the mean of the prompts' tokens, which any pooling then returns."""
    pool = module.get_submodule(ADDED)
    if pool.query is None:
        return tokens
    prompts = pool.chosen * pool.prompts.shape[1]
    return tokens[:, :prompts].mean(1, keepdim=True).expand_as(tokens)
