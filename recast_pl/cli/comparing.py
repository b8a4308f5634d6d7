"""What `compare` and `sweep` share: from their options to the command lines of `fit`, and from these to a table."""

import shlex
from collections.abc import Sequence

from jsonargparse import ArgumentError
from rich.console import Console

from recast_pl.cli.interruption import interruptible
from recast_pl.cli.parser import command_parser
from recast_pl.config.run_config import check_same_run, config_text, with_config_paths
from recast_pl.errors import RunError
from recast_pl.runs.folder import RunFolder
from recast_pl.studies.comparison import Comparison
from recast_pl.studies.engines import ONE_DEVICE, Engine, Here


def config_words(configs: Sequence[str]) -> list[str]:
    """Words of `fit` for configurations that are laid over one another.

    Args:
        configs: Their names, in order.
    """
    return [word for config in configs for word in ("--config", config)]


def fit_options(options: str, engine: Engine | None) -> list[str]:
    """Words of `fit` for all runs.

    Args:
        options: What the user gave, quoted as in a shell.
        engine: Where the runs are made, each on one device; None for here, on what the configurations ask for.
    """
    return [*shlex.split(options), *(ONE_DEVICE if engine else ())]


def run_comparison(comparison: Comparison, engine: Engine | None) -> int:
    """Learns what is not learnt yet, and prints the table.

    Args:
        comparison: What is learnt.
        engine: Where; None for here.

    Returns:
        The exit status.
    """
    with interruptible() as interruption:
        status = comparison.run(engine or Here(), is_finished)
    if interruption.signal is not None:
        return 128 + interruption.signal
    if not status:
        table = f"table: {comparison.folder}/{comparison.FILE}.md"
        Console().print(comparison.table(), table, soft_wrap=True)
    return status


def is_finished(words: Sequence[str]) -> bool:
    """Whether a run has learnt all its tasks.

    Args:
        words: The command line of `fit` that would go on with it.

    Raises:
        RunError: If the command line cannot be understood, or the run in its folder is another.
    """
    try:
        config = command_parser("fit").parse_args(with_config_paths(words)).fit
    except ArgumentError as cause:
        raise RunError(f"fit would refuse the options of {_run_dir(words)}: {cause}") from cause
    folder = RunFolder(config.run_dir)
    check_same_run(folder.config, config_text(config))
    return folder.summary.is_file() and len(folder.read_summary()["tasks"]) == len(config.data.tasks)


def _run_dir(words: Sequence[str]) -> str:
    return words[words.index("--run_dir") + 1]
