"""Pieces that give a vision transformer further tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.errors import MethodError
from recast_pl.methods.piece import ADDED, Piece, Step

_DOORS = (("norm_pre", "norm"), ("encoder.dropout", "encoder.ln"))
"""Modules that all tokens pass before the blocks and after them, in timm's and torchvision's vision transformers."""


class PromptPool(nn.Module):
    """Prompts, each found by the cosine between its key and a query.

    Args:
        size: M, the number of prompts.
        length: Tokens of each.
        chosen: k, the prompts of an image.
        width: D.
    """

    def __init__(self, size: int, length: int, chosen: int, width: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(size, width))
        self.prompts = nn.Parameter(torch.empty(size, length, width))
        self.chosen = chosen
        self.query: Tensor | None = None
        """What the prompt-free network says of the images (B, D); None while it is asked."""
        self.similarity = torch.zeros(())
        """Mean over the images of Σ cos, over the chosen keys."""

    def reset(self) -> None:
        """Uniform in ±1."""
        nn.init.uniform_(self.keys, -1, 1)
        nn.init.uniform_(self.prompts, -1, 1)

    def tokens(self) -> Tensor:
        """The tokens (B, k·length, D) of the prompts whose keys are nearest to the query."""
        assert self.query is not None
        cosine = F.normalize(self.query.float(), dim=1) @ F.normalize(self.keys, dim=1).T  # (B, M)
        nearest = cosine.topk(self.chosen)
        self.similarity = nearest.values.sum(1).mean()
        return self.prompts[nearest.indices].flatten(1, 2)  # (B, k, length, D) to (B, k·length, D)


class L2P(Piece):
    """Learning to prompt (Wang et al., 2022): tasks share a pool of prompts, of which each image is given the nearest.

    The query is the feature of the frozen network without prompts, so that every image passes the network twice;
    prompts are chosen for each image by itself, in training, too. The head gets the mean of the prompts' tokens.

    Args:
        pool: M, the number of prompts.
        length: Tokens of each prompt.
        chosen: k, the prompts of an image.
        strength: λ of the term −λ·Σ cos, which draws chosen keys towards their queries.
        learning_rate: Rate of prompts and keys; None for that of the head; the authors' is 0.03·batch/256.

    Raises:
        MethodError: If a number is below 1, or more prompts are chosen than there are.
    """

    isolated = False

    def __init__(
        self,
        pool: int = 10,
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
        """Gives the network its pool.

        Raises:
            MethodError: If it is no vision transformer of timm or torchvision.
        """
        names = {name for name, _ in network.named_modules()}
        doors = next(([network.get_submodule(door) for door in pair] for pair in _DOORS if names >= set(pair)), None)
        width: Any = getattr(network, "embed_dim", getattr(network, "hidden_dim", None))
        if doors is None or width is None:
            raise MethodError("L2P gives tokens to vision transformers of timm and torchvision; this backbone is none")
        self.pool = PromptPool(self.size, self.length, self.chosen, width)
        for module in (network, *doors):  # hooks find it through their own module, so that copies of a network work
            module.add_module(ADDED, self.pool)
        network.register_forward_pre_hook(_ask)
        doors[0].register_forward_hook(_prepend)
        doors[1].register_forward_hook(_average)
        self.parameters = {"keys": self.pool.keys, "prompts": self.pool.prompts}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """New prompts and keys."""
        self.pool.reset()

    def loss(self, step: Step) -> Tensor:
        """−λ·Σ cos, the mean over the images."""
        return -self.strength * self.pool.similarity


def _ask(module: Any, args: tuple[Tensor, ...]) -> None:
    pool = module.get_submodule(ADDED)
    pool.query = None
    with torch.no_grad():
        pool.query = module.forward(*args)


def _prepend(module: Any, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    pool = module.get_submodule(ADDED)
    return tokens if pool.query is None else torch.cat([pool.tokens().to(tokens.dtype), tokens], 1)


def _average(module: Any, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
    """Puts the mean of the prompts' tokens in the place of every token, so that any pooling finds it."""
    pool = module.get_submodule(ADDED)
    if pool.query is None:
        return tokens
    prompts = pool.chosen * pool.prompts.shape[1]
    return tokens[:, :prompts].mean(1, keepdim=True).expand_as(tokens)
