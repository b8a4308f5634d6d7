"""What `compare`, `sweep` and `reproduce` share: two options, and running comparisons and fits."""

import shlex
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from recast_pl.cli import main
from recast_pl.cli.interruption import interruptible
from recast_pl.cli.parser import command_parser
from recast_pl.config.comparing import check_same_run
from recast_pl.config.elements import parse_options
from recast_pl.config.run import config_text
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder
from recast_pl.studies.engines import ONE_DEVICE, Endings, Engine, Outcome, Study
from recast_pl.terminal import open_console

DEFAULT_SEEDS = (42, 1998, 3142592)

_RESERVED = ("--run_dir", "--resume", "--seed_everything")  # options of `fit` that a comparison sets for each run


class Here(Engine):
    """Runs command lines in this process, one after the other; stops at the first that fails."""

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        for index, words in enumerate(commands):
            status = main(words)
            yield index, Outcome(status)
            if status:
                return


def declare_fit_options(parser: ArgumentParser) -> None:
    """Adds `--options` and `--engine`."""
    parser.add_argument("--options", type=str, default="", help="Further options of fit, quoted as one word.")
    parser.add_argument("--engine", type=Engine | None, help="Where to train the runs, each on one device.")


def fit_options(options: str, engine: Engine | None) -> list[str]:
    """Returns the options of `fit` that all runs share.

    Args:
        options: The user's, quoted as in a shell.
        engine: Where to run, with one device for each run; None for this process, with the configured devices.

    Raises:
        RunError: If the quotes are wrong, or an option is one that is set for each run.
    """
    try:
        words = shlex.split(options)
    except ValueError as cause:
        raise RunError(f"--options {options!r} cannot be split into words ({cause}); correct the quotes") from cause
    one_device = ONE_DEVICE if engine else ()
    for word in words:
        name = word.partition("=")[0]
        if name in (*_RESERVED, *one_device[:1]):
            raise RunError(f"--options cannot set {name}, which is set for each run; leave it out")
    return [*words, *one_device]


def run_studies(studies: Sequence[Study], engine: Engine | None) -> int:
    """Trains the runs that are not finished, prints the tables, and returns the exit status.

    Args:
        studies: What to run, one after the other, until one fails.
        engine: Where to run; None for this process.
    """
    fit = command_parser("fit")

    def is_finished(words: Sequence[str]) -> bool:
        return _is_finished(fit, words)

    with interruptible() as interruption:
        for study in studies[1:]:  # so that mistakes in the later ones show before the first one starts
            for words in study.units().values():
                is_finished(words)
        for study in studies:
            status = study.run(engine or Here(), is_finished)
            if study.has_results:
                files = ", ".join(map(str, sorted(study.folder.glob(f"{study.FILE}*.md"))))
                open_console().print(study.table(), f"table: {files}", soft_wrap=True)
            if status:
                return status
    return 0 if interruption.signal is None else 128 + interruption.signal


def _is_finished(fit: LightningArgumentParser, words: Sequence[str]) -> bool:
    """Returns whether the run of a command line of `fit` is finished; refuses what `fit` would refuse."""
    try:
        config = parse_options(fit, words[1:])
    except ArgumentError as cause:
        folder = words[words.index("--run_dir") + 1]
        raise RunError(f"fit would refuse the options of {folder}: {cause}") from cause
    run = RunFolder(config.run_dir)
    check_same_run(fit, run.config, config_text(fit, config))
    if run.summary.is_file():
        return len(run.read_summary()["tasks"]) == len(config.data.tasks)
    return run.mimicry.is_file()  # a fit of templates writes it last
