"""Linear probe: a head for each task on frozen features, a baseline in tables 1 and 2 of RECAST."""

from collections.abc import Sequence

from recast_pl.errors import MethodError
from recast_pl.methods.piece import Piece


class LinearProbe(Piece):
    """Trains only a head on the frozen backbone: the naive baseline of the paper's tables 1 and 2.

    Args:
        learning_rate: None, because only the head trains, at the optimizer's rate.

    Raises:
        MethodError: If there is a learning rate.
    """

    def join(self, pieces: Sequence[Piece]) -> None:
        """Becomes part of a method; raises a MethodError if there is a learning rate, which would do nothing."""
        super().join(pieces)
        if self.learning_rate is not None:
            raise MethodError(
                f"LinearProbe: learning_rate={self.learning_rate:g} would do nothing; leave it out, or write null in a "
                "config.yaml. Only the head trains: --model.optimizer.init_args.lr sets its rate with --model.head sgd"
            )
