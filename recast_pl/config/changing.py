"""What all that changes the tasks of a run shares: their names, and the results made again."""

from recast_pl.config.files import no_run, read_run_config
from recast_pl.errors import RunError
from recast_pl.learning.trainer import TrainerFactory
from recast_pl.reporting.stream_results import StreamResults
from recast_pl.runs.folder import RunFolder
from recast_pl.runs.layout import plain_yaml
from recast_pl.runs.reservation import changing
from recast_pl.runs.results import refresh_results
from recast_pl.terminal import open_console


def task_names(folder: RunFolder) -> list[str]:
    """Names of all tasks of a run, trained or not, in order; raises RunError if the folder holds no run."""
    if not folder.config.is_file():
        raise RunError(f"{no_run(folder)}; give the folder of a run")
    return [task["name"] for task in plain_yaml(folder.config)["data"]["tasks"]]


def refresh(folder: RunFolder) -> None:
    """Makes the results of a run again from the records of its tasks."""
    logger = read_run_config(folder.config)["trainer"].get("logger")
    results = StreamResults(open_console(), TrainerFactory({"logger": logger}))
    with changing(folder.path):
        refresh_results(folder, task_names(folder), results)
