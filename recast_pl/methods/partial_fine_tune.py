"""Fine-tuning of some parameters, such as all biases, in a copy for each task.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022, trains all biases. Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
ICLR 2024, trains the weights and biases of layer normalisation.

Running statistics of batch normalisation stay those of the pretrained network.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from recast_pl.methods.adaptation import CompactState
from recast_pl.methods.fine_tune import FullFineTune
from recast_pl.methods.piece import select


class PartialFineTune(CompactState, FullFineTune):
    """Trains some parameters of the network, in a copy for each task; all biases by default (BitFit).

    Args:
        targets: Regular expressions for names of parameters.
        learning_rate: Learning rate of the parameters; None for that of the head. 1e-3 is the default of the code of
            BitFit's authors.

    Raises:
        MethodError: If no parameter matches that is left by the pieces before.
    """

    def __init__(self, targets: tuple[str, ...] = (r"bias$",), learning_rate: float | None = 1e-3) -> None:
        super().__init__(learning_rate)
        self.targets = tuple(targets)

    def choose(self, parameters: Mapping[str, Tensor]) -> Iterable[str]:
        """Those whose names match."""
        return select(type(self).__name__, parameters, self.targets)
