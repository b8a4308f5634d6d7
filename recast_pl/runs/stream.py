"""Trains a stream of tasks: one Trainer per task, a run folder that holds every result, and resume."""

import copy
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from lightning import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from rich.console import Console

from recast_pl.compat.lightning import lightning_errors
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.tasks import derive_seed
from recast_pl.errors import RunError
from recast_pl.files import is_whole_checkpoint, json_text, read_json, sealed_json, sha256, write_atomic
from recast_pl.learning.budget import Budget
from recast_pl.learning.patch import BITS, Precision, SharedState, TaskPatch
from recast_pl.learning.quantization import Moments
from recast_pl.learning.til_module import TILModule
from recast_pl.learning.trainer import (
    BestEpoch,
    CoefficientHistograms,
    FiniteLoss,
    LastEpoch,
    SeedEpochs,
    TrainerFactory,
    TrainingTime,
)
from recast_pl.runs.class_results import balanced_accuracy, class_results
from recast_pl.runs.class_rows import ClassEvaluation, ClassRows
from recast_pl.runs.evaluation import measure, probe_accuracies, rounded, validation
from recast_pl.runs.folder import (
    ProbeAccuracies,
    Record,
    RunFolder,
    Summary,
    TaskFiles,
    TaskResult,
    Validation,
    config_name,
)
from recast_pl.runs.forecast import Forecast
from recast_pl.runs.images import check_images
from recast_pl.runs.origin import origin
from recast_pl.runs.pace import Pace
from recast_pl.runs.presentation import Presentation
from recast_pl.runs.reservation import reserved
from recast_pl.runs.results import summarize, write_results
from recast_pl.terminal import open_console


class Stream:
    """Trains the tasks of a datamodule in order, into a run folder.

    A task is finished when its patch exists. All results are made from the records in `tasks/`: at the end, and now
    and then before, so that a task takes the same time however many tasks there are. Finished tasks are kept, and an
    interrupted task continues after its last epoch. If the method keeps tasks apart, several processes may train them,
    in any order. If it does not, `shared/` holds what they share, as the last finished task left it.

    Args:
        module: The method and backbone.
        data: The tasks.
        run_dir: The run folder.
        trainers: Makes a trainer for each task. With `fast_dev_run` it is a trial of which nothing is kept.
        seed: Decides all randomness, together with task, epoch and process.
        config: Content of `config.yaml`, which the command line needs to open the run; None to write none.
        console: Where progress is printed; None for the terminal.
        presentation: Writes and shows tables and pictures; None to write `summary.json` alone.
        precision: How patches are stored; all but `fp32` are compact. Accuracies are those of stored patches.
        class_evaluation: Measures how images are classified among the classes of all tasks; None for not at all.
        budget: What each task may cost; None for no limit.
    """

    def __init__(
        self,
        module: TILModule,
        data: SequentialTaskDataModule,
        run_dir: str | Path,
        trainers: TrainerFactory,
        seed: int = 42,
        config: str | None = None,
        console: Console | None = None,
        presentation: Presentation | None = None,
        precision: Precision = "fp32",
        class_evaluation: ClassEvaluation | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._trial = None if trainers.keeps else TemporaryDirectory()  # removed with this object
        self.folder = RunFolder(run_dir if self._trial is None else self._trial.name)
        self.module, self.data, self.trainers, self.seed = module, data, trainers, seed
        self.config, self.console, self.presentation = config, console or open_console(), presentation
        self.precision, self.evaluator = precision, trainers.for_evaluation()
        self.forecast = Forecast(data, self.console, budget or Budget(), precision)
        self.patches: dict[int, TaskPatch] = {}
        self.records: dict[int, Record] = {}
        self._names = [task.name for task in data.tasks]
        self._task_files = self.folder.files_of(self._names)
        self.class_rows = ClassRows(self._task_files, class_evaluation)
        self._started = time.monotonic()
        self._configs: list[str] = []  # names of the configurations that the current task was trained with
        self._stored_as: Precision = precision  # the current task
        data.limit_training(None if budget is None else budget.images)

    def run(self, only: Sequence[str] = ()) -> Summary:
        """Trains all tasks that are not finished.

        Args:
            only: Names of the tasks to train, when other processes train the others; empty for all.

        Returns:
            The content of `summary.json`. With `only` it covers these tasks and is not written; `merge` writes it.

        Raises:
            RunError: If there is no such task, tasks cannot be trained apart, a finished run has another `config`, or
                another process is training them all.
        """
        if only:
            for name in self.begin(only):
                self._train(self._names.index(name))
            return self._conclude(write=False)
        with reserved(self.folder.path) if self.evaluator.is_global_zero else nullcontext():
            return self._run_all()

    def _run_all(self) -> Summary:
        pace, names = Pace(), self.begin()
        try:
            self.class_rows.extend(self.module, self.data, self.records, self.evaluator)
            for name in names:
                self._train(self._names.index(name))
                self.class_rows.extend(self.module, self.data, self.records, self.evaluator)
                pace.run(self._write_results)
        except BaseException:
            if self.records:
                self._write_results()
            raise
        return self._conclude(write=True)

    def begin(self, only: Sequence[str] = ()) -> list[str]:
        """Prepares the images, builds the module, writes the base of the run, and reads the finished tasks.

        Arguments and errors are those of `run`.

        Returns:
            Names of the tasks that are left to train, in order.
        """
        unknown = [name for name in only if name not in self._names]
        if unknown:
            raise RunError(f"--only {unknown[0]!r} is not a task of this run; choose from {', '.join(self._names)}")
        if only:
            self.check_isolated("--only")
        self.class_rows.check(self.module)
        wanted = [index for index, name in enumerate(self._names) if name in only or not only]
        if not only and self._is_finished_otherwise():
            raise RunError(
                f"all tasks of {self.folder.path} were trained with other options, and none is left for these; resume "
                "without options to see the results, or name another --run_dir"
            )
        # a finished task that is kept apart from others needs no image any more
        needed = [index for index in wanted if not (self.module.isolated and self._files(index).patch.exists())]
        self.data.prepare(needed)
        self._build(beside_others=bool(only))
        if only:
            self._check_base()
        self._read_finished(wanted)
        waiting = [self._names[index] for index in wanted if index not in self.records]
        self.forecast.expect(waiting)
        return waiting

    def gather(self) -> None:
        """Makes the results of all finished tasks from their records, whichever process trained them."""
        files = enumerate(self._task_files)
        self.records = {index: each.load_record() for index, each in files if each.patch.exists()}
        if self.records:
            self._conclude(write=True)

    def check_isolated(self, option: str) -> None:
        """Raises RunError, naming the option that trains tasks apart, if a piece shares weights between tasks."""
        sharing = [type(piece).__name__ for piece in self.module.pieces if not piece.isolated]
        if sharing:
            raise RunError(
                f"{option} trains tasks apart from one another, but they share what {sharing[0]} trains; "
                f"train them in order, without {option}"
            )

    def _is_finished_otherwise(self) -> bool:
        """Whether all tasks are trained, and the run has another configuration than this stream."""
        if self.config is None or not self.folder.config.exists():
            return False
        other = self.folder.config.read_bytes() != self.config.encode()
        return other and all(self._files(index).patch.exists() for index in range(len(self._names)))

    def _build(self, beside_others: bool) -> None:
        """Builds the module on the base in the run folder; writes the base and the config if they are missing.

        Machines of other kinds solve the same decomposition to other bits, and a patch fits only the bits that it was
        trained on. So if other processes may be doing the same now (`beside_others`), all take the base of the first.
        """
        unbuilt = copy.deepcopy(self.module) if beside_others else self.module
        self._build_on_base()
        if not self.evaluator.is_global_zero:
            return
        if self.config is not None:
            self.folder.record_start()
            self.folder.keep_config(self.config.encode(), replace=not beside_others)
        if not beside_others:
            self._save_base(self.folder.path)
        elif not self.folder.add_files(self._save_base):
            self.module = unbuilt
            self._build_on_base()
        for piece in self.module.pieces:
            for part in piece.describe():
                self.console.print(part)

    def _build_on_base(self) -> None:
        for piece in self.module.pieces:
            piece.load_base(self.folder.path)
        seed_everything(self.seed, verbose=False)  # random weights, if configured, must be the same in every session
        self.module.build(self.data.image_size)

    def _check_base(self) -> None:
        """Raises PatchError if the finished tasks of the run belong to another base or method."""
        finished = next((files for files in self._task_files if files.patch.exists()), None)
        if finished is not None:
            self.module.check_patch(TaskPatch.load(finished.patch))

    def _save_base(self, folder: Path) -> None:
        for piece in self.module.pieces:
            piece.save_base(folder)

    def _read_finished(self, indices: Iterable[int]) -> None:
        """Reads the files of finished tasks, and checks that they fit the module."""
        files = {index: self._files(index) for index in indices}
        finished = [index for index in files if files[index].patch.exists()]
        if not self.module.isolated:  # a task counts only if all before it are finished
            finished = [index for place, index in enumerate(finished) if index == place]
            if finished:
                self.module.load_shared_state(SharedState.load(files[finished[-1]].shared))
        self.patches, self.records = {}, {}
        for index in finished:
            patch, self.records[index] = files[index].load()
            if not self.module.isolated or self.data.is_there(index):
                check_images(self.data, index, self.records[index], resuming=True)
            self.module.activate(patch)
            self._keep(index, patch)

    def _keep(self, index: int, patch: TaskPatch) -> None:
        """Keeps a patch only if later tasks change what it predicts, so that it is measured again after each."""
        if not self.module.isolated:
            self.patches[index] = patch

    def _train(self, index: int) -> None:
        """Trains one task, from its checkpoint if there is one."""
        self.data.select(index)
        name, files = self.data.task_name, self._files(index)
        if self.evaluator.is_global_zero:
            position = f"task {index + 1} of {len(self._names)}"
            self.console.print(f"{position}: {name}, {len(self.data.classes)} classes, {self.data.sizes}")
        seed_everything(derive_seed(self.seed, name), verbose=False)
        self._begin_task()
        checkpoint, timer = self._checkpoint(files), TrainingTime()
        self._note_config(files, checkpoint)
        best = BestEpoch()
        keeping = [best, timer, self.forecast.watch(name), LastEpoch(files.checkpoints)]
        watching = [FiniteLoss(name), LearningRateMonitor(), CoefficientHistograms(), SeedEpochs(self.seed, name)]
        trainer = self.trainers.for_training(files.run, files.name, [*keeping, *watching])
        with lightning_errors():
            trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        kept = best.score if trainer.global_step else self.module.probes.start
        self._finish(index, trainer.current_epoch, timer.seconds, validation(kept))

    def _begin_task(self) -> None:
        self.module.begin_task(self.data.task_name, self.data.classes)

    def _checkpoint(self, files: TaskFiles) -> Path | None:
        """The checkpoint to resume from; None to train from the start, which ends with the same bytes."""
        last = files.checkpoints / "last.ckpt"
        if last.exists() and not is_whole_checkpoint(last):
            self.console.print(
                f"{last} is damaged; the task is trained again from its start", soft_wrap=True, markup=False
            )
            return None
        return last if last.exists() else None

    def _note_config(self, files: TaskFiles, checkpoint: Path | None) -> None:
        """Notes the configuration beside the checkpoint, after those that the task was trained with before."""
        if self.config is None:
            return
        resumed = checkpoint is not None and files.configs.exists()
        self._configs = read_json(files.configs, RunError, configs=list)["configs"] if resumed else []
        if config_name(self.config.encode()) not in self._configs[-1:]:
            self._configs.append(config_name(self.config.encode()))
        if self.evaluator.is_global_zero:
            write_atomic(files.configs, json_text({"configs": self._configs}).encode())

    def _finish(self, index: int, epochs: int, seconds: float, validated: Validation) -> None:
        """Measures the task, and those before it if they may have changed; then writes its files."""
        probes, trained = probe_accuracies(self.module.probes), self.module.task_parameters
        patch = self._stored(self.module.patch(probes))
        seen = {i: p for i, p in self.patches.items() if i < index} | {index: patch}
        accuracies = {p.task: measure(self.module, self.data, i, p, self.evaluator) for i, p in seen.items()}
        patch = replace(patch, metrics={"accuracy": accuracies[patch.task], **probes})
        classes = class_results(patch.classes, self.module.test_pairs.numpy())  # of this task, which was tested last
        self.data.select(index)
        self.module.sign_confidence()
        content, sizes = patch.to_bytes(), self.data.sizes
        result = TaskResult(
            name=patch.task,
            classes=len(patch.classes),
            accuracy=accuracies[patch.task],
            balanced_accuracy=rounded(balanced_accuracy(classes)),
            **cast(ProbeAccuracies, probes),
            **validated,
            task_parameters=trained,
            head_parameters=sum(tensor.numel() for tensor in patch.head.values()),
            patch_bytes=len(content),
            train_images=sizes["train"],
            test_images=sizes["test"],
            split=self.data.split_digest,
            epochs=epochs,
            seconds=round(seconds, 2),
        )
        shared = None if self.module.isolated else self.module.shared_state()
        self._keep(index, patch)
        self.records[index] = Record(
            task=result,
            accuracies=accuracies,
            classes=classes,
            patch=sha256(content),
            shared_bytes=0 if shared is None else shared.nbytes,
            wall_seconds=round(time.monotonic() - self._started, 2),
            images=self.data.image_record,
            origin=origin(self.evaluator.strategy.root_device),
            cost=self.forecast.record(self._stored_as),
        )
        if self.config is not None:
            self.records[index]["configs"] = self._configs
        self._started = time.monotonic()
        if self.evaluator.is_global_zero:
            self._write(index, content, shared)

    def _stored(self, patch: TaskPatch) -> TaskPatch:
        """A trained task with the values that its file will keep, those of the first process on all."""
        self._stored_as = self.forecast.precision(patch)
        bits = BITS.get(self._stored_as)
        if bits is None:
            return patch
        self.module.check_patch(patch)
        self.module.activate(patch.compacted(bits))  # so that features are those of the stored states
        (train,) = self.module.features("train")
        return self.evaluator.strategy.broadcast(patch.compacted(bits, Moments.of(train.features)))

    def _write(self, index: int, patch: bytes, shared: SharedState | None) -> None:
        """Writes a finished task: the patch, which marks it finished, after all else; then removes what it replaces."""
        files = self._files(index)
        if shared is not None:
            shared.save(files.shared)
        if self.presentation:
            self.presentation.write_task(RunFolder(files.run), files.name, self.records[index])
        if self.module.signature is not None:
            self.module.signature.save(files.signature)
        write_atomic(files.record, sealed_json(self.records[index]))
        write_atomic(files.compact if self._stored_as in BITS else files.plain, patch)
        for before in set(files.shared.parent.glob(f"*{files.shared.suffix}")) - {files.shared}:
            before.unlink()
        shutil.rmtree(files.checkpoints, ignore_errors=True)

    def _conclude(self, write: bool) -> Summary:
        if write:
            self.class_rows.extend(self.module, self.data, self.records, self.evaluator)
        summary = self._summary()
        if write:
            self._write_results(summary)
        if self.presentation and self.evaluator.is_global_zero:
            self.presentation.show(summary)
        return summary

    def _write_results(self, summary: Summary | None = None) -> None:
        """Writes the results of all finished tasks, unless the folder has them; None to sum them up."""
        if self.evaluator.is_global_zero:
            write_results(self.folder, summary or self._summary(), self.presentation)

    def _summary(self) -> Summary:
        return summarize(
            [record for _, record in sorted(self.records.items())],
            method=" + ".join(self.module.method),
            backbone=self.module.backbone_config.name,
            seed=self.seed,
            unlearnt=[name for index, name in enumerate(self._names) if index not in self.records],
            classes=self.class_rows.summary(len(self.records)),
        )

    def _files(self, index: int) -> TaskFiles:
        return self._task_files[index]
