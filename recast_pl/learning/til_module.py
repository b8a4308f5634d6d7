"""The LightningModule that trains one task at a time on a frozen backbone."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torchmetrics import MeanMetric

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.compat.lightning import early_stopping
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError, one_line
from recast_pl.learning.acceleration import EvaluateMerged, OutputChanges
from recast_pl.learning.checkpoint import change_rates, trainable_state
from recast_pl.learning.cost import TaskCost
from recast_pl.learning.features import Features, extract_features, gather_features
from recast_pl.learning.heads import HeadKind, check_head_options, class_weights, classification_loss, solve_head
from recast_pl.learning.metrics import Percent, Predictions
from recast_pl.learning.options import check_precision
from recast_pl.learning.probe import Probes, fit_probe
from recast_pl.learning.schedule import followed_metric, step_schedule
from recast_pl.learning.signature import Signature
from recast_pl.learning.task_network import TaskNetwork
from recast_pl.methods.piece import Classifier, Piece, Step

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
        head: How the head is found. `sgd` trains it together with the pieces, as in the paper. The others solve it on
            the features of all training images: before training, which counts as epoch 0 when the best epoch is chosen,
            and again before each validation; between them it is trained with the pieces. `logistic` is logistic
            regression with a weight decay from cross-validation; `lda` (linear discriminant) and `ridge` have a closed
            form.
        warm_start: Whether an `sgd` head starts from a probe that the optimizer of the task trains on cached features.
        balanced: Whether all classes have the same weight in training the head, however many images they have.
        label_smoothing: Share of the label, from 0 to 1, that is spread over all classes; not for `lda` and `ridge`.

    Raises:
        RunError: If an option of the head is out of range or does not go with another one.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        # a tuple, because jsonargparse would merge a list of the command line into the one before, element by element
        pieces: tuple[Piece, ...],
        optimizer: Callable[[Iterable[Any]], Optimizer] = lambda p: AdamW(p, lr=2e-3, weight_decay=1e-6),
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = lambda o: StepLR(o, step_size=33, gamma=0.1),
        head: HeadKind = "logistic",
        warm_start: bool = False,
        balanced: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(backbone, pieces)
        check_head_options(head, label_smoothing)
        solvable = all(piece.solvable_head for piece in self.pieces)
        self.head_kind: HeadKind = head if solvable else "sgd"
        self.balanced, self.label_smoothing = balanced, label_smoothing
        for piece in self.pieces:
            piece.learner = self
        self.optimizer, self.lr_scheduler, self.warm_start = optimizer, lr_scheduler, warm_start
        self.strict_loading = False  # checkpoints lack the frozen network; on_load_checkpoint checks the rest
        self.probes = Probes()
        self.signature: Signature | None = None  # of the current task; None if tasks share weights
        self.class_weights = torch.empty(0)  # of the current task (C,); empty if all images count the same
        names = ("train/accuracy", "val/accuracy", "val/loss", "test/accuracy", "test/loss")
        self.means = nn.ModuleDict({name: Percent() if "accuracy" in name else MeanMetric() for name in names})
        self.predictions = Predictions()
        self.answer: Classifier | None = None  # during a test, what classifies its images
        self.test_pairs = torch.empty(0, 2, dtype=torch.long)  # label and predicted class of the images tested last

    # -- training ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Builds the backbone and begins the datamodule's current task, unless that was done before."""
        check_precision(self.trainer)
        if self.head is None or self.trainer.state.fn == "fit":
            data = self._data()
            self.build(data.image_size)
            if self.task_name != data.task_name:
                self.begin_task(data.task_name, data.classes)
            if self.trainer.ckpt_path:
                self.load_earlier()  # a checkpoint fits the shapes of parameters that it gives

    def configure_callbacks(self) -> list[Callback]:
        """Generates weights once for each evaluation."""
        return [EvaluateMerged()]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        """One parameter group for the heads, and the groups of the pieces, each with its own learning rate."""
        heads = [*self.old_heads.parameters(), *self.current()[1].parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "name": "head"}]
        for name, rate, parameters in (group for piece in self.trained for group in piece.groups()):
            groups.append({"params": parameters, "name": name} | ({} if rate is None else {"lr": rate}))
        optimizer, schedule = self._configure(groups)
        for piece in self.trained:
            piece.begin_optimizer(optimizer)
        schedules = [] if schedule is None else [{"scheduler": schedule, "monitor": followed_metric(schedule)}]
        return [optimizer], schedules

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule after an epoch; raises RunError if it has no more steps."""
        costs = [callback for callback in self.trainer.callbacks if isinstance(callback, TaskCost)]  # type: ignore[attr-defined]
        # one that follows a metric decides itself how fast it advances
        for _ in range(sum(cost.schedule_steps() for cost in costs) if costs and metric is None else 1):
            step_schedule(scheduler, metric)

    def _configure(self, parameters: Iterable[Any]) -> tuple[Optimizer, LRScheduler | None]:
        try:
            optimizer = self.optimizer(parameters)
            schedule = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        except (TypeError, ValueError) as cause:
            raise RunError(
                f"the optimizer or its schedule cannot be made ({one_line(cause)}); correct or replace "
                "--model.optimizer or --model.lr_scheduler, for example by torch.optim.AdamW and null"
            ) from cause
        if isinstance(optimizer, LBFGS | SparseAdam):  # they need a closure, and sparse gradients
            name = type(optimizer).__name__
            raise RunError(
                f"optimizer {name} cannot train here; choose another, such as --model.optimizer torch.optim.AdamW"
            )
        return optimizer, schedule

    def on_fit_start(self) -> None:
        """Lets the pieces prepare. Fits the linear probe to the features that the task starts from."""
        if self.task_name in self.old_tasks:
            raise RunError(f"task {self.task_name!r} was trained before, and {self.method} train a task only once")
        for piece in self.pieces:
            piece.begin_fit()
        self.output_changes = OutputChanges(self.current()[0])
        if self.balanced:
            labels = torch.cat([labels for _, labels in self.batches("train")])
            self.class_weights = class_weights(labels, len(self.classes)).float()
        if not self.trainer.ckpt_path:
            solved = self._start_head()
            for piece in self.pieces:
                piece.begin_training(solved)
            if self.load_earlier() and self.probes.start is not None:
                train, val = self.features("train", "val")
                self._start_from(self.current()[1] if self.head_kind == "sgd" else self._solved(train), val)
        if self.head_kind != "sgd" and not (self.task_parameters and self.refine):
            self.trainer.should_stop = True  # the head is solved, and nothing else is trained

    def _start_head(self) -> nn.Linear:
        """Fits the probes to the features that the task starts from, starts the head, and returns a solved one."""
        train, val, test = self.features("train", "val", "test")
        self.signature = self.sign(train, val) if self.isolated else None
        probe = solve_head("logistic", train, len(self.classes))
        self.probes = Probes(test.score(probe)[0])
        if self.head_kind == "sgd":
            start = self._budgeted_probe(train, val)
            self.probes = replace(self.probes, budgeted=test.score(start)[0])
        elif self.head_kind == "logistic" and not (self.balanced or self.label_smoothing):
            start = probe
        else:
            start = self._solved(train)
        if self.head_kind != "sgd" or self.warm_start:
            self._start_from(start, val)
        return probe if self.head_kind == "sgd" else start

    def _start_from(self, head: nn.Linear, validation: Features) -> None:
        self.current()[1].load_state_dict(head.state_dict())
        self.probes = replace(self.probes, start=validation.score(head))

    def sign(self, train: Features, validation: Features) -> Signature:
        """The signature of the current task, from features that it starts from."""
        size = self.current()[0].image_size
        return Signature.of(train, validation, self.task_name, self.classes, self.base, size)

    def sign_confidence(self) -> None:
        """Adds to the signature how sure the current task is of its validation images."""
        if self.signature is not None:
            (validation,) = self.features("val")
            self.signature = replace(self.signature, confidence=validation.confidence(self.current()[1]))

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def _solve_head(self) -> None:
        """Solves the head on the features of the training images as they are now, unless training has diverged."""
        (train,) = self.features("train")
        if train.features.isfinite().all():
            self.current()[1].load_state_dict(self._solved(train).state_dict())

    def _solved(self, train: Features) -> nn.Linear:
        return solve_head(self.head_kind, train, len(self.classes), self.balanced, self.label_smoothing)

    def on_validation_start(self) -> None:
        """Solves the head, so that validation compares the features of epochs and not the state of one head."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and self.head_kind != "sgd":
            self._solve_head()

    def features(self, *splits: str) -> list[Features]:
        """Features of all images of some splits by the current task, in order, on the trainer's device.

        Each process computes a share, and all get all.
        """
        self.to(self.trainer.strategy.root_device)
        backbone, precision = self.current()[0], self.trainer.precision_plugin
        with self.merged():
            shares = [extract_features(backbone, self._batches(split, False), precision) for split in splits]
        return [gather_features(share) for share in shares] if self.trainer.world_size > 1 else shares

    def _budgeted_probe(self, train: Features, val: Features) -> nn.Linear:
        """A head that is trained with the optimizer, epochs and batches of the task."""
        probe = nn.Linear(train.features.shape[1], len(self.classes)).to(self.device)
        batch_size = self._data().batch_size * self.trainer.world_size
        epochs, stops = self._probe_epochs(len(train.labels), batch_size), early_stopping(self.trainer)
        fit_probe(probe, train, val, epochs, batch_size, self._configure, stops)
        return probe

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
        with self.output_changes.apply():
            features = backbone(images)  # (B, D)
        logits = incoming = self.own_logits(features, tasks)  # (B, C)
        for piece in self.pieces:
            incoming = piece.incoming(incoming, labels)
        loss = self.loss(incoming, labels, tasks)
        share = self._data().share_of_step(batch_idx)
        step = Step(images, labels, features, logits, counts=share > 0)
        for term in (piece.loss(step) for piece in self.trained):
            loss = loss if term is None else loss + term
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self._log_mean("train/accuracy", (logits.argmax(1) == labels)[: len(labels) if step.counts else 0])
        return loss if share == 1 else share * loss

    def loss(self, logits: Tensor, labels: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Cross-entropy as training computes it, the mean over images.

        Args:
            logits: (B, C).
            labels: (B,).
            tasks: Positions of the images' tasks (B,); None for the current one.
        """
        tasks = torch.full_like(labels, len(self.old_heads)) if tasks is None else tasks
        return classification_loss(logits, labels, self._weights(tasks, labels), self.label_smoothing)

    def _weights(self, tasks: Tensor, labels: Tensor) -> Tensor | None:
        """Weights (B,) of images by their classes, 1 for images of earlier tasks; None if all are 1."""
        if not self.balanced:
            return None
        weights = self.class_weights[labels.clamp(max=len(self.class_weights) - 1)]
        return torch.where(tasks == len(self.old_heads), weights, 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Tells the pieces that the optimizer has made its step."""
        for piece in self.pieces:
            piece.end_step()

    def on_fit_end(self) -> None:
        """Lets the pieces keep what later tasks need of this one, on the device that the trainer has left."""
        self.to(self.trainer.strategy.root_device)
        if self.head_kind != "sgd" and self.task_parameters and not self.trainer.limit_val_batches:
            for piece in self.pieces:
                piece.begin_validation()
            self._solve_head()  # otherwise validation has
        for piece in self.pieces:
            piece.end_task()
        if any(piece.keeps_heads for piece in self.pieces):
            self.old_heads.append(self.current()[1])
            self.old_tasks.append(self.task_name)
        self.cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the task trains, without the frozen network."""
        checkpoint["state_dict"] = trainable_state(self)
        checkpoint["pieces"] = [piece.training_state() for piece in self.pieces]
        checkpoint["probe"] = asdict(self.probes)
        checkpoint["signature"] = self.signature and (self.signature.tensors, self.signature.facts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads what `on_save_checkpoint` kept, except the learning rates; raises RunError if it does not fit."""
        if checkpoint["state_dict"].keys() != trainable_state(self).keys():
            raise RunError(f"the checkpoint is not of task {self.task_name!r} with {self.method}; start a new run")
        for piece, state in zip(self.pieces, checkpoint["pieces"], strict=True):
            piece.load_training_state(state)
        change_rates(checkpoint, self.configure_optimizers()[0][0])
        self.probes = Probes.of(checkpoint["probe"])
        kept = checkpoint.get("signature")  # checkpoints of earlier versions have none
        self.signature = kept and Signature.from_parts(*kept)

    # -- evaluation ----------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the validation split."""
        self._evaluate("val", batch, self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy and cross-entropy on the test split, and what each image was taken for."""
        self._evaluate("test", batch, self.answer or self)

    def on_test_epoch_end(self) -> None:
        """Gathers the predictions of all processes."""
        self.test_pairs = self.predictions.compute().cpu()  # (N, 2)
        self.predictions.reset()

    def _evaluate(self, stage: str, batch: Batch, network: Classifier) -> None:
        images, labels = batch
        counted = labels >= 0
        logits, labels = network(images)[counted], labels[counted]
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
        return self._batches(split, everywhere=True)

    def batch_count(self, split: str) -> int:
        """How many `batches` a split of the current task has."""
        return len(self._data().plain_dataloader(split))

    def _batches(self, split: str, everywhere: bool) -> Iterator[Batch]:
        for batch in self._data().plain_dataloader(split, everywhere):
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
