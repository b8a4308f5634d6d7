"""Pieces that protect shared weights."""

from torch import nn

from recast_pl.errors import MethodError
from recast_pl.methods.piece import Learner, Piece


class Guard(Piece):
    """A piece that guards what tasks share, and so needs a piece before it that trains just that."""

    isolated = False

    def attach(self, network: nn.Module) -> None:
        """Makes sure that there is something to guard.

        Raises:
            MethodError: If no piece before trains a weight of the network.
        """
        if not any(weight.requires_grad for weight in network.parameters()):
            raise MethodError(f"{type(self).__name__} guards weights that tasks share; list FineTune before it")


def shared_weights(learner: Learner) -> dict[str, nn.Parameter]:
    """The backbone's trained weights, by name."""
    assert learner.backbone is not None
    return {name: weight for name, weight in learner.backbone.named_parameters() if weight.requires_grad}
