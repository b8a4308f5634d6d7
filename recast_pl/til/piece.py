"""A method is a list of pieces; every piece answers the same few calls."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from recast_pl.errors import MethodError, PatchError

ADDED = "added"
"""Name under which a piece gives a module of the network one of its own; its weights are no other piece's targets."""


@dataclass(frozen=True)
class Step:
    """What a training step hands to the pieces.

    Args:
        images: (B, 3, S, S) in [0, 1].
        labels: Class indices (B,).
        features: (B, D), of the backbone.
        logits: (B, classes), of the current task's head.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor


class Piece:
    """One ingredient of a method: it may change weights or activations, or add to the loss.

    Calls come in this order: `load_shared`, `attach`, `save_shared`, and for each task `begin_task`, then `begin_step`
    and `loss` at every step, `task_state`; `load_task_state` may come at any time after `attach`. At the end of an
    epoch a checkpoint takes `training_state`, which `load_training_state` gets when training is resumed.

    Args:
        learning_rate: Rate of this piece's parameters; None for that of the head.
    """

    isolated: ClassVar[bool] = True
    """Whether a learnt task is untouched by later ones, all it needs being in its task state."""

    def __init__(self, learning_rate: float | None = None) -> None:
        self.learning_rate = learning_rate
        self.parameters: dict[str, nn.Parameter] = {}
        """What is trained for each task, by name; filled by `attach`."""

    def attach(self, network: nn.Module) -> None:
        """Puts the piece into the backbone's network, whose parameters are frozen, in place."""

    def begin_task(self) -> None:
        """Sets the parameters to where every task starts."""

    def begin_step(self) -> None:
        """Comes before the forward pass of each training step."""

    def loss(self, step: Step) -> Tensor | None:
        """A term of the loss (a scalar) beside cross-entropy, or None."""
        return None

    def task_state(self) -> dict[str, Tensor]:
        """What the task needs of this piece, as copies on the CPU; it goes into the task's patch."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes a task state back.

        Raises:
            PatchError: If names or shapes differ from this piece's.
        """
        expected = {name: tuple(p.shape) for name, p in self.parameters.items()}
        check_state(type(self).__name__, state, expected)
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    def training_state(self) -> dict[str, Tensor]:
        """What resuming in the middle of a task needs, beside the parameters."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes a training state back."""

    def describe(self) -> list[RenderableType]:
        """What to print once the piece is attached."""
        return []

    def save_shared(self, folder: Path) -> None:
        """Writes what all tasks share into the run folder, atomically, unless it is there."""

    def load_shared(self, folder: Path) -> None:
        """Takes what all tasks share from the run folder, if it is there."""


class LinearProbe(Piece):
    """Nothing but a head on the frozen backbone: the naive baseline of the paper's tables 1 and 2."""


def select(owner: str, names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match at least one of several patterns.

    Args:
        owner: Of the patterns, for messages.
        names: Names of weights or modules.
        patterns: Regular expressions, searched in the names.

    Raises:
        MethodError: If a pattern is no regular expression, or no name matches.
    """
    known = list(names)
    try:
        selected = [name for name in known if any(re.search(pattern, name) for pattern in patterns)]
    except re.error as cause:
        raise MethodError(f"{owner}: targets {list(patterns)} are no regular expressions ({cause})") from cause
    if not selected:
        raise MethodError(
            f"{owner}: targets {list(patterns)} match none of {len(known)} names (such as {', '.join(known[:3])}); "
            "set targets to regular expressions that do"
        )
    return selected


def check_state(owner: str, state: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Refuses a state whose names, shapes or values are not what they must be.

    Raises:
        PatchError: Naming the difference.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = dict(sorted(found.items() - expected.items()))
        right = dict(sorted(expected.items() - found.items()))
        raise PatchError(f"the patch holds {wrong} for {owner} where {right} is needed; it is of another method")
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise PatchError(f"the patch holds NaN or infinity in {', '.join(bad)} of {owner}; learn the task anew")
