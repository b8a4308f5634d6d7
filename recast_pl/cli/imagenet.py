"""The command `imagenet`: compares a pretrained classifier before and after decomposition."""

from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.cli.options import chosen_device, declare_device
from recast_pl.decomposition.bank import Decomposition, decompose
from recast_pl.decomposition.targets import BankLayout
from recast_pl.errors import DecompositionError
from recast_pl.files import json_text, write_atomic
from recast_pl.reporting.tables import terminal_table
from recast_pl.runs.folder import RunFolder
from recast_pl.studies.imagenet import compare_classifiers
from recast_pl.terminal import open_console


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file; also found in configs/.")
    parser.add_argument("--backbone", type=BackboneConfig, required=True, help="The pretrained classifier.")
    parser.add_argument("--layout", type=BankLayout | None, help="Weights to decompose in closed form.")
    parser.add_argument("--decomposition", type=str | None, help="Or a decomposition.safetensors.")
    parser.add_argument("--images", type=str, required=True, help="Folder with CLASS/IMAGE or val/CLASS/IMAGE.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images per batch.")
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that decode images; 0 for this one.")
    parser.add_argument("--output", type=str, required=True, help="Folder for imagenet.json.")
    declare_device(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Compares predictions and features, and writes `imagenet.json`."""
    init = parser.instantiate(config)
    if (init.layout is None) == (init.decomposition is None):
        given = "neither" if init.layout is None else "both"
        raise DecompositionError(f"{given} of --layout and --decomposition are given; give exactly one")
    classifier, file = init.backbone.source.classifier(), init.decomposition
    decomposition = decompose(classifier.net, init.layout) if file is None else Decomposition.load(Path(file))
    images, device = Path(init.images), chosen_device(config)
    facts = compare_classifiers(classifier, decomposition, images, init.batch_size, init.num_workers, device)
    path = RunFolder(init.output).imagenet
    write_atomic(path, json_text({"backbone": init.backbone.name, **facts}))
    row = ["" if value is None else f"{value:,.4f}".rstrip("0").rstrip(".") for value in facts.values()]
    open_console().print(terminal_table((list(facts), [row]), 0), f"written: {path}", soft_wrap=True)
    return 0
