"""The results of a stream as files and on the terminal."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from rich.console import Console

from recast_pl.files import write_atomic
from recast_pl.learning.trainer import TrainerFactory, tensorboard
from recast_pl.reporting.hyperparameters import hyperparameters
from recast_pl.reporting.plots import plot_accuracy_matrix, plot_confusions, to_png
from recast_pl.reporting.tables import MOST_TASKS, classes_markdown, matrix_csv, stream_table, stream_title
from recast_pl.runs.class_results import confusion_matrix
from recast_pl.runs.folder import Record, RunFolder, Summary
from recast_pl.runs.metrics import final_accuracies


@dataclass(frozen=True)
class StreamResults:
    """Writes the accuracy matrix as CSV, PNG and TensorBoard figure, and prints the final table.

    Args:
        console: Where the table is printed.
        trainers: Their settings decide whether TensorBoard is used.
        most: How many tasks the table shows, the last ones.
    """

    console: Console
    trainers: TrainerFactory
    most: int = MOST_TASKS

    def write_task(self, folder: RunFolder, name: str, record: Record) -> None:
        """Writes the results by class for TensorBoard, and the confusion matrix if all confusions are known."""
        if self._uses_tensorboard and "classes" in record:
            classes, task = record["classes"], record["task"]["name"]
            logger, matrix = tensorboard(folder.path, name), confusion_matrix(classes)
            logger.experiment.add_text("classes", classes_markdown(classes), record["task"]["epochs"])
            if matrix is not None:
                figure = plot_confusions(matrix, classes["names"], f"Test images of {task}")
                logger.experiment.add_figure("confusion_matrix", figure, record["task"]["epochs"])
            logger.finalize("success")

    def write(self, folder: RunFolder, summary: Summary) -> None:
        """Writes `accuracy_matrix.csv` and `.png`, and the measures after the latest task for TensorBoard."""
        matrix, names = summary["accuracy_matrix"], [task["name"] for task in summary["tasks"]]
        write_atomic(folder.matrix_csv, matrix_csv(matrix, names))
        png = to_png(plot_accuracy_matrix(matrix, names, stream_title(summary)))
        write_atomic(folder.matrix_png, png)
        if self._uses_tensorboard:
            measures = {
                "stream/average_accuracy": summary["average_accuracy"],
                "stream/average_anytime_accuracy": summary["average_anytime_accuracy"],
                "stream/backward_transfer": summary["backward_transfer"],
                "stream/forgetting": summary["forgetting"],
            }
            logger, step = tensorboard(folder.path, "stream"), len(names)
            # into the folder of the other measures, so that the table and the curves show one run
            logger.experiment.add_hparams(hyperparameters(folder, summary), measures, run_name=".", global_step=step)
            logger.log_metrics({f"accuracy/{name}": value for name, value in final_accuracies(summary).items()}, step)
            by_measure = summary.get("class_accuracies", {}).items()
            logger.log_metrics({f"classes/{name}": values[-1] for name, values in by_measure}, step)
            pixels = np.asarray(Image.open(io.BytesIO(png)))
            logger.experiment.add_image("accuracy_matrix", pixels, step, dataformats="HWC")
            logger.finalize("success")

    def show(self, summary: Summary) -> None:
        """Prints the table of tasks."""
        self.console.print(stream_table(summary, self.most), crop=False)

    @property
    def _uses_tensorboard(self) -> bool:
        return self.trainers.settings.get("logger") in (None, True)
