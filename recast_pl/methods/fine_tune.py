"""Fine-tuning of all weights: by one task after the other (lower bound), or in a copy for each task (upper bound)."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from recast_pl.methods.adaptation import Adaptation
from recast_pl.methods.piece import Piece, copies


class FineTune(Piece):
    """Trains all weights, one task after the other: the lower bound when alone, and what guards of old tasks need.

    Args:
        learning_rate: Learning rate of the weights; None for that of the head, which is too high for a network.
    """

    isolated = False

    def __init__(self, learning_rate: float | None = 2e-5) -> None:
        super().__init__(learning_rate)
        self.start: dict[str, Tensor] = {}

    def attach(self, network: nn.Module) -> None:
        """Takes parameters of the network that no piece before trains, and leaves constants of these pieces alone."""
        adaptations = (module for module in network.modules() if isinstance(module, Adaptation))
        others = {p for adaptation in adaptations for p in adaptation.parameters()}
        frozen = {n: p for n, p in network.named_parameters() if not p.requires_grad and p not in others}
        self.parameters = {name: frozen[name] for name in self.choose(frozen)}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.start = copies(self.parameters)

    def choose(self, parameters: Mapping[str, Tensor]) -> Iterable[str]:
        """Which of these parameters to train, by name: all."""
        return parameters

    def restart(self) -> None:
        """Restores the pretrained weights."""
        self._load(self.start, self.parameters)


class FullFineTune(FineTune):
    """Trains all weights, in a copy for each task: the upper bound, at the price of a network for each task.

    Args:
        learning_rate: Learning rate of the weights; None for that of the head, which is too high for a network.
    """

    isolated = True
    linear = True

    def begin_task(self) -> None:
        """Every task starts from the pretrained weights."""
        self.restart()
