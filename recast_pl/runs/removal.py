"""Takes tasks out of a run, or gives them other names; the files of all other tasks stay as they are."""

import shutil
from dataclasses import replace

from recast_pl.errors import RunError
from recast_pl.files import sealed_json, sha256, write_atomic
from recast_pl.runs.folder import RunFolder, TaskFiles
from recast_pl.runs.layout import shares_weights


def check_apart(folder: RunFolder, action: str) -> None:
    """Raises RunError if the tasks of a run share weights, so that none of them can be taken out or put in."""
    if shares_weights(folder.path):
        raise RunError(
            f"the tasks of {folder.path} share weights, which each of them has changed; {action} needs a method that "
            "keeps tasks apart"
        )


def remove_files(files: TaskFiles) -> None:
    """Removes everything that a run has of a task: the patch first, after which it no longer counts."""
    paths = (files.plain, files.compact, files.signature, files.record, files.class_row, files.change)
    for path in paths:
        path.unlink(missing_ok=True)
    for path in (files.checkpoints, files.tensorboard):
        shutil.rmtree(path, ignore_errors=True)


def remove_task(folder: RunFolder, files: TaskFiles) -> None:
    """Removes everything that a run has of a task, in all versions."""
    main = TaskFiles(folder.path, files.position, files.task)
    for each in (main, *folder.others(main).values()):
        remove_files(each)


def rename_task(folder: RunFolder, task: str, name: str) -> None:
    """Gives a finished task another name, in all versions; raises RunError while a new version of it is made."""
    main = TaskFiles(folder.path, folder.finished()[task].position, task)
    if main.change.is_file():
        raise RunError(f"a new version of task {task!r} is not complete; repeat the command that makes it, then rename")
    for each in (*folder.others(main).values(), main):
        rename_files(each, TaskFiles(each.run, each.position, name))


def rename_files(old: TaskFiles, new: TaskFiles) -> None:
    """Gives a finished task another name, which its patch, record and signature hold, too; the old files go last.

    Args:
        old: Its files.
        new: Those with its new name, at the same position.
    """
    patch, record = old.load()
    content = replace(patch, task=new.task).to_bytes()
    accuracies = {new.task if name == old.task else name: value for name, value in record["accuracies"].items()}
    record["task"]["name"], record["accuracies"], record["patch"] = new.task, accuracies, sha256(content)
    if old.signature.is_file():
        replace(old.load_signature(), task=new.task).save(new.signature)
    if old.tensorboard.is_dir() and not new.tensorboard.exists():
        old.tensorboard.rename(new.tensorboard)
    write_atomic(new.record, sealed_json(record))
    write_atomic(new.compact if patch.rounded is not None else new.plain, content)
    remove_files(old)
