"""The command `data`: data sets by name."""

from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.run import STRICT
from recast_pl.data.catalogue import CATALOGUE, PAPER
from recast_pl.data.datamodule import SequentialTaskDataModule, data_root
from recast_pl.data.sources import source_faults
from recast_pl.data.task_images import BadImagePolicy
from recast_pl.data.tasks import TaskConfig
from recast_pl.reporting.tables import catalogue_table
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the actions of the command."""
    actions = parser.add_subcommands(dest="action")
    for name, text in (
        ("list", "List all data sets, and which of them are on disk."),
        ("prepare", "Download data sets and decode their images (default: the paper's six)."),
        ("verify", "Count and decode every image of data sets (default: those on disk)."),
    ):
        action = ArgumentParser(description=text, **STRICT)
        if name != "list":
            action.add_argument("names", type=str, nargs="*", help="Names that 'list' shows, or torchvision/CLASS.")
        action.add_argument("--root", type=str | None, help="Folder of data sets (default: $RECAST_PL_DATA or data).")
        if name == "prepare":
            action.add_argument("--image_size", type=int, default=224, help="Height and width to decode to, in pixels.")
            action.add_argument("--on_bad_image", type=BadImagePolicy, default="error", help="As --data.on_bad_image.")
        actions.add_subcommand(name, action, help=text)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Lists, prepares or verifies data sets."""
    actions = {"list": _list_data, "prepare": _prepare_data, "verify": _verify_data}
    return actions[config.action](config[config.action])


def _list_data(options: Namespace) -> int:
    open_console().print(catalogue_table(CATALOGUE, data_root(options.root)), crop=False)

    return 0


def _prepare_data(options: Namespace) -> int:
    for name in options.names or PAPER:
        task = TaskConfig("prepared", dataset=name)
        size, on_bad_image = options.image_size, options.on_bad_image
        data = SequentialTaskDataModule((task,), size, root=options.root, on_bad_image=on_bad_image)
        data.prepare_data()
        open_console().print(f"{name}: {len(data.classes)} classes, {data.sizes}, in {data.root}", soft_wrap=True)
    return 0


def _verify_data(options: Namespace) -> int:
    """Returns 1 if a data set differs from what its authors published, or has images that cannot be read."""
    root = data_root(options.root)
    names = options.names or [name for name, row in CATALOGUE.items() if row.is_present(root)]
    status = 0
    for name in names:
        faults = source_faults(name, root)
        status |= bool(faults)
        open_console().print(f"{name}: {'; '.join(faults) or 'intact'}", soft_wrap=True)
    return status
