"""All weights are trained."""

from torch import Tensor, nn

from recast_pl.methods.piece import Piece


class FineTune(Piece):
    """All weights, trained by one task after the other: alone the lower bound, and what the guards of old tasks need.

    Args:
        learning_rate: Rate of the weights; None for that of the head, which is much for a whole network.
    """

    isolated = False

    def __init__(self, learning_rate: float | None = 2e-5) -> None:
        super().__init__(learning_rate)
        self.start: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> None:
        """Takes all parameters of the network that no piece before trains."""
        self.parameters = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.start = self._copies()

    def restart(self) -> None:
        """Back to the pretrained weights."""
        self._load(self.start, self.parameters)


class FullFineTune(FineTune):
    """All weights, one copy for each task: the upper bound, at the price of a network for each task.

    Args:
        learning_rate: Rate of the weights; None for that of the head, which is much for a whole network.
    """

    isolated = True

    def begin_task(self) -> None:
        """Every task starts from the pretrained weights."""
        self.restart()
