"""The command `push`: uploads trained tasks of a run."""

from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.sharing import push
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str, required=True, help="Folder of the run.")
    parser.add_argument("--repo", type=str, required=True, help="OWNER/NAME of the repository, made if it is missing.")
    parser.add_argument(
        "--tasks", type=str, nargs="+", default=[], help="Names of the tasks (default: all that are trained)."
    )
    licence = "Identifier of the licence for the card, such as apache-2.0 (default: none is stated)."
    parser.add_argument("--license", type=str | None, help=licence)
    parser.add_argument("--private", action="store_true", help="Let only the owner see the repository.")
    parser.add_argument("--revision", type=str | None, help="Branch, made if it is missing (default: main).")
    weights = "Upload also the file of pretrained weights that the run names."
    parser.add_argument("--weights", action="store_true", help=weights)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Uploads the tasks."""
    commit = push(
        config.run_dir,
        config.repo,
        config.tasks or None,
        license=config.license,
        private=config.private,
        revision=config.revision,
        weights=config.weights,
    )
    open_console().print(f"pushed: {commit}", soft_wrap=True, markup=False)
    return 0
