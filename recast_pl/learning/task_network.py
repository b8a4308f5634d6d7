"""A frozen backbone with the pieces of a method, and a head for each task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast_pl.backbones.backbone import Backbone, BackboneConfig
from recast_pl.errors import BackboneError, PatchError, RunError
from recast_pl.files import fingerprint
from recast_pl.learning.acceleration import MergedWeights, skip_unread_tokens
from recast_pl.learning.patch import SharedState, TaskPatch, load_head
from recast_pl.methods.piece import Classifier, Piece, copies
from recast_pl.rules import ImageSize


class TaskNetwork(nn.Module):
    """A network that holds one task at a time.

    `begin_task` starts a new task, `patch` returns the current one, and `activate` loads one. If a piece is not
    isolated, every new task changes the old ones, and `shared_state` is the state that all of them need.

    Args:
        backbone: The pretrained model. It stays in evaluation mode, so that batch normalisation does not drift.
        pieces: The method.
    """

    def __init__(self, backbone: BackboneConfig, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.backbone_config, self.pieces = backbone, list(pieces)
        for piece in self.pieces:
            piece.join(self.pieces)
        self.memories = nn.ModuleList(piece.memory for piece in self.pieces)
        self.merged_weights = MergedWeights()
        self.backbone: Backbone | None = None
        self.head: nn.Linear | None = None
        self.old_heads, self.old_tasks = nn.ModuleList(), list[str]()  # in order, if a piece keeps training them
        self.task_name, self.classes, self.base = "", list[str](), ""
        self.earlier: TaskPatch | None = None  # the version that the current task continues from
        self.refine = True  # whether the pieces are trained

    @property
    def method(self) -> list[str]:
        """Names of the pieces."""
        return [type(piece).__name__ for piece in self.pieces]

    @property
    def isolated(self) -> bool:
        """Whether later tasks leave a trained task unchanged."""
        return all(piece.isolated for piece in self.pieces)

    @property
    def trained(self) -> Sequence[Piece]:
        """The pieces that the current task trains."""
        return self.pieces if self.refine else ()

    @property
    def task_parameters(self) -> int:
        """How many parameters the pieces train for a task, without the head."""
        return sum(piece.task_parameters for piece in self.pieces)

    def build(self, image_size: ImageSize) -> Backbone:
        """Loads the backbone for an image size, freezes it and attaches the pieces; later calls only return it."""
        if self.backbone is None:
            backbone = self.backbone_config.build(image_size).requires_grad_(False)
            # without the buffers of pieces, which every process computes for itself and which may differ by rounding
            buffers = dict(backbone.named_buffers())
            for matrix in [piece.project(backbone.net, backbone.num_features) for piece in self.pieces]:
                if matrix is not None:
                    backbone.project(matrix)
            for piece in self.pieces:
                piece.attach(backbone.net)
            skip_unread_tokens(backbone.net, image_size)
            trained = {id(p) for piece in self.pieces for p in piece.parameters.values()}
            frozen = {n: p for n, p in backbone.named_parameters() if id(p) not in trained}
            self.base = fingerprint(frozen | buffers)
            self.backbone = backbone
        return self.backbone

    def train(self, mode: bool = True) -> "TaskNetwork":
        """Sets the mode of everything but the backbone, which stays in evaluation mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    # -- the current task ----------------------------------------------------------------------------------

    def begin_task(self, name: str, classes: Sequence[str]) -> None:
        """Starts a task, with its class names in order of label. Call `build` before."""
        self._set_task(name, classes)
        self.earlier, self.refine = None, True
        for piece in self.pieces:
            piece.begin_task()

    def continue_task(self, patch: TaskPatch, refine: bool) -> None:
        """Lets the current task continue from an earlier version of it. Call `begin_task` before.

        Its signature and its probe are still those of the network that every task starts from.

        Args:
            patch: The earlier version; it may have fewer classes.
            refine: Whether to train the pieces further; if not, the head alone is found.

        Raises:
            PatchError: If the patch belongs to another base or method.
        """
        self.check_patch(patch)
        self.earlier, self.refine = patch.widened(), refine

    def load_earlier(self) -> bool:
        """Loads what the pieces of the earlier version have learnt; returns whether there is one."""
        if self.earlier is None:
            return False
        for piece, state in zip(self.pieces, self.earlier.pieces, strict=True):
            (piece.continue_from if self.refine else piece.load_task_state)(state)
        return True

    def activate(self, patch: TaskPatch) -> None:
        """Makes a trained task, in any precision, the current one. Call `build` before.

        Raises:
            PatchError: If it belongs to another base or method.
        """
        patch = patch.widened()
        self.check_patch(patch)
        self._set_task(patch.task, patch.classes).load_state_dict(self.head_of(patch))
        for piece, state in zip(self.pieces, patch.pieces, strict=True):
            piece.load_task_state(state)

    def patch(self, metrics: Mapping[str, float]) -> TaskPatch:
        """The current task in its present state, with accuracies in percent by name."""
        backbone, head = self.current()
        return TaskPatch(
            task=self.task_name,
            classes=self.classes,
            head=copies(head.state_dict()),
            pieces=[piece.task_state() for piece in self.pieces],
            method=self.method,
            image_size=backbone.image_size,
            mean=backbone.mean.flatten().tolist(),
            std=backbone.std.flatten().tolist(),
            base=self.base,
            metrics=dict(metrics),
        )

    def current(self) -> tuple[Backbone, nn.Linear]:
        """The backbone, and the head of the current task; raises RunError before the first task begins."""
        if self.backbone is None or self.head is None:
            raise RunError("TILModule has no task yet; call Trainer.fit, or build and then begin_task or activate")
        return self.backbone, self.head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the current task for images (B, 3, S, S) in [0, 1]."""
        backbone, head = self.current()
        logits: Tensor = head(backbone(images))
        return logits

    def merged(self) -> AbstractContextManager[None]:
        """A context in which the weights of the current task are generated only once, for evaluation in this thread.

        Trainers use it by themselves. Elsewhere, `with module.merged(): module(images)` is as fast as the plain
        network. Training does not work in it, and a change of task takes effect in the next one.
        """
        return self.merged_weights.of(self.current()[0])

    @contextmanager
    def testing(self) -> Iterator[Callable[[], Classifier]]:
        """A context with a function that starts a stream of test images of the current task and returns a classifier.

        A classifier gets the batches in order. If a piece adapts, each stream starts from the trained task, and any
        number of them can take turns; otherwise the weights are generated only once.
        """
        adapting = [piece for piece in self.pieces if piece.adapts]
        if adapting:
            yield partial(adapting[0].adapting, self)
        else:
            with self.merged():
                yield lambda: self.__call__

    def _set_task(self, name: str, classes: Sequence[str]) -> nn.Linear:
        backbone = self._built()
        self.task_name, self.classes = name, list(classes)
        self.head = nn.Linear(backbone.num_features, len(self.classes)).to(backbone.mean.device)
        return self.head

    def _built(self) -> Backbone:
        if self.backbone is None:
            raise RunError("TILModule has no backbone yet; call build(image_size) first")
        return self.backbone

    # -- all tasks -----------------------------------------------------------------------------------------

    def check_patch(self, patch: TaskPatch) -> None:
        """Raises PatchError unless a patch is valid and fits this base, method and network. Call `build` before."""
        backbone = self._built()
        patch.check(self.base, self.method, backbone.num_features)
        if patch.image_size != backbone.image_size:
            try:
                backbone.check_size(patch.image_size)
            except BackboneError as cause:
                raise PatchError(f"the patch of task {patch.task!r} cannot be used: {cause}") from cause

    def head_of(self, patch: TaskPatch) -> Mapping[str, Tensor]:
        """Weight (classes, D) and bias (classes,) of a trained task, as later tasks have left them."""
        if patch.task not in self.old_tasks:
            return patch.head
        state: dict[str, Tensor] = self.old_heads[self.old_tasks.index(patch.task)].state_dict()
        return state

    def shared_state(self) -> SharedState:
        """The state that all trained tasks need, as it is after the last one."""
        heads = [copies(head.state_dict()) for head in self.old_heads]
        pieces = [piece.shared_state() for piece in self.pieces]
        return SharedState(list(self.old_tasks), heads, pieces, self.method, self.base)

    def load_shared_state(self, state: SharedState) -> None:
        """Loads what `shared_state` returned, or raises PatchError if it does not fit. Call `build` before."""
        state.check(self.base, self.method)
        self.old_tasks, self.old_heads = list(state.tasks), nn.ModuleList(map(load_head, state.heads))
        self.old_heads.to(self._built().mean.device)
        for piece, tensors in zip(self.pieces, state.pieces, strict=True):
            piece.load_shared_state(tensors)
        self.memories.to(self._built().mean.device)

    def own_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits, each by the head of its own task.

        Args:
            features: (B, D).
            tasks: Positions of the tasks (B,); the current one is the last.

        Returns:
            (B, C), where C is the largest number of classes of a head; minus infinity beyond the classes of a head.
        """
        logits: list[Tensor] = [head(features) for head in (*self.old_heads, self.current()[1])]
        if len(logits) == 1:
            return logits[0]
        width = max(part.shape[1] for part in logits)
        padded = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in logits]
        # all heads compute all images, because DDP needs a gradient for every trained parameter
        return torch.stack(padded, 1)[torch.arange(len(tasks), device=tasks.device), tasks]  # (B, T, C) to (B, C)

    def restart(self) -> None:
        """Sets heads, and the state that tasks share, back to the start of the first task."""
        for piece in self.pieces:
            piece.restart()
        for head in (*self.old_heads, self.current()[1]):
            head.reset_parameters()
