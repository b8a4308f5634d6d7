"""The command `list`: the tasks of a run. It imports nothing heavy, so that it answers at once."""

import argparse

from recast_pl.errors import RunError
from recast_pl.runs.listing import TaskLine, list_tasks


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are the project's own."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise RunError(f"{message}; list takes --run_dir DIR")


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of a run.")


def run(parser: argparse.ArgumentParser, config: argparse.Namespace) -> int:
    """Prints a line for each task, with its present version, the bytes of its patch and the date."""
    rows = [("task", "version", "classes", "accuracy %", "bytes", "learnt"), *map(_row, list_tasks(config.run_dir))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, date in rows:
        print(name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=False)), date, sep="  ")
    return 0


def main(words: list[str], description: str) -> int:
    """Runs the command without the parser of the other commands, which takes seconds to import."""
    parser = _Parser("recast_pl list", description=description, allow_abbrev=False)
    declare(parser)
    return run(parser, parser.parse_args(words))


def _row(line: TaskLine) -> tuple[str, ...]:
    if line.date is None:
        return line.task, "", "", "", "", "not learnt yet"
    accuracy = "" if line.accuracy is None else f"{line.accuracy:.2f}"
    return line.task, f"{line.version or ''}", f"{line.classes or ''}", accuracy, f"{line.bytes:,}", line.date
