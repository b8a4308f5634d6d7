"""The LightningModule that learns one task at a time on a frozen backbone."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torchmetrics import MeanMetric

from recast_pl.backbones.backbone import Backbone, BackboneConfig
from recast_pl.errors import PatchError, RunError
from recast_pl.files import fingerprint
from recast_pl.learning.acceleration import EvaluateMerged, MergedWeights, skip_unread_tokens
from recast_pl.learning.patch import SharedState, TaskPatch
from recast_pl.learning.probe import Features, fit_probe
from recast_pl.methods.piece import Piece, Step, check_state

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S), and class indices (B,) of the current task or (B, 2): position of the task, and class index."""


class TaskData(Protocol):
    """What `TILModule` asks of a datamodule; `SequentialTaskDataModule` answers it."""

    image_size: int
    batch_size: int
    tasks: Sequence[Any]

    @property
    def task_name(self) -> str:
        """Name of the current task."""

    @property
    def classes(self) -> list[str]:
        """Class names of the current task."""

    def plain_dataloader(self, split: str) -> Iterable[Any]:
        """A split in order, whole on every process, without augmentation."""

    def train_on(self, images: Tensor, labels: Tensor) -> None:
        """Trains the current task on other images, whose labels (N, 2) are positions of tasks and class indices."""

    def unaugmented(self, images: Tensor) -> Tensor:
        """The images (B, 3, S, S) of the last training batch as they were before they were mirrored at random."""

    def augmented(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Mirrors images (B, 3, S, S) at random, where the image's own task (B,) asks for it."""


class TILModule(LightningModule):
    """Learns tasks one after the other: pieces with a state per task, and one head per task.

    `Trainer.fit(module, datamodule=SequentialTaskDataModule(...))` learns the datamodule's current task;
    `recast_pl.runs.stream.Stream` learns them all. The module holds one task at a time; a learnt task is a
    `TaskPatch`, which `activate` brings back. Where pieces are not isolated, old tasks change with every new one, and
    `shared_state` is what they all need. The backbone stays in evaluation mode, so that the statistics of batch
    normalisation do not drift.

    Args:
        backbone: The pretrained model.
        pieces: The method (any sequence). `[LinearProbe()]` trains the head alone.
        optimizer: Makes an optimizer from parameter groups. The default is the paper's.
        lr_scheduler: Makes a schedule, stepped at every epoch, from an optimizer.
        warm_start: Whether a head starts from the linear probe that is fitted to cached features before each
            task, which then counts as epoch 0 when the best epoch is chosen.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        # a tuple, because the command line merges an overriding list into the one before, element by element
        pieces: tuple[Piece, ...],
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: AdamW(p, lr=2e-3, weight_decay=1e-6),
        lr_scheduler: Callable[[Optimizer], LRScheduler] = lambda o: StepLR(o, step_size=33, gamma=0.1),
        warm_start: bool = False,
    ) -> None:
        super().__init__()
        self.backbone_config, self.pieces, self.warm_start = backbone, list(pieces), warm_start
        for piece in self.pieces:
            piece.join(self.pieces)
        self.memories = nn.ModuleList(piece.memory for piece in self.pieces)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.merged_weights = MergedWeights()
        self.strict_loading = False  # checkpoints leave the frozen network out; on_load_checkpoint checks the rest
        self.backbone: Backbone | None = None
        self.head: nn.Linear | None = None
        self.old_heads, self.old_tasks = nn.ModuleList(), list[str]()  # in order, where a piece trains them
        self.task_name, self.classes, self.base = "", list[str](), ""
        self.probe_accuracy, self.probe_score = float("nan"), (float("nan"), float("nan"))
        self.accuracies = nn.ModuleDict({stage: MeanMetric() for stage in ("fit", "val", "test")})
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    # -- life of a task ------------------------------------------------------------------------------------

    def build(self, image_size: int) -> Backbone:
        """Loads the backbone, freezes it and attaches the pieces; does nothing the second time.

        Args:
            image_size: Height and width of the input in pixels.

        Returns:
            The backbone.
        """
        if self.backbone is None:
            backbone = self.backbone_config.build(image_size).requires_grad_(False)
            buffers = dict(backbone.named_buffers())  # those of pieces are worked out anew, and may differ by rounding
            for piece in self.pieces:
                piece.learner = self
                piece.attach(backbone.net)
            skip_unread_tokens(backbone.net, image_size)
            trained = {id(p) for piece in self.pieces for p in piece.parameters.values()}
            frozen = {n: p for n, p in backbone.named_parameters() if id(p) not in trained}
            self.base = fingerprint(frozen | buffers)
            self.backbone = backbone
        return self.backbone

    def begin_task(self, name: str, classes: Sequence[str]) -> None:
        """Starts a task: a new head, and every piece at its start. Call `build` before.

        Args:
            name: Name of the task.
            classes: Its class names, in order of label.
        """
        self._set_task(name, classes)
        for piece in self.pieces:
            piece.begin_task()

    def activate(self, patch: TaskPatch) -> None:
        """Brings a learnt task back. Call `build` before.

        Args:
            patch: The task; in half or double precision, too.

        Raises:
            PatchError: If it belongs to another base or method.
        """
        patch = patch.widened()
        self.check_patch(patch)
        self._set_task(patch.task, patch.classes).load_state_dict(self.head_of(patch))
        for piece, state in zip(self.pieces, patch.pieces, strict=True):
            piece.load_task_state(state)

    def check_patch(self, patch: TaskPatch) -> None:
        """Refuses a patch of another base or method, or with a head that does not fit. Call `build` before.

        Raises:
            PatchError: Naming the difference.
        """
        patch.check_base(self.base)
        if patch.method != self.method:
            raise PatchError(f"the patch of task {patch.task!r} is of method {patch.method}, not {self.method}")
        classes, width = len(patch.classes), self.build(patch.image_size).num_features
        check_state("the head", patch.head, {"weight": (classes, width), "bias": (classes,)})

    def head_of(self, patch: TaskPatch) -> Mapping[str, Tensor]:
        """Weight (classes, D) and bias (classes,) of a learnt task, as later tasks have left them."""
        if patch.task not in self.old_tasks:
            return patch.head
        state: dict[str, Tensor] = self.old_heads[self.old_tasks.index(patch.task)].state_dict()
        return state

    def merged(self) -> AbstractContextManager[None]:
        """A context in which weights are generated once and no more, for evaluation of the active task.

        Trainers use it by themselves. Elsewhere, `with module.merged(): module(images)` costs what the plain network
        does. Nothing can be trained within, and changing the task takes a new one.
        """
        return self.merged_weights.of(self._ready()[0])

    def patch(self, metrics: Mapping[str, float]) -> TaskPatch:
        """The current task as it stands.

        Args:
            metrics: Accuracies in percent to be kept with it.
        """
        backbone, head = self._ready()
        return TaskPatch(
            task=self.task_name,
            classes=self.classes,
            head={name: p.detach().cpu().clone() for name, p in head.named_parameters()},
            pieces=[piece.task_state() for piece in self.pieces],
            method=self.method,
            image_size=backbone.image_size,
            mean=backbone.mean.flatten().tolist(),
            std=backbone.std.flatten().tolist(),
            base=self.base,
            metrics=dict(metrics),
        )

    def shared_state(self) -> SharedState:
        """What all learnt tasks need, as it is after the last one."""
        return SharedState(
            tasks=list(self.old_tasks),
            heads=[{n: p.detach().cpu().clone() for n, p in head.named_parameters()} for head in self.old_heads],
            pieces=[piece.shared_state() for piece in self.pieces],
            method=self.method,
            base=self.base,
        )

    def load_shared_state(self, state: SharedState) -> None:
        """Takes `shared_state` back. Call `build` before.

        Raises:
            PatchError: If it belongs to another base or method.
        """
        if (state.base, state.method) != (self.base, self.method):
            raise PatchError(
                f"the shared state is of {state.method} on base {state.base[:12]}…, not of {self.method} on base "
                f"{self.base[:12]}…; use the method and the backbone of its run"
            )
        self.old_tasks, self.old_heads = list(state.tasks), nn.ModuleList()
        for tensors in state.heads:
            classes, width = tensors["weight"].shape
            self.old_heads.append(_load_head(nn.Linear(width, classes), tensors))
        self.old_heads.to(self.device)
        for piece, tensors in zip(self.pieces, state.pieces, strict=True):
            piece.load_shared_state(tensors)
        self.memories.to(self.device)

    @property
    def isolated(self) -> bool:
        """Whether a learnt task is untouched by later ones."""
        return all(piece.isolated for piece in self.pieces)

    @property
    def method(self) -> list[str]:
        """Names of the pieces."""
        return [type(piece).__name__ for piece in self.pieces]

    @property
    def task_parameters(self) -> int:
        """Numbers that the pieces train for a task, the head left out."""
        return sum(p.numel() for piece in self.pieces for p in piece.parameters.values())

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies, by name, of all that the current task trains."""
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes `trainable_state` back."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])

    # -- Lightning -----------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the backbone and begins the datamodule's current task, unless that is done."""
        if self.head is None or self.trainer.state.fn == "fit":
            data = self._data()
            self.build(data.image_size)
            if self.task_name != data.task_name:
                self.begin_task(data.task_name, data.classes)

    def train(self, mode: bool = True) -> "TILModule":
        """Sets the mode of all but the backbone, which stays in evaluation mode."""
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of the current task for images (B, 3, S, S) in [0, 1]."""
        backbone, head = self._ready()
        logits: Tensor = head(backbone(images))
        return logits

    def configure_callbacks(self) -> list[Callback]:
        """Evaluation runs on merged weights."""
        return [EvaluateMerged()]

    def configure_optimizers(self) -> Any:
        """One parameter group for the head, and those of the pieces, each with its own learning rate."""
        heads = [*self.old_heads.parameters(), *self._ready()[1].parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "name": "head"}]
        for name, rate, parameters in (group for piece in self.pieces for group in piece.groups()):
            groups.append({"params": parameters, "name": name} | ({} if rate is None else {"lr": rate}))
        return self._configure(groups)

    def on_fit_start(self) -> None:
        """Lets the pieces prepare, and fits the linear probe to the features that the task starts from."""
        if self.task_name in self.old_tasks:
            raise RunError(f"task {self.task_name!r} has been learnt with {self.method}, which learn a task only once")
        for piece in self.pieces:
            piece.begin_fit()
        if not self.trainer.ckpt_path:
            self._fit_probe()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of each image's own head, and what the pieces add."""
        images, labels = batch
        tasks = torch.full_like(labels, len(self.old_heads))
        if labels.ndim > 1:
            tasks, labels = labels.unbind(1)
        backbone, _ = self._ready()
        for piece in self.pieces:
            piece.begin_step(batch_idx / max(1, self.trainer.num_training_batches - 1))
        features = backbone(images)  # (B, D)
        logits = incoming = self.own_logits(features, tasks)  # (B, C)
        for piece in self.pieces:
            incoming = piece.incoming(incoming, labels)
        loss = F.cross_entropy(incoming, labels)
        step = Step(images, labels, features, logits)
        for term in (piece.loss(step) for piece in self.pieces):
            loss = loss if term is None else loss + term
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self._log_accuracy("fit", "train/accuracy", logits, labels)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Tells the pieces that the optimizer has made its step."""
        for piece in self.pieces:
            piece.end_step()

    def on_fit_end(self) -> None:
        """Lets the pieces keep what later tasks are to know of this one, on the device that the trainer has left."""
        self.to(self.trainer.strategy.root_device)
        for piece in self.pieces:
            piece.end_task()
        if any(piece.keeps_heads for piece in self.pieces):
            self.old_heads.append(self._ready()[1])
            self.old_tasks.append(self.task_name)
        self.cpu()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the validation split."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the test split."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, classes)."""
        probabilities: Tensor = self(batch[0]).softmax(1)
        return probabilities.cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the task trains; the frozen network is the same for all."""
        checkpoint["state_dict"] = self.trainable_state()
        checkpoint["pieces"] = [piece.training_state() for piece in self.pieces]
        checkpoint["probe"] = [self.probe_accuracy, *self.probe_score]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another task or method.

        Raises:
            RunError: If it does not hold just what this task trains.
        """
        if checkpoint["state_dict"].keys() != self.trainable_state().keys():
            raise RunError(f"the checkpoint is not of task {self.task_name!r} with {self.method}; begin a new run")
        for piece, state in zip(self.pieces, checkpoint["pieces"], strict=True):
            piece.load_training_state(state)
        self._set_rates(checkpoint)
        self.probe_accuracy, *score = checkpoint["probe"]
        self.probe_score = (score[0], score[1])

    # -- what pieces ask -----------------------------------------------------------------------------------

    @property
    def stream_length(self) -> int:
        """Number of tasks in the stream."""
        return len(self._data().tasks)

    def own_logits(self, features: Tensor, tasks: Tensor) -> Tensor:
        """Logits, each by the head of its own task.

        Args:
            features: (B, D).
            tasks: Positions of the tasks (B,), that of the current one being the last.

        Returns:
            (B, C), C being the classes of the widest head; minus infinity beyond those of a narrower one.
        """
        heads = [*self.old_heads, self._ready()[1]]
        if len(heads) == 1:
            current: Tensor = heads[0](features)
            return current
        logits = [head(features) for head in heads]
        width = max(part.shape[1] for part in logits)
        padded = [F.pad(part, (0, width - part.shape[1]), value=-torch.inf) for part in logits]
        # all heads take part, as DDP wants of all that is trained
        return torch.stack(padded, 1)[torch.arange(len(tasks), device=tasks.device), tasks]  # (B, T, C) to (B, C)

    def batches(self, split: str) -> Iterator[Batch]:
        """Batches of a split of the current task, in order, whole on every process, on the device."""
        for batch in self._data().plain_dataloader(split):
            yield self.trainer.strategy.batch_to_device(batch, self.device)

    def train_on(self, images: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Trains the current task on other images: uint8 (N, 3, S, S), labels (N,), positions of tasks (N,)."""
        self._data().train_on(images, torch.stack([tasks, labels], 1))

    def unaugmented(self, images: Tensor) -> Tensor:
        """The images (B, 3, S, S) of the current training batch as they were before they were mirrored at random."""
        return self._data().unaugmented(images)

    def augmented(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Mirrors stored images (B, 3, S, S) at random, where the image's own task (B,) asks for it."""
        return self._data().augmented(images, tasks)

    def restart(self) -> None:
        """Sets heads, and what tasks share, back to where the first task began."""
        for piece in self.pieces:
            piece.restart()
        for head in (*self.old_heads, self._ready()[1]):
            head.reset_parameters()

    # -- helpers -------------------------------------------------------------------------------------------

    def _set_task(self, name: str, classes: Sequence[str]) -> nn.Linear:
        if self.backbone is None:
            raise RunError("TILModule has no backbone yet; call build(image_size) first")
        self.task_name, self.classes = name, list(classes)
        self.head = nn.Linear(self.backbone.num_features, len(self.classes)).to(self.device)
        return self.head

    def _ready(self) -> tuple[Backbone, nn.Linear]:
        if self.backbone is None or self.head is None:
            raise RunError("TILModule has no task yet; call Trainer.fit, or build and then begin_task or activate")
        return self.backbone, self.head

    def _data(self) -> TaskData:
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise RunError("TILModule needs datamodule=SequentialTaskDataModule(...) in the call of the trainer")
        return data  # type: ignore[no-any-return]

    def _set_rates(self, checkpoint: dict[str, Any]) -> None:
        """Lets a task be resumed with other learning rates than it began with, each as far down its schedule."""
        (optimizer,), _ = self.configure_optimizers()
        (saved,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        for index, (group, before) in enumerate(zip(optimizer.param_groups, saved["param_groups"], strict=True)):
            scale = group["initial_lr"] / before["initial_lr"]
            if scale != 1:
                before["initial_lr"], before["lr"] = group["initial_lr"], scale * before["lr"]
                for key in schedule.keys() & {"base_lrs", "_last_lr"}:
                    schedule[key][index] *= scale

    def _configure(self, groups: list[dict[str, Any]]) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizer = self.optimizer(groups)
        return [optimizer], [self.lr_scheduler(optimizer)]

    def _fit_probe(self) -> None:
        """Fits the probe, and warm-starts the head with it if asked."""
        backbone, head = self._ready()
        with self.merged():
            features = {split: self._features(split) for split in ("train", "val", "test")}
        probe = nn.Linear(backbone.num_features, len(self.classes)).to(self.device)
        epochs = self.trainer.max_epochs or 0
        configure = lambda p: self._configure([{"params": list(p)}])  # noqa: E731
        fit_probe(probe, features["train"], features["val"], epochs, self._data().batch_size, configure)
        self.probe_accuracy = features["test"].score(probe)[0]
        self.probe_score = features["val"].score(probe)
        if self.warm_start:
            head.load_state_dict(probe.state_dict())

    @torch.no_grad()
    def _features(self, split: str) -> Features:
        backbone, _ = self._ready()
        features, labels = [], []
        for images, targets in self.batches(split):
            with self.trainer.precision_plugin.forward_context():
                features.append(backbone(images).float())
            labels.append(targets)
        return Features(torch.cat(features), torch.cat(labels))

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch) -> None:
        images, labels = batch
        counted = labels >= 0
        logits, labels = self(images)[counted], labels[counted]
        self._log_mean(self.losses[stage], f"{stage}/loss", F.cross_entropy(logits, labels, reduction="none"))
        self._log_accuracy(stage, f"{stage}/accuracy", logits, labels)

    def _log_accuracy(self, stage: str, name: str, logits: Tensor, labels: Tensor) -> None:
        self._log_mean(self.accuracies[stage], name, (logits.argmax(1) == labels).float(), prog_bar=stage == "val")

    def _log_mean(self, metric: nn.Module, name: str, values: Tensor, prog_bar: bool = False) -> None:
        """Logs the mean of values (B,) over the epoch and all processes."""
        assert isinstance(metric, MeanMetric)
        metric.update(values)
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=len(values))


def _load_head(head: nn.Linear, state: Mapping[str, Tensor]) -> nn.Linear:
    check_state("the head", state, {n: tuple(p.shape) for n, p in head.named_parameters()})
    head.load_state_dict(state)
    return head
