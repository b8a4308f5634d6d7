"""The LightningModule that trains one task at a time on a frozen backbone."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torchmetrics import MeanMetric

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.compat.lightning import early_stopping
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError, one_line
from recast_pl.learning.acceleration import EvaluateMerged
from recast_pl.learning.checkpoint import change_rates, trainable_state
from recast_pl.learning.metrics import Percent, Predictions
from recast_pl.learning.probe import Features, extract_features, fit_probe
from recast_pl.learning.schedule import followed_metric, step_schedule
from recast_pl.learning.task_network import TaskNetwork
from recast_pl.methods.piece import Piece, Step

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, S, S) in [0, 1], and class indices (B,) of the current task, or (B, 2): task index and class index."""


class TILModule(TaskNetwork, LightningModule):
    """Trains tasks one after the other (task-incremental learning): pieces with a state per task, one head per task.

    `Trainer.fit(module, datamodule=SequentialTaskDataModule(...))` trains the current task of the datamodule;
    `recast_pl.runs.stream.Stream` trains all of them.

    Args:
        backbone: The pretrained model.
        pieces: The method (any sequence). `[LinearProbe()]` trains only the head.
        optimizer: Makes an optimizer from parameter groups. The default is the paper's.
        lr_scheduler: Makes a schedule, which is stepped after every epoch, from an optimizer. `ReduceLROnPlateau`
            follows the validation loss, or the accuracy with `mode: max`. None for constant learning rates.
        warm_start: Whether a head starts from the linear probe that is fitted to cached features before each task. The
            probe then counts as epoch 0 when the best epoch is chosen.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        # a tuple, because jsonargparse would merge a list of the command line into the one before, element by element
        pieces: tuple[Piece, ...],
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: AdamW(p, lr=2e-3, weight_decay=1e-6),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = lambda o: StepLR(o, step_size=33, gamma=0.1),
        warm_start: bool = False,
    ) -> None:
        super().__init__(backbone, pieces)
        for piece in self.pieces:
            piece.learner = self
        self.optimizer, self.lr_scheduler, self.warm_start = optimizer, lr_scheduler, warm_start
        self.strict_loading = False  # checkpoints lack the frozen network; on_load_checkpoint checks the rest
        self.probe_accuracy, self.probe_score = float("nan"), (float("nan"), float("nan"))
        names = ("train/accuracy", "val/accuracy", "val/loss", "test/accuracy", "test/loss")
        self.means = nn.ModuleDict({name: Percent() if "accuracy" in name else MeanMetric() for name in names})
        self.predictions = Predictions()
        self.test_pairs = torch.empty(0, 2, dtype=torch.long)  # label and predicted class of the images tested last

    # -- training ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the backbone and begins the datamodule's current task, unless that was done before."""
        if self.head is None or self.trainer.state.fn == "fit":
            data = self._data()
            self.build(data.image_size)
            if self.task_name != data.task_name:
                self.begin_task(data.task_name, data.classes)

    def configure_callbacks(self) -> list[Callback]:
        """Generates weights once for each evaluation."""
        return [EvaluateMerged()]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """One parameter group for the heads, and the groups of the pieces, each with its own learning rate."""
        heads = [*self.old_heads.parameters(), *self.current()[1].parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "name": "head"}]
        for name, rate, parameters in (group for piece in self.pieces for group in piece.groups()):
            groups.append({"params": parameters, "name": name} | ({} if rate is None else {"lr": rate}))
        optimizer, schedule = self._configure(groups)
        schedules = [] if schedule is None else [{"scheduler": schedule, "monitor": followed_metric(schedule)}]
        return [optimizer], schedules

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule after an epoch; raises RunError if it has no more steps."""
        step_schedule(scheduler, metric)

    def _configure(self, parameters: Iterable[Any]) -> tuple[Optimizer, LRScheduler | None]:
        try:
            optimizer = self.optimizer(parameters)
            return optimizer, None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        except (TypeError, ValueError) as cause:
            raise RunError(
                f"the optimizer or its schedule cannot be made ({one_line(cause)}); correct or replace "
                "--model.optimizer or --model.lr_scheduler, for example by torch.optim.AdamW and null"
            ) from cause

    def on_fit_start(self) -> None:
        """Lets the pieces prepare. Fits the linear probe to the features that the task starts from."""
        if self.task_name in self.old_tasks:
            raise RunError(f"task {self.task_name!r} was trained before, and {self.method} train a task only once")
        for piece in self.pieces:
            piece.begin_fit()
        if not self.trainer.ckpt_path:
            self._fit_probe()

    def _fit_probe(self) -> None:
        backbone, head = self.current()
        splits, precision = map(self.batches, ("train", "val", "test")), self.trainer.precision_plugin
        with self.merged():
            train, val, test = (extract_features(backbone, split, precision) for split in splits)
        probe = nn.Linear(backbone.num_features, len(self.classes)).to(self.device)
        batch_size = self._data().batch_size * self.trainer.world_size
        epochs, stops = self._probe_epochs(len(train.labels), batch_size), early_stopping(self.trainer)
        fit_probe(probe, train, val, epochs, batch_size, self._configure, stops)
        self.probe_accuracy, self.probe_score = test.score(probe)[0], val.score(probe)
        if self.warm_start:
            head.load_state_dict(probe.state_dict())

    def _probe_epochs(self, images: int, batch_size: int) -> int:
        """The epochs that the task may have: by epochs or by steps, or 100 if neither ends it."""
        trainer, limits = self.trainer, list[int]()
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            limits.append(trainer.max_epochs)
        if trainer.max_steps >= 0:
            batches = trainer.max_steps * trainer.accumulate_grad_batches
            limits.append(math.ceil(batches / math.ceil(images / batch_size)))
        return min(limits, default=100)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of each image by the head of its own task, plus the terms of the pieces."""
        images, labels = batch
        tasks = torch.full_like(labels, len(self.old_heads))
        if labels.ndim > 1:
            tasks, labels = labels.unbind(1)
        backbone, _ = self.current()
        for piece in self.pieces:
            piece.begin_step(batch_idx / max(1, self.trainer.num_training_batches - 1))
        features = backbone(images)  # (B, D)
        logits = incoming = self.own_logits(features, tasks)  # (B, C)
        for piece in self.pieces:
            incoming = piece.incoming(incoming, labels)
        loss = F.cross_entropy(incoming, labels)
        share = self._data().share_of_step(batch_idx)
        step = Step(images, labels, features, logits, counts=share > 0)
        for term in (piece.loss(step) for piece in self.pieces):
            loss = loss if term is None else loss + term
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self._log_mean("train/accuracy", (logits.argmax(1) == labels)[: len(labels) if step.counts else 0])
        return loss if share == 1 else share * loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Tells the pieces that the optimizer has made its step."""
        for piece in self.pieces:
            piece.end_step()

    def on_fit_end(self) -> None:
        """Lets the pieces keep what later tasks need of this one, on the device that the trainer has left."""
        self.to(self.trainer.strategy.root_device)
        for piece in self.pieces:
            piece.end_task()
        if any(piece.keeps_heads for piece in self.pieces):
            self.old_heads.append(self.current()[1])
            self.old_tasks.append(self.task_name)
        self.cpu()

    def features(self, split: str) -> Features:
        """Features of all images of a split by the current task, on the device. Call after `Trainer.fit`."""
        self.to(self.trainer.strategy.root_device)
        with self.merged():
            found = extract_features(self.current()[0], self.batches(split), self.trainer.precision_plugin)
        self.cpu()
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the task trains, without the frozen network."""
        checkpoint["state_dict"] = trainable_state(self)
        checkpoint["pieces"] = [piece.training_state() for piece in self.pieces]
        checkpoint["probe"] = [self.probe_accuracy, *self.probe_score]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads what `on_save_checkpoint` kept, except the learning rates; raises RunError if it does not fit."""
        if checkpoint["state_dict"].keys() != trainable_state(self).keys():
            raise RunError(f"the checkpoint is not of task {self.task_name!r} with {self.method}; start a new run")
        for piece, state in zip(self.pieces, checkpoint["pieces"], strict=True):
            piece.load_training_state(state)
        change_rates(checkpoint, self.configure_optimizers()[0][0])
        self.probe_accuracy, *score = checkpoint["probe"]
        self.probe_score = (score[0], score[1])

    # -- evaluation ----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the validation split."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the test split, and what each image was taken for."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Gathers the predictions of all processes."""
        self.test_pairs = self.predictions.compute().cpu()  # (N, 2)
        self.predictions.reset()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        counted = labels >= 0
        logits, labels = self(images)[counted], labels[counted]
        self._log_mean(f"{stage}/loss", F.cross_entropy(logits, labels, reduction="none"))
        predicted = logits.argmax(1)
        self._log_mean(f"{stage}/accuracy", predicted == labels)
        if stage == "test":
            self.predictions.update(labels, predicted)

    def _log_mean(self, name: str, values: Tensor) -> None:
        """Logs the mean of values (B,) over the epoch and all processes; an accuracy in percent."""
        metric: Any = self.means[name]
        metric.update(values.float())
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name == "val/accuracy", batch_size=len(values))

    # -- data ----------------------------------------------------------------------------------------------

    def _data(self) -> SequentialTaskDataModule:
        data: SequentialTaskDataModule | None = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise RunError("TILModule needs datamodule=SequentialTaskDataModule(...) in the call of the trainer")
        return data

    @property
    def stream_length(self) -> int:
        """Number of tasks in the stream."""
        return len(self._data().tasks)

    def batches(self, split: str) -> Iterator[Batch]:
        """Batches of a split of the current task, in order, all of them on every process, on the device."""
        for batch in self._data().plain_dataloader(split):
            yield self.trainer.strategy.batch_to_device(batch, self.device)

    def train_on(self, images: Tensor, labels: Tensor, tasks: Tensor) -> None:
        """Trains the current task on other images: uint8 (N, 3, S, S), labels (N,), positions of tasks (N,)."""
        self._data().train_on(images, torch.stack([tasks, labels], 1))

    @property
    def plain_images(self) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] of the latest batch, before augmentation."""
        return self._data().plain_images

    def augment(self, images: Tensor, tasks: Tensor) -> Tensor:
        """Augments plain images, uint8 (B, 3, S, S), as their own tasks (B,) ask."""
        return self._data().augment(images, tasks)
