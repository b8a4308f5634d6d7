"""The command `merge`: puts the tasks of copies of a run into it."""

from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.merging import merge
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of the run that takes the tasks.")
    copies = "Folders of copies of the run, which stay as they are."
    parser.add_argument("--copies", type=str, nargs="+", required=True, help=copies)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Copies the tasks that are new, unless tasks of one name differ, and makes the results again."""
    folder = RunFolder(config.run_dir)
    names = ", ".join(merge(folder, [RunFolder(path) for path in config.copies])) or "no task that is new"
    open_console().print(f"{folder.path} has taken {names}", soft_wrap=True, markup=False)
    return 0
