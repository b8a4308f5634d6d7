"""The interface that all pieces of a method implement, and the checks that they share."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import torch
from rich.console import RenderableType
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from recast_pl.errors import MethodError, PatchError

ADDED = "added"
"""Name under which a piece adds a module of its own to one of the network; other pieces do not target its weights."""

Classifier = Callable[[Tensor], Tensor]
"""Gives logits (B, C) for images (B, 3, S, S) in [0, 1]."""


@dataclass(frozen=True)
class Step:
    """What a training step hands to the pieces.

    Args:
        images: (B, 3, S, S) in [0, 1], augmented.
        labels: Class indices (B,), each within its own task.
        features: Output of the backbone (B, D).
        logits: Output of each image's own head (B, C); minus infinity beyond the classes of a head narrower than C.
        counts: Whether the images count. If not, this process only takes part in a step of others, and its loss has no
            weight.
    """

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    counts: bool = True


class Learner(Protocol):
    """What pieces may ask of the module that trains, `TILModule`."""

    @property
    def backbone(self) -> nn.Module | None:
        """Maps images (B, 3, S, S) in [0, 1] to features (B, D); None before it is built."""

    def current(self) -> tuple[nn.Module, nn.Linear]:
        """The backbone, and the head of the current task."""

    @property
    def old_heads(self) -> nn.ModuleList:
        """The heads of earlier tasks, in order; empty unless a piece has `keeps_heads`."""

    @property
    def stream_length(self) -> int:
        """Number of tasks in the stream."""

    def own_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D), each by the head of its own task (B,), as in `Step.logits`."""

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in [0, 1] and labels of a split of the current task, in order, not augmented, on the device."""

    def batch_count(self, split: str) -> int:
        """How many `batches` a split has; reads no image."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the current task as training computes it, the mean over logits (B, C) and labels (B,)."""

    @property
    def plain_images(self) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of the current training batch, before augmentation."""

    def augment(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Augments plain images, uint8 (B, 3, S, S), as their own tasks (B,) ask."""

    def train_on(self, images: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Trains the current task on other images: uint8 (N, 3, S, S), labels (N,), positions of tasks (N,)."""

    def restart(self) -> None:
        """Resets the heads, and what tasks share, to where the first task began."""


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer trains at one learning rate.

    Args:
        name: Labels the curve of the learning rate.
        rate: None for the rate of the head.
        parameters: At least one.
    """

    name: str
    rate: float | None
    parameters: list[nn.Parameter]


class Memory(nn.Module):
    """Tensors by name that a piece keeps from one task to the next; they move to the device with everything else.

    They are frozen parameters rather than buffers, because DDP broadcasts buffers at every forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []
        self._tensors = nn.ParameterList()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; empty before the first `keep`."""
        return dict(zip(self._names, self._tensors, strict=True))

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces everything by these tensors, which are not copied."""
        self._names = list(tensors)
        self._tensors = nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in tensors.values())


class Piece:
    """One ingredient of a method: it may change weights or activations, or add to the loss.

    Calls come in this order: `join`, `load_base`, `project`, `attach`, `save_base`. Each task then brings
    `begin_task`, `begin_optimizer`, `begin_fit` and `begin_training`; every step `begin_step`, `incoming`, `loss` and
    `end_step`; every validation `begin_validation` and `end_validation`; and the end of the task `end_task`,
    `task_state` and `shared_state`. `load_task_state` and `load_shared_state` may come at any time after `attach`. At
    the end of an epoch a checkpoint stores `training_state`; resumed training passes it to `load_training_state` before
    `begin_fit`, and leaves `begin_training` out.

    A piece is not an `nn.Module`: what it trains lies inside the network and must be named there only, it refers to the
    module that trains, and its dictionary `parameters` has the name of a module's method.

    Args:
        learning_rate: Learning rate of this piece's parameters; None for that of the head.
    """

    isolated: ClassVar[bool] = True
    """Whether later tasks leave a finished task untouched, because its task state holds all it needs."""
    keeps_heads: ClassVar[bool] = False
    """Whether the heads of earlier tasks are trained together with the current one."""
    solvable_head: ClassVar[bool] = True
    """Whether a head may be solved on all training images of its task."""
    linear: ClassVar[bool] = False
    """Whether the weights of the network are linear in `numbers`, so that tasks can be merged."""
    adapts: ClassVar[bool] = False
    """Whether the task adapts to the images of a test."""
    learner: Learner
    """The module that trains; set before `attach`."""
    number: int = 0
    """How many pieces of the same class precede this one in the method."""

    def __init__(self, learning_rate: float | None = None) -> None:
        self.learning_rate = learning_rate
        self.parameters: dict[str, nn.Parameter] = {}
        """The parameters that each task trains, by name; filled by `attach`."""
        self.memory = Memory()
        """What the piece keeps from one task to the next."""

    @property
    def name(self) -> str:
        """The class, numbered from the second piece of the same class on; labels curves and histograms."""
        return type(self).__name__ + (f"_{self.number}" if self.number else "")

    @property
    def task_parameters(self) -> int:
        """How many numbers each task trains."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def continues(self) -> bool:
        """Whether each task trains the same parameters further, so that earlier tasks can be forgotten."""
        return not self.isolated and type(self).shared_state is Piece.shared_state

    def join(self, pieces: Sequence["Piece"]) -> None:
        """Becomes part of a method.

        Args:
            pieces: All pieces of the method, this one included.

        Raises:
            MethodError: If the piece does not work with the others.
        """
        self.number = sum(type(piece) is type(self) for piece in pieces[: pieces.index(self)])

    def project(self, network: nn.Module, features: int) -> Tensor | None:
        """Chooses fewer features for the heads, before any piece is attached.

        Args:
            network: The backbone's network, pretrained.
            features: D, how many features it has.

        Returns:
            The matrix (width, D) by which the features of all tasks are multiplied; None to leave them as they are.
        """
        return None

    def attach(self, network: nn.Module) -> None:
        """Puts the piece into the backbone's network, whose parameters are frozen, in place."""

    def begin_task(self) -> None:
        """Resets the parameters to the start of every task; does nothing where tasks share them."""

    def groups(self) -> list[ParameterGroup]:
        """The parameters by learning rate."""
        parameters = list(self.parameters.values())
        return [ParameterGroup(self.name, self.learning_rate, parameters)] if parameters else []

    def begin_optimizer(self, optimizer: Optimizer) -> None:
        """Called with a new optimizer of the task, before `begin_fit` and before resuming loads its state."""

    def begin_fit(self) -> None:
        """Called when training starts or resumes, with the module on its device and data available."""

    def begin_training(self, head: nn.Linear) -> None:
        """Called after `begin_fit` of all pieces when training starts, but not when it resumes.

        Args:
            head: A head that is solved on the features that the task starts from, also if its own is trained instead.
        """

    def begin_step(self, progress: float) -> None:
        """Called before the forward pass of each training step.

        Args:
            progress: Fraction of the epoch that is done, from 0 at its first step to 1 at its last.
        """

    def incoming(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits (B, C) that go into the cross-entropy of the current batch."""
        return logits

    def loss(self, step: Step) -> Tensor | None:
        """A term of the loss (a scalar) beside cross-entropy, or None."""
        return None

    def end_step(self) -> None:
        """Called after the optimizer's step."""

    def begin_validation(self) -> None:
        """Called before each validation, in which the network must compute what the task's patch would hold."""

    def end_validation(self) -> None:
        """Called after each validation, after which training goes on from where it was."""

    def end_task(self) -> None:
        """Called when the task's best epoch is loaded, with the module on its device and data available."""

    def task_state(self) -> dict[str, Tensor]:
        """What this piece stores in the task's patch, as copies on the CPU."""
        return copies(self.parameters) if self.isolated else {}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `task_state` returned, in any precision.

        Raises:
            PatchError: If names or shapes differ from this piece's.
        """
        self._load(state, self.parameters if self.isolated else {})

    def continue_from(self, state: dict[str, Tensor]) -> None:
        """Loads what `task_state` returned, to train it further; raises as `load_task_state` does."""
        self.load_task_state(state)

    def unpack(self, states: Mapping[str, Tensor]) -> dict[Tensor, Tensor] | None:
        """Splits task states by layer, so that one pass of the network can serve several tasks.

        Args:
            states: What `task_state` returned for T tasks, each tensor (T, *shape), in any precision; one of them has
                been loaded before.

        Returns:
            For each parameter or buffer that a task sets, its values (T, *shape) in the parameter's precision; only
            the forward pass of the module that owns it may read them. None if that does not describe a task.
        """
        plain = type(self).load_task_state is Piece.load_task_state and states.keys() <= self.parameters.keys()
        return {p: states[name].to(p.dtype) for name, p in self.parameters.items() if name in states} if plain else None

    def numbers(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors in which weights are linear, if `linear`; by default those that `task_state` returned."""
        return state

    def from_numbers(self, numbers: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The task state that has these `numbers`, or comes closest to them."""
        return numbers

    def shared_state(self) -> dict[str, Tensor]:
        """What all tasks need of this piece as the last task left it, as copies on the CPU."""
        return {} if self.isolated else copies(self.parameters)

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `shared_state` returned; raises as `load_task_state` does."""
        self._load(state, {} if self.isolated else self.parameters)

    def restart(self) -> None:
        """Resets the parameters to where the first task began."""
        self.begin_task()

    def training_state(self) -> dict[str, Tensor]:
        """What resuming in the middle of a task needs, beside the parameters."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `training_state` returned."""

    def adapting(self, network: Classifier) -> Classifier:
        """A function that classifies the batches of one stream of test images in order, if the piece `adapts`.

        Args:
            network: Gives logits by the present parameters, which are as before after every batch.
        """
        return network

    def describe(self) -> list[RenderableType]:
        """What to print once the piece is attached."""
        return []

    def save_base(self, folder: Path) -> None:
        """Writes what all tasks start from into the run folder, atomically, unless the file exists."""

    def load_base(self, folder: Path) -> None:
        """Uses what all tasks start from in the run folder, if the file exists."""

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        check_state(type(self).__name__, state, {name: tuple(p.shape) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def sum_over_processes(tensor: Tensor) -> None:
    """Replaces a tensor by its sum over all processes, which is the same on each of them in every bit."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, without gradient."""
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def select(owner: str, names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names in which at least one regular expression is found; `owner` is the class that messages name.

    Raises:
        MethodError: If a pattern is not a regular expression, or no name matches.
    """
    known = list(names)
    try:
        selected = [name for name in known if any(re.search(pattern, name) for pattern in patterns)]
    except re.error as cause:
        raise MethodError(f"{owner}: targets {list(patterns)} are not regular expressions ({cause})") from cause
    if not selected:
        raise MethodError(
            f"{owner}: targets {list(patterns)} match none of {len(known)} names (such as {', '.join(known[:3])}); "
            "set targets to regular expressions that match"
        )
    return selected


def check_state(
    owner: str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], **types: torch.dtype
) -> None:
    """Checks a state against what a piece, or a head, stores.

    Args:
        owner: The class that messages name.
        state: Tensors by name.
        expected: Their shapes by name.
        types: The types of those that hold whole numbers; all others must be floating point.

    Raises:
        PatchError: If a name, shape or type differs, or a value is NaN or infinite.
    """
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != expected:
        wrong = dict(sorted(found.items() - expected.items()))
        right = dict(sorted(expected.items() - found.items()))
        raise PatchError(f"the patch holds {wrong} for {owner}, which needs {right}; it belongs to another method")
    for name, tensor in state.items():
        if tensor.dtype != types[name] if name in types else not tensor.is_floating_point():
            needed = types.get(name, "a floating-point type")
            raise PatchError(f"the patch holds {name} of {owner} as {tensor.dtype}, not {needed}; train the task again")
    check_finite(owner, state)


def check_finite(owner: str, state: Mapping[str, Tensor]) -> None:
    """Raises a PatchError that names the tensors with NaN or infinity, if there are any."""
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise PatchError(f"the patch holds NaN or infinity in {', '.join(bad)} of {owner}; train the task again")
