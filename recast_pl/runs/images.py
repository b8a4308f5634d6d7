"""Whether the tasks of a run still have the images that they were trained on."""

from lightning.pytorch.utilities import rank_zero_warn

from recast_pl.data.changes import find_changes
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.errors import RunError
from recast_pl.runs.folder import Record


def check_images(data: SequentialTaskDataModule, index: int, record: Record, resuming: bool) -> None:
    """Compares the images of a task with those that it was trained on.

    Older records show only whether the split is the same, which also an older version of the program may have made.
    Then the task can be evaluated, with a warning, but its run cannot be resumed.

    Args:
        data: The stream.
        index: Position of the task in the stream, from 0.
        record: The task's record.
        resuming: Whether the run is to be continued.

    Raises:
        RunError: If images have changed.
    """
    data.select(index)
    name = record["task"]["name"]
    if "images" in record:
        changes = find_changes(record["images"], data.image_record)
        if changes:
            raise RunError(
                f"the images of task {name!r} have changed since it was trained: {changes}; restore them, or train "
                "in another --run_dir"
            )
    elif record["task"]["split"] != data.split_digest:
        fault = f"task {name!r} was trained on another split of its images, by an earlier version or of other images"
        if resuming:
            raise RunError(
                f"{fault}; restore the images, use the version that began the run, or train in another --run_dir"
            )
        rank_zero_warn(f"{fault}; some of its test images may have been used for training")
