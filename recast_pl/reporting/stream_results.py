"""The results of a stream as files and on the terminal."""

from dataclasses import dataclass

from rich.console import Console

from recast_pl.files import write_atomic
from recast_pl.learning.trainer import TrainerFactory, tensorboard
from recast_pl.reporting.plots import plot_accuracy_matrix, to_png
from recast_pl.reporting.tables import matrix_csv, stream_table, stream_title
from recast_pl.runs.folder import RunFolder, Summary
from recast_pl.runs.metrics import final_accuracies


@dataclass(frozen=True)
class StreamResults:
    """Writes the accuracy matrix as CSV, PNG and TensorBoard figure, and prints the final table.

    Args:
        console: Where the table is printed.
        trainers: Their settings decide whether TensorBoard is used.
    """

    console: Console
    trainers: TrainerFactory

    def write(self, folder: RunFolder, summary: Summary) -> None:
        """Writes `accuracy_matrix.csv` and `.png`, and the measures after the latest task for TensorBoard."""
        matrix, names = summary["accuracy_matrix"], [task["name"] for task in summary["tasks"]]
        write_atomic(folder.matrix_csv, matrix_csv(matrix, names))
        figure = plot_accuracy_matrix(matrix, names, stream_title(summary))
        write_atomic(folder.matrix_png, to_png(figure))
        if self.trainers.settings.get("logger") in (None, True):
            measures = {
                "stream/average_accuracy": summary["average_accuracy"],
                "stream/average_anytime_accuracy": summary["average_anytime_accuracy"],
                "stream/backward_transfer": summary["backward_transfer"],
                "stream/forgetting": summary["forgetting"],
            }
            final = {f"accuracy/{name}": value for name, value in final_accuracies(summary).items()}
            logger = tensorboard(folder.path, "stream")
            logger.log_metrics(measures | final, step=len(names))
            logger.experiment.add_figure("accuracy_matrix", figure, len(names))
            logger.finalize("success")

    def show(self, summary: Summary) -> None:
        """Prints the table of tasks."""
        self.console.print(stream_table(summary))
