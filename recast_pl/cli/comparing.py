"""What `compare` and `sweep` share: the options of `fit` for all runs, and running a comparison."""

import shlex
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from recast_pl.cli import main
from recast_pl.cli.interruption import interruptible
from recast_pl.cli.parser import command_parser
from recast_pl.config.comparing import check_same_run
from recast_pl.config.files import with_config_paths
from recast_pl.config.run import config_text
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder
from recast_pl.studies.comparison import Comparison
from recast_pl.studies.engines import ONE_DEVICE, Endings, Engine, Outcome


class Here(Engine):
    """Runs command lines in this process, one after the other; stops at the first that fails."""

    def run(self, commands: Sequence[Sequence[str]]) -> Endings:
        """Runs the command lines."""
        for index, words in enumerate(commands):
            status = main(words)
            yield index, Outcome(status)
            if status:
                return


def config_words(configs: Sequence[str]) -> list[str]:
    """Returns the options of `fit` that lay configurations over one another.

    Args:
        configs: Their names, in order.
    """
    return [word for config in configs for word in ("--config", config)]


def fit_options(options: str, engine: Engine | None) -> list[str]:
    """Returns the options of `fit` that all runs share.

    Args:
        options: What the user gave, quoted as in a shell.
        engine: Where to run, with one device for each run; None for this process, with the configured devices.
    """
    return [*shlex.split(options), *(ONE_DEVICE if engine else ())]


def run_comparison(comparison: Comparison, engine: Engine | None) -> int:
    """Runs what is not finished, and prints the table.

    Args:
        comparison: The runs.
        engine: Where to run; None for this process.

    Returns:
        The exit status.
    """
    fit = command_parser("fit")
    with interruptible() as interruption:
        status = comparison.run(engine or Here(), lambda words: is_finished(fit, words))
    if interruption.signal is not None:
        return 128 + interruption.signal
    if not status:
        table = f"table: {comparison.folder}/{comparison.FILE}.md"
        Console().print(comparison.table(), table, soft_wrap=True)
    return status


def is_finished(fit: LightningArgumentParser, words: Sequence[str]) -> bool:
    """Returns whether a run has trained all of its tasks.

    Args:
        fit: The parser of `fit`.
        words: The command line of `fit` that would continue the run.

    Raises:
        RunError: If the options are wrong, or the folder holds a run with other options.
    """
    try:
        config = fit.parse_args(with_config_paths(words[1:]))
    except ArgumentError as cause:
        folder = words[words.index("--run_dir") + 1]
        raise RunError(f"fit would refuse the options of {folder}: {cause}") from cause
    run = RunFolder(config.run_dir)
    check_same_run(fit, run.config, config_text(fit, config))
    return run.summary.is_file() and len(run.read_summary()["tasks"]) == len(config.data.tasks)
