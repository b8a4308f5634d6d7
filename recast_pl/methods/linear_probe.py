"""Linear probe: a head for each task on frozen features, a baseline in tables 1 and 2 of RECAST."""

from recast_pl.methods.piece import Piece


class LinearProbe(Piece):
    """Trains only a head on the frozen backbone: the naive baseline of the paper's tables 1 and 2."""
