"""A method is a list of pieces; every piece answers the same few calls."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

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
        labels: Class indices (B,), each within its own task.
        features: (B, D), of the backbone.
        logits: (B, C), of each image's own head; minus infinity beyond the classes of a head narrower than C.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor


class Learner(Protocol):
    """What pieces may ask of the module that learns, `TILModule`."""

    @property
    def backbone(self) -> nn.Module | None:
        """Maps images (B, 3, S, S) in [0, 1] to features (B, D); None before it is built."""

    @property
    def head(self) -> nn.Linear | None:
        """Of the current task; None before the first."""

    @property
    def old_heads(self) -> nn.ModuleList:
        """Of the tasks before, in order, where a piece keeps them; else empty."""

    @property
    def stream_length(self) -> int:
        """Number of tasks in the stream."""

    def own_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D), each by the head of its own task (B,), as in `Step.logits`."""

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in [0, 1] and labels of a split of the current task, in order, on the device."""

    def train_on(self, images: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Trains the current task on other images: uint8 (N, 3, S, S), labels (N,), positions of tasks (N,)."""

    def restart(self) -> None:
        """Sets heads, and what tasks share, back to where the first task began."""


class ParameterGroup(NamedTuple):
    """What an optimizer trains at one rate.

    Args:
        name: For the curves of learning rates.
        rate: None for that of the head.
        parameters: At least one.
    """

    name: str
    rate: float | None
    parameters: list[nn.Parameter]


class Piece:
    """One ingredient of a method: it may change weights or activations, or add to the loss.

    Calls come in this order: `load_base`, `attach`, `save_base`, and for each task `begin_task`, `begin_fit`, then
    `begin_step`, `incoming`, `loss` and `end_step` at every step, then `end_task`, `task_state` and `shared_state`;
    `load_task_state` and `load_shared_state` may come at any time after `attach`. At the end of an epoch a checkpoint
    takes `training_state`, which `load_training_state` gets when training is resumed, before `begin_fit`.

    Args:
        learning_rate: Rate of this piece's parameters; None for that of the head.
    """

    isolated: ClassVar[bool] = True
    """Whether a learnt task is untouched by later ones, all it needs being in its task state."""
    keeps_heads: ClassVar[bool] = False
    """Whether heads of old tasks are trained with the current one."""
    learner: Learner
    """What learns; set before `attach`."""

    def __init__(self, learning_rate: float | None = None) -> None:
        self.learning_rate = learning_rate
        self.parameters: dict[str, nn.Parameter] = {}
        """What is trained for each task, by name; filled by `attach`."""

    def attach(self, network: nn.Module) -> None:
        """Puts the piece into the backbone's network, whose parameters are frozen, in place."""

    def begin_task(self) -> None:
        """Sets the parameters to where every task starts; where tasks share them, leaves them as they are."""

    def groups(self) -> list[ParameterGroup]:
        """The parameters by learning rate."""
        parameters = list(self.parameters.values())
        return [ParameterGroup(type(self).__name__, self.learning_rate, parameters)] if parameters else []

    def begin_fit(self) -> None:
        """Comes when training begins or is resumed, with the module on its device and data at hand."""

    def begin_step(self, progress: float) -> None:
        """Comes before the forward pass of each training step.

        Args:
            progress: Part of the epoch that is done, from 0 at its first step to 1 at its last.
        """

    def incoming(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits (B, C) whose cross-entropy is to be the loss of the current batch."""
        return logits

    def loss(self, step: Step) -> Tensor | None:
        """A term of the loss (a scalar) beside cross-entropy, or None."""
        return None

    def end_step(self) -> None:
        """Comes after the optimizer's step."""

    def end_task(self) -> None:
        """Comes when the task's best epoch is in place, with the module on its device and data at hand."""

    def task_state(self) -> dict[str, Tensor]:
        """What the task alone needs of this piece, as copies on the CPU; it goes into the task's patch."""
        return self._copies() if self.isolated else {}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Takes a task state back.

        Raises:
            PatchError: If names or shapes differ from this piece's.
        """
        self._load(state, self.parameters if self.isolated else {})

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor] | None:
        """Task states as numbers of single layers, so that one pass of the network can serve several tasks.

        Args:
            states: What `task_state` gave of T tasks, each tensor (T, *shape); one of them has been loaded before.

        Returns:
            For each parameter or buffer that a task sets its values (T, *shape); they may be read by nothing but the
            forward pass of the module that it belongs to. None where there is more to a task.
        """
        plain = type(self).load_task_state is Piece.load_task_state and states.keys() <= self.parameters.keys()
        return {self.parameters[name]: values for name, values in states.items()} if plain else None

    def shared_state(self) -> dict[str, Tensor]:
        """What all tasks need of this piece as it is after the last one, as copies on the CPU."""
        return {} if self.isolated else self._copies()

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Takes a shared state back.

        Raises:
            PatchError: If names or shapes differ from this piece's.
        """
        self._load(state, {} if self.isolated else self.parameters)

    def restart(self) -> None:
        """Sets the parameters back to where the first task began."""
        self.begin_task()

    def training_state(self) -> dict[str, Tensor]:
        """What resuming in the middle of a task needs, beside the parameters."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes a training state back."""

    def describe(self) -> list[RenderableType]:
        """What to print once the piece is attached."""
        return []

    def save_base(self, folder: Path) -> None:
        """Writes what tasks are learnt upon into the run folder, atomically, unless it is there."""

    def load_base(self, folder: Path) -> None:
        """Takes what tasks are learnt upon from the run folder, if it is there."""

    def _copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        check_state(type(self).__name__, state, {name: tuple(p.shape) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


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


def check_state(owner: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a state whose names, shapes or values are not what they must be.

    Raises:
        PatchError: Naming the difference.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = dict(sorted(found.items() - expected.items()))
        right = dict(sorted(expected.items() - found.items()))
        raise PatchError(f"the patch holds {wrong} for {owner} where {right} is needed; it is of another method")
    check_finite(owner, state)


def check_finite(owner: str, state: Mapping[str, Tensor]) -> None:
    """Refuses NaN and infinity.

    Raises:
        PatchError: Naming the tensors that hold them.
    """
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise PatchError(f"the patch holds NaN or infinity in {', '.join(bad)} of {owner}; learn the task anew")
