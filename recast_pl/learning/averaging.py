"""Averaging of what a task trains over its last epochs.

Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022
(arXiv:2209.14981).

    θ̄_t = 1/k · Σ θ_i over the last k epochs i = t − k + 1, …, t

Deviations: until there are k epochs, the average is over those that there are. The paper trains all weights; here it is
only what a task trains. A head that is solved is not averaged but solved again, on the features of the average.

Lightning's `WeightAveraging` copies the whole network, and swaps the average in only after the head has been solved.
"""

from collections import deque
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from recast_pl.errors import RunError
from recast_pl.learning.checkpoint import trainable_state


class AverageEpochs(Callback):
    """Evaluates, and so keeps, the average over the last epochs of what a task trains (Kaddour, 2022).

    Training itself goes on from the numbers of the last epoch, as if there were no average. The best epoch is the one
    whose average is the best on the validation images.

    Args:
        epochs: k, how many epochs to average at most. Epochs without validation do not count.

    Raises:
        RunError: If `epochs` is below 1, or training starts without validation.
    """

    def __init__(self, epochs: int = 5) -> None:
        if epochs < 1:
            raise RunError(f"AverageEpochs: epochs={epochs} must be at least 1")
        self.latest: deque[dict[str, Tensor]] = deque(maxlen=epochs)
        """What was trained at the end of each of the last epochs, by name."""
        self._averaged = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuses training without validation."""
        if not trainer.limit_val_batches:
            raise RunError(
                "AverageEpochs averages at each validation, and --trainer.limit_val_batches 0 turns validation off; "
                "leave out one of them"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Replaces the numbers by their average, before the head is solved and weights are generated."""
        if not trainer.sanity_checking:
            self.latest.append(_averaged_state(pl_module))
            _load(pl_module, {name: self._mean(name) for name in self.latest[-1]})
            self._averaged = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Goes on from the last numbers, if validation was in the middle of an epoch."""
        self._restore(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Goes on from the last numbers, before they are written to the checkpoint."""
        self._restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return {"latest": list(self.latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what the checkpoint kept."""
        self.latest.extend(state_dict["latest"])

    def _mean(self, name: str) -> Tensor:
        last = self.latest[-1][name]
        return torch.stack([state[name].to(last) for state in self.latest]).mean(0)

    def _restore(self, module: Any) -> None:
        """Only now, because the best epoch is kept when validation has ended."""
        if self._averaged:
            _load(module, self.latest[-1])
            self._averaged = False


def _averaged_state(module: Any) -> dict[str, Tensor]:
    """All that is trained, by name, without a head that validation solves."""
    solved = module.head_kind != "sgd"
    return {name: t for name, t in trainable_state(module).items() if not (solved and name.startswith("head."))}


@torch.no_grad()
def _load(module: Any, state: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, tensor in state.items():
        parameters[name].copy_(tensor)
