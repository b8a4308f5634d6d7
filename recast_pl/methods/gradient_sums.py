"""Gradient sums: what an optimizer has summed up over earlier tasks goes on in the next one.

An optimizer such as CLASSP or Adagrad sums powers of each entry's gradients, and moves an entry the less the larger its
sum is. Each task has an optimizer of its own here, whose sums would begin at 0.
"""

from torch import Tensor
from torch.optim import Optimizer

from recast_pl.errors import MethodError
from recast_pl.methods.guard import Guard
from recast_pl.methods.piece import check_state, copies


class GradientSums(Guard):
    """Lets an optimizer's sums of gradients go on from task to task, so that it moves less what earlier tasks moved.

    List it after `FineTune`, which trains the weights. The optimizer must keep its sums in a state called `sum`, as
    `CLASSP` and `torch.optim.Adagrad` do. The sums are those of the end of training, also if the best epoch is earlier.

    Raises:
        MethodError: If the optimizer of a task keeps no sums.
    """

    def __init__(self) -> None:
        super().__init__()
        self._optimizer: Optimizer | None = None  # of the task

    def begin_optimizer(self, optimizer: Optimizer) -> None:
        """Gives a new optimizer the sums of the tasks before."""
        weights, self._optimizer = self.shared_weights(), optimizer
        if any("sum" not in optimizer.state[weight] for weight in weights.values()):
            raise MethodError(
                f"GradientSums: optimizer {type(optimizer).__name__} keeps no sums of gradients; choose one that does, "
                "such as --model.optimizer recast_pl.CLASSP, or remove GradientSums"
            )
        for name, summed in self.memory.tensors.items():
            optimizer.state[weights[name]]["sum"].copy_(summed)

    def end_task(self) -> None:
        """Keeps the sums."""
        assert self._optimizer is not None
        states = self._optimizer.state
        self.memory.keep({name: states[weight]["sum"].clone() for name, weight in self.shared_weights().items()})

    def shared_state(self) -> dict[str, Tensor]:
        """The sums of every weight."""
        return copies(self.memory.tensors)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads the sums."""
        check_state("GradientSums", state, {name: tuple(w.shape) for name, w in self.shared_weights().items()})
        self.memory.keep(state)
