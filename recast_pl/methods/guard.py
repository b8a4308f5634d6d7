"""The base of methods that protect earlier tasks: they need another piece that trains the shared weights."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from recast_pl.errors import MethodError
from recast_pl.methods.piece import Piece


class Guard(Piece):
    """A piece that protects weights which every task trains further, such as those of `FineTune`."""

    isolated = False
    comes_after: ClassVar[bool] = True
    """Whether the piece that trains these weights must stand before the guard in the list."""
    protected: Sequence[Piece] = ()
    """The pieces that train these weights."""

    def join(self, pieces: Sequence[Piece]) -> None:
        """Finds the pieces to protect; raises a MethodError if there is none, or if the guard is listed twice."""
        super().join(pieces)
        candidates = pieces[: pieces.index(self)] if self.comes_after else pieces
        self.protected = [piece for piece in candidates if piece.continues]
        owner = type(self).__name__
        if not self.protected:
            place = "before" if self.comes_after else "beside"
            raise MethodError(
                f"{owner} protects weights that every task trains further, but no piece {place} it trains such "
                f"weights; list FineTune {place} it, or remove {owner}"
            )
        if self.number:
            raise MethodError(f"{owner} is listed twice; remove one of them")

    def shared_weights(self) -> dict[str, nn.Parameter]:
        """The weights to protect, by their name in the backbone."""
        assert self.learner.backbone is not None
        trained = {id(parameter) for piece in self.protected for parameter in piece.parameters.values()}
        return {name: p for name, p in self.learner.backbone.named_parameters() if id(p) in trained}

    def remember_network(self) -> None:
        """Keeps a copy of the network and of the heads of earlier tasks in `memory`; empties it in the first task.

        A resumed task finds them as they were, too.
        """
        heads = self.learner.old_heads
        parts = {"head": heads.named_parameters(), "backbone": self.shared_weights().items()} if len(heads) else {}
        self.memory.keep({f"{kind}:{n}": p.detach().clone() for kind, named in parts.items() for n, p in named})

    def features_before(self, images: Tensor) -> Tensor:
        """Features (B, D) of images by the network that `remember_network` kept.

        The kept weights get no gradient, but what a module of the network reads beside the images may.
        """
        kept = self.memory.tensors.items()
        weights = {name.removeprefix("backbone:"): p for name, p in kept if name.startswith("backbone:")}
        features: Tensor = functional_call(self.learner.current()[0], weights, (images,))
        return features

    def logits_before(self, images: Tensor) -> list[Tensor]:
        """Logits (B, C) of images by each kept head; empty during the first task. Gradients as in `features_before`."""
        kept, count = self.memory.tensors, len(self.learner.old_heads)
        features = self.features_before(images) if count else images
        return [F.linear(features, kept[f"head:{i}.weight"], kept[f"head:{i}.bias"]) for i in range(count)]
