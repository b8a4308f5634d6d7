"""A run folder: where each file of a run lies, and how its trained tasks are read."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from recast_pl.data.changes import SplitImages
from recast_pl.errors import PatchError, RunError
from recast_pl.files import json_text, read_json, read_sealed_json, sha256, write_atomic, write_once
from recast_pl.learning.patch import TaskPatch
from recast_pl.learning.signature import Signature
from recast_pl.runs.class_results import ClassResults
from recast_pl.runs.forecast import Cost
from recast_pl.runs.layout import PATCH_SUFFIXES, RECEIVED, parse_yaml, patch_files, positions, task_file_name
from recast_pl.runs.origin import Origin


class ProbeAccuracies(TypedDict):
    """Test accuracies in percent of heads on the features that a task starts from.

    `probe_accuracy` is that of converged logistic regression. `sgd_probe_accuracy` is that of a head trained with the
    optimizer and epochs of the task, which is there if the task has an `sgd` head. Before heads could be solved,
    `probe_accuracy` was the latter.
    """

    probe_accuracy: float
    sgd_probe_accuracy: NotRequired[float]


class Validation(TypedDict, total=False):
    """Accuracy in percent and cross-entropy on the validation images, of what is kept.

    The best epoch was chosen by them. Both are missing where validation was turned off, and in older runs.
    """

    validation_accuracy: float
    validation_loss: float


class TaskResult(ProbeAccuracies, Validation):
    """What a run reports about one trained task; accuracies are in percent.

    `balanced_accuracy` is the mean over classes of the share of test images that are recognised; older runs lack it.
    """

    name: str
    classes: int
    accuracy: float
    balanced_accuracy: NotRequired[float]
    task_parameters: int
    head_parameters: int
    patch_bytes: int
    train_images: int
    test_images: int
    split: str
    epochs: int
    seconds: float


class Record(TypedDict):
    """The content of `tasks/NN_TASK.json`, in which older runs lack some entries.

    It holds the result, the test accuracies just after training of this task and of those that it has changed, the
    results by class, the patch's digest, the images that the task was trained on, by split, when, where and with which
    versions the task was trained, and what it has cost. `configs` names the configurations that it was trained with,
    in order; more than one if it was resumed with other options. `version` is missing in the first version of a task;
    `request` is a checksum of all that was asked of a later one.
    `added` names the folders and manifests of images that were added to those of the configuration.
    """

    task: TaskResult
    accuracies: dict[str, float]
    classes: NotRequired[ClassResults]
    patch: str
    shared_bytes: int
    wall_seconds: float
    images: NotRequired[dict[str, SplitImages]]
    origin: NotRequired[Origin]
    cost: NotRequired[Cost]
    configs: NotRequired[list[str]]
    version: NotRequired[int]
    request: NotRequired[str]
    added: NotRequired[list[str]]


class ClassSummary(TypedDict, total=False):
    """What a run reports with `evaluation: class`; accuracies are in percent, averages over tasks.

    `oracle_accuracy` is that of images whose task is known, `routed_accuracy` of those whose task is found by the
    router and whose class by the head of that task, and `joint_accuracy` by the router alone, which compares the
    classes of all tasks. `class_accuracies` lists these measures after each task, by name.
    """

    oracle_accuracy: float
    routed_accuracy: float
    joint_accuracy: float
    class_accuracies: dict[str, list[float]]


class Summary(ClassSummary):
    """The content of `summary.json`, in which older runs lack some entries; row i of the matrix is after task i."""

    method: str
    backbone: str
    seed: int
    tasks: list[TaskResult]
    unlearnt: NotRequired[list[str]]
    accuracy_matrix: list[list[float | None]]
    average_accuracy: float
    average_anytime_accuracy: float
    backward_transfer: float
    forgetting: float
    shared_bytes: NotRequired[int]
    wall_seconds: float


class _PathOf:
    """A path of `TaskFiles`, in a folder of the run. It is made when it is asked for: a run may have 1,000 tasks."""

    def __init__(self, folder: str, ending: str = "") -> None:
        self._folder, self._ending = folder, ending

    def __get__(self, files: "TaskFiles", owner: type) -> Path:
        return files.run.joinpath(self._folder, f"{files.name}{self._ending}")  # half the time of two divisions


class TaskFiles:
    """The files of one task of a run, whether or not they exist.

    The task is finished when `patch` exists, which is `plain` or, in a run with compact patches, `compact`. `shared`
    holds what all tasks share, as it was after this one, and is absent if the method keeps tasks apart. `signature` is
    absent if it does not, and in older runs. `checkpoints` is a folder that exists while the task is trained; `configs`
    in it names the configurations so far. `class_row` is there only with `evaluation: class`, and `change` while a new
    version is made, see `recast_pl.runs.versions`.

    Args:
        run: The run folder, or the folder in it that holds other versions.
        position: Position of the task in the stream, from 0.
        task: Its name.
    """

    __slots__ = ("position", "run", "task")
    plain, compact = (_PathOf("patches", suffix) for suffix in PATCH_SUFFIXES)
    record = _PathOf("tasks", ".json")
    signature = _PathOf("signatures", ".safetensors")
    shared = _PathOf("shared", ".safetensors")
    class_row = _PathOf("class_evaluation", ".json")
    checkpoints = _PathOf("checkpoints")
    configs = _PathOf("checkpoints", "/configs.json")
    change = _PathOf("versions", ".json")
    tensorboard = _PathOf("tensorboard")

    def __init__(self, run: Path, position: int, task: str) -> None:
        self.run, self.position, self.task = run, position, task

    @property
    def name(self) -> str:
        """What all its files are called, without the ending."""
        return task_file_name(self.position, self.task)

    @property
    def patch(self) -> Path:
        """The patch; where there is none, the name of one that is not compact."""
        return self.compact if self.compact.exists() else self.plain

    def load_record(self) -> Record:
        """Reads the record; raises RunError if it is missing or damaged, or belongs to another task."""
        record = cast(Record, read_sealed_json(self.record, RunError))
        if record["task"]["name"] != self.task:
            raise RunError(f"{self.record} is the record of task {record['task']['name']!r}; restore the original one")
        return record

    def load(self) -> tuple[TaskPatch, Record]:
        """Reads the patch and the record.

        Raises:
            PatchError: If the patch is missing or damaged, or is not the one that the record describes.
            RunError: If the record is missing or damaged.
        """
        patch, record = TaskPatch.load(self.patch), self.load_record()
        if patch.task != self.task or record["patch"] != sha256(self.patch.read_bytes()):
            raise PatchError(
                f"{self.patch} is not the patch that tasks/{self.record.name} describes; restore the original patch"
            )
        return patch, record

    def load_signature(self) -> Signature:
        """Reads the signature of the task; raises RunError if there is none, and PatchError if it is damaged."""
        if not self.signature.is_file():
            raise RunError(f"task {self.task!r} has no signature; make it with 'patch sign --run_dir {self.run}'")
        return Signature.load(self.signature)


class RunFolder:
    """The folder of a run; no other code knows the names of its files.

    `decomposition.safetensors` is written by the method's pieces, and `tensorboard/` by the trainer. Tasks are found
    by their patches, in the order of the stream, and each patch is read only when it is asked for.

    Args:
        path: The folder; it need not exist.
    """

    CONFIG, SUMMARY, LOCK = "config.yaml", "summary.json", ".lock"
    TASKS_LOCK = ".tasks.lock"  # it stays: if it were removed, two processes could each hold a file of this name
    MIMICRY, IMAGENET, ANALYSIS, ROBUSTNESS = "mimicry.json", "imagenet.json", "analysis.json", "robustness.json"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / self.CONFIG
        self.start = self.path / "start.json"
        self.summary = self.path / self.SUMMARY
        self.matrix_csv = self.path / "accuracy_matrix.csv"
        self.matrix_png = self.path / "accuracy_matrix.png"
        self.decomposition = self.path / "decomposition.safetensors"
        self.mimicry = self.path / self.MIMICRY
        self.imagenet = self.path / self.IMAGENET
        self.analysis = self.path / "analysis"
        self.export = self.path / "export"

    @classmethod
    def find(cls, folder: Path) -> list["RunFolder"]:
        """All runs in a folder, at any depth, in order of path."""
        return [cls(path) for path in sorted({p.parent for n in (cls.SUMMARY, cls.CONFIG) for p in folder.rglob(n)})]

    def check_unused(self) -> None:
        """Raises RunError if the folder has content, which a new run would overwrite."""
        if self.config.is_file() and not self.is_begun:
            raise RunError(
                f"run folder {self.path} holds a run that has trained nothing yet; delete the folder to start again "
                "with these options, add --resume true to continue with its own, or name another --run_dir"
            )
        if self.path.exists() and any(path.name != self.LOCK for path in self.path.iterdir()):
            raise RunError(
                f"run folder {self.path} exists; add --resume true to continue its tasks, or name another --run_dir"
            )

    def record_start(self) -> None:
        """Writes the working folder, to which paths in `config.yaml` are relative, unless it was written before."""
        if not self.start.exists():
            here, run = Path.cwd(), self.path.resolve()
            from_run = os.path.relpath(here, run) if here.drive == run.drive else str(here)
            facts = {"folder": str(here), "from_run": from_run}
            write_once(self.start, json_text(facts).encode())

    def start_folders(self) -> list[Path]:
        """The folder that the run was started in: where it is relative to the run folder, and where it was then.

        The first is right if run and images were moved together, the second if the run alone was moved. Runs of older
        versions have none.
        """
        if not self.start.is_file():
            return []
        facts = read_json(self.start, RunError, folder=str, from_run=str)
        return [Path(os.path.normpath(self.path.resolve() / facts["from_run"])), Path(facts["folder"])]

    def model_folders(self) -> list[Path]:
        """Where the files of the model are looked for: as `start_folders`, and in the run folder itself."""
        return [*self.start_folders(), self.path]

    def add_files(self, write: Callable[[Path], None]) -> bool:
        """Adds files to the run safely beside other processes that add files of the same names.

        Args:
            write: Writes the files into a folder.

        Returns:
            Whether the run has just these files now; False if another process has written others before.
        """
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            same = [write_once(self.path / file.name, file.read_bytes()) for file in Path(scratch).iterdir()]
        return all(same)

    def keep_config(self, content: bytes, replace: bool) -> None:
        """Keeps a configuration that tasks are trained with, for as long as a record may name it.

        It is `config.yaml` if there is none yet, or to `replace` it. Any other is in `config.NAME.yaml`, unless it
        differs in the list of tasks alone.
        """
        if not self.config.exists():
            write_once(self.config, content)
        before = self.config.read_bytes()
        if config_name(before) != config_name(content):
            other = before if replace else content
            write_once(self.config.with_suffix(f".{config_name(other)}.yaml"), other)
        if replace and before != content:
            write_atomic(self.config, content)

    def read_summary(self) -> Summary:
        """Reads `summary.json`; raises RunError if it is missing or damaged."""
        entries = {"seed": int, "tasks": list, "accuracy_matrix": list, "method": str, "backbone": str}
        return cast(Summary, read_json(self.summary, RunError, **entries))

    def files(self, position: int, task: str) -> TaskFiles:
        """The files of the present version of the task at a position of the stream, from 0."""
        files = TaskFiles(self.path, position, task)
        if not files.change.is_file():
            return files
        change = read_json(files.change, RunError, version=int, taken=bool)
        return self.version(change["version"], files) if change["taken"] else files

    def version(self, number: int, files: TaskFiles) -> TaskFiles:
        """The files of a version of a task while it is not the present one, in the folder `versions/NUMBER`."""
        return TaskFiles(self.path / "versions" / str(number), files.position, files.task)

    def others(self, files: TaskFiles) -> dict[int, TaskFiles]:
        """The files of the versions of a task that lie in `versions/NUMBER`, by number."""
        numbers = [int(path.name) for path in (self.path / "versions").glob("*") if path.name.isdecimal()]
        found = {number: self.version(number, files) for number in sorted(numbers)}
        return {number: other for number, other in found.items() if other.patch.exists()}

    def versions(self, present: TaskFiles) -> dict[int, TaskFiles]:
        """The files of all versions of a finished task, by number, from those of its present one."""
        main = TaskFiles(self.path, present.position, present.task)
        making = read_json(main.change, RunError, version=int)["version"] if main.change.is_file() else None
        others = {number: files for number, files in self.others(main).items() if number != making}
        return dict(sorted({**others, present.load_record().get("version", 1): present}.items()))

    def files_of(self, tasks: Sequence[str]) -> list[TaskFiles]:
        """The files of each task of a stream, trained or not; see `recast_pl.runs.layout.positions`."""
        return [self.files(position, task) for position, task in zip(positions(self.path, tasks), tasks, strict=True)]

    @property
    def is_trained(self) -> bool:
        """Whether at least one task is finished."""
        return bool(patch_files(self.path))

    @property
    def is_begun(self) -> bool:
        """Whether anything is trained: a task, the first epochs of one, or templates."""
        return self.is_trained or self.mimicry.is_file() or any((self.path / "checkpoints").rglob("*.ckpt"))

    def finished(self) -> dict[str, TaskFiles]:
        """The files of all finished tasks by name, in the order of the stream.

        Raises:
            RunError: If no task is finished, or a patch has no position in its name.
        """
        if not (found := {task: self.files(position, task) for position, task, _ in patch_files(self.path)}):
            raise RunError(f"{self.path} holds no trained task; give the folder of a run made by 'fit'")
        return found

    @property
    def received(self) -> "RunFolder":
        """The folder of tasks that a server has received: their patches and signatures, without records."""
        return RunFolder(self.path / RECEIVED)

    def finished_names(self) -> list[str]:
        """Names of the finished tasks, in the order of the stream; none if no task is finished."""
        return [task for _, task, _ in patch_files(self.path)]

    def load_patches(self, tasks: Iterable[str] | None = None) -> dict[str, TaskPatch]:
        """Reads the patches of finished tasks, by name.

        Args:
            tasks: Names of the tasks; None for all, in the order of the stream.

        Raises:
            RunError: If a task, or every task, is not finished.
            PatchError: If a patch is damaged.
        """
        return {files.task: files.load()[0] for files in self.trained(tasks)}

    def trained(self, tasks: Iterable[str] | None = None, at: Mapping[str, int] | None = None) -> list[TaskFiles]:
        """The files of finished tasks.

        Args:
            tasks: Names of the tasks; None for all, in the order of the stream.
            at: The version of each of these tasks; those that it does not name are in their present one.

        Raises:
            RunError: If a task, or every task, is not finished, or has no such version.
        """
        finished, at = self.finished(), at or {}
        wanted = list(finished if tasks is None else tasks)
        unknown = [task for task in (*wanted, *at) if task not in finished]
        if unknown:
            raise RunError(f"task {unknown[0]!r} is not trained in {self.path}; trained are {', '.join(finished)}")
        return [self._at(finished[task], at[task]) if task in at else finished[task] for task in wanted]

    def _at(self, present: TaskFiles, number: int) -> TaskFiles:
        if number not in (versions := self.versions(present)):
            raise RunError(f"task {present.task!r} has no version {number} in {self.path}; it has {list(versions)}")
        return versions[number]


def config_name(content: bytes) -> str:
    """The name of a configuration in records: the first digits of a checksum of all but its list of tasks.

    So the name stays when tasks are added to a run.
    """
    settings = parse_yaml(content)
    if isinstance(settings, dict) and isinstance(settings.get("data"), dict):
        settings["data"].pop("tasks", None)
    return sha256(json_text(settings).encode())[:12]
