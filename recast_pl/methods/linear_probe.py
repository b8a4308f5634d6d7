"""Linear probe."""

from recast_pl.methods.piece import Piece


class LinearProbe(Piece):
    """Nothing but a head on the frozen backbone: the naive baseline of the paper's tables 1 and 2."""
