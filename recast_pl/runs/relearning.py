"""Learns a task of a run again, or with more images, as a new version of it."""

from dataclasses import asdict, dataclass
from typing import Literal

from lightning import seed_everything

from recast_pl.errors import RunError
from recast_pl.files import sha256
from recast_pl.learning.patch import SharedState, TaskPatch
from recast_pl.runs.evaluation import restore
from recast_pl.runs.folder import TaskFiles
from recast_pl.runs.images import check_images
from recast_pl.runs.reservation import reserved
from recast_pl.runs.stream import Stream
from recast_pl.runs.versions import NewVersion

Keep = Literal["best", "new", "old"]


@dataclass(frozen=True)
class Request:
    """What a new version of a task shall be.

    Args:
        task: Name of the task.
        keep: The version that becomes the present one: the `best` by accuracy on the validation images (then, by
            cross-entropy), the `new` or the `old` one.
        path: A folder or manifest of images to add to those of the task; None to add none.
        continues: Whether it starts from what the present version has learnt.
        refine: Whether the pieces of a version that continues are trained; if not, the head alone is found.
    """

    task: str
    keep: Keep = "best"
    path: str | None = None
    continues: bool = False
    refine: bool = True


class Relearning(Stream):
    """Makes a new version of one task of a finished stream; arguments are those of `Stream`.

    The method must keep tasks apart. It runs in one process, and reads the images of this task alone.
    """

    _new: NewVersion
    _request: Request

    def learn(self, request: Request) -> tuple[int, int]:
        """Makes the new version, and makes it the present one if it shall be.

        If that is interrupted, the present version stays, and the same request continues it. If the latest version was
        learnt by the same request from the same images, nothing is done.

        Returns:
            The numbers of the new version, or the latest one, and of the present one.

        Raises:
            RunError: If tasks share weights, there is no such task, nothing would be kept, or images have changed
                that are to stay the same.
            PatchError: If the patch of the task is damaged, or belongs to another base or method.
            DataError: If images are missing.
        """
        self._check(request)
        with reserved(self.folder.path):
            named = {"config": sha256((self.config or "").encode()), "seed": self.seed}
            self._new, self._request = NewVersion(self.folder, request.task, asdict(request) | named), request
            if (made := self._made_before()) is not None:
                self._print(f"version {made} was learnt with the same options from the same images; nothing is learnt")
                return made, self._new.present.load_record().get("version", 1)
            if self._new.taken or self._is_to_be_taken():
                self._new.take()
                self._write_all_results()
            self._new.close()
            present = self._new.present.load_record().get("version", 1)
        return self._new.number, present

    def _made_before(self) -> int | None:
        """The number of the latest version, if this one would be the same."""
        record = self._new.latest
        if record is None or self._request.continues:  # which goes on from what is present now
            return None
        index = self._names.index(self._request.task)
        self._select(index)
        return record.get("version") if record.get("images") == self.data.image_record else None

    def _check(self, request: Request) -> None:
        if not self.module.isolated:
            raise RunError(
                f"tasks of {' + '.join(self.module.method)} share weights, so that none can change alone; train them "
                "again, in another --run_dir"
            )
        if not self.trainers.keeps:
            raise RunError("--trainer.fast_dev_run keeps no version; leave it out")
        if request.keep == "best" and not self.evaluator.limit_val_batches:
            raise RunError("without validation images no version is the best; add --keep new, or old")
        self.folder.trained([request.task])

    def _is_to_be_taken(self) -> bool:
        """Trains the new version, unless that was done before, and decides."""
        index, before = self._names.index(self._request.task), self._new.present.load()[0]
        self._prepare(index, before)
        if not self._new.files.patch.exists():
            self.forecast.expect([self._request.task])
            self._train(index)
        if self._request.keep != "best":
            return self._request.keep == "new"
        after, _ = self._new.files.load()
        scores = [self._score(index, patch) for patch in (before, after)]
        self._print(f"validation accuracy before {scores[0][0]:.2f} %, now {scores[1][0]:.2f} %")
        return scores[1] > scores[0]

    def _prepare(self, index: int, before: TaskPatch) -> None:
        """Prepares the images of the task, and builds the module on the base of the run."""
        if self._request.path is not None:
            if self._added.count(self._request.path) > 1:
                raise RunError(f"the images of {self._request.path} are in task {before.task!r} already; name others")
            self.data.prepare([index])
            check_images(self.data, index, self._new.present.load_record(), resuming=False)
            self.data.add_images(self._request.task, self._added)
        self._select(index)
        if self._request.keep == "best" and self.data.classes != before.classes:
            raise RunError(
                f"task {self._request.task!r} had classes {before.classes} and has {self.data.classes} now, so that "
                "accuracies cannot be compared; add --keep new, or old"
            )
        seed_everything(self.data.seed, verbose=False)  # random weights, if configured, must be those of the run
        restore(self.module, self.folder, self.data.image_size)
        self.module.check_patch(before)
        self._new.begin()
        if self.config is not None:
            self.folder.keep_config(self.config.encode(), replace=False)

    def _select(self, index: int) -> None:
        self.data.prepare([index])
        self.data.select(index)

    @property
    def _added(self) -> list[str]:
        added = self._new.present.load_record().get("added", [])
        return added if self._request.path is None else [*added, self._request.path]

    def _score(self, index: int, patch: TaskPatch) -> tuple[float, float]:
        """Accuracy on the validation images in percent, and cross-entropy with a minus sign."""
        self.data.select(index)
        self.module.activate(patch)
        (result,) = self.evaluator.validate(self.module, datamodule=self.data, verbose=False)
        return result["val/accuracy"], -result["val/loss"]

    def _begin_task(self) -> None:
        super()._begin_task()
        if self._request.continues:
            self.module.continue_task(self._new.present.load()[0], self._request.refine)

    def _write(self, index: int, patch: bytes, shared: SharedState | None) -> None:
        self.records[index]["version"], self.records[index]["request"] = self._new.number, self._new.request_sum
        if self._request.continues:  # a state that is loaded again may have other shapes
            before = self._new.present.load_record()["task"]
            self.records[index]["task"]["task_parameters"] = before["task_parameters"]
        if self._added:
            self.records[index]["added"] = self._added
        super()._write(index, patch, shared)

    def _write_all_results(self) -> None:
        """Writes the results of all finished tasks, as their records have them."""
        finished = self.folder.finished()
        self.records = {i: finished[name].load_record() for i, name in enumerate(self._names) if name in finished}
        self._write_results()

    def _files(self, index: int) -> TaskFiles:
        return self._new.files

    def _print(self, text: str) -> None:
        self.console.print(f"{self._request.task}: {text}", soft_wrap=True, markup=False)
