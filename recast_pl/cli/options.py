"""Options that several commands share."""

from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from recast_pl.config.run import open_run, read_run
from recast_pl.learning.device import find_device


def declare_device(parser: ArgumentParser) -> None:
    """Adds `--device`, to a command that computes."""
    device = "Where to compute: auto for what this machine has, or cpu, cuda, cuda:1, mps."
    parser.add_argument("--device", type=str, default="auto", help=device)


def declare_trust(parser: ArgumentParser) -> None:
    """Adds `--trust`, to a command that opens a run."""
    trust = "Let the run use code outside of recast_pl, timm, torchvision and torch, such as your own pieces."
    parser.add_argument("--trust", action="store_true", help=trust)


def declare_data_root(parser: ArgumentParser) -> None:
    """Adds `--data_root`, to a command that reads the images of a run."""
    root = "Folder that the images were moved to: data sets by name, and the folders of tasks (default: the run's)."
    parser.add_argument("--data_root", type=str | None, help=root)


def chosen_device(options: Namespace) -> torch.device:
    """The device that the options name; raises RunError if this machine does not have it."""
    return find_device(options.device)


def opened(options: Namespace, templates: bool = False) -> tuple[Path, Namespace]:
    """Opens the run that the options name.

    Args:
        options: `run_dir` and `trust`, and of `device` and `data_root` those that the command has.
        templates: Whether the run may also be a gradient fit of templates.

    Returns:
        What `recast_pl.config.run.read_run` returns.
    """
    read = read_run if templates else open_run
    device = find_device(options.get("device"))
    return read(options.run_dir, device, options.trust, options.get("data_root"))
