"""The command `pull`: downloads trained tasks."""

from jsonargparse import ArgumentParser, Namespace

from recast_pl.cli.options import declare_trust
from recast_pl.config.sharing import pull
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--repo", type=str, required=True, help="OWNER/NAME of the repository.")
    parser.add_argument("--run_dir", type=str, required=True, help="A new folder, or a run on the same base.")
    parser.add_argument("--tasks", type=str, nargs="+", default=[], help="Names of the tasks (default: all).")
    parser.add_argument("--revision", type=str | None, help="Branch, tag or commit (default: main).")
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Downloads the tasks."""
    new = pull(config.repo, config.run_dir, config.tasks or None, revision=config.revision, trust=config.trust)
    names = ", ".join(new) or "no task that is new"
    open_console().print(f"{config.run_dir} has taken {names}", soft_wrap=True, markup=False)
    return 0
