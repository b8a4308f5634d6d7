"""The command `analyze`: measures and plots a decomposition."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning import seed_everything
from rich.console import Console
from torch import Tensor

from recast_pl.backbones.backbone import BackboneConfig
from recast_pl.cli.options import chosen_device, declare_data_root, declare_device, declare_trust, opened
from recast_pl.config.paths import check_images
from recast_pl.config.run import til
from recast_pl.data.datamodule import SequentialTaskDataModule
from recast_pl.data.images import FileDataset, find_images
from recast_pl.decomposition.analysis import Analysis, analyze, displacements
from recast_pl.decomposition.bank import Decomposition
from recast_pl.decomposition.mimicry import MimicryModule
from recast_pl.decomposition.similarity import feature_similarity, weight_similarity
from recast_pl.errors import DataError, RunError
from recast_pl.files import json_text, write_atomic
from recast_pl.methods.templates import load_decompositions
from recast_pl.reporting.analysis_plots import analysis_figures
from recast_pl.reporting.analysis_tables import analysis_sheets
from recast_pl.reporting.plots import write_figure
from recast_pl.rules import ImageSize
from recast_pl.runs.evaluation import sample_images, trained_coefficients
from recast_pl.runs.folder import RunFolder
from recast_pl.terminal import open_console

_IMAGES = 16  # test images of the first task, if none are given

_IMAGE_SIZE = 224  # of --backbone, in pixels

_BATCH = 4  # images per batch; small, because the features of all layers are in memory at once


@dataclass(frozen=True)
class _Subject:
    """A decomposition to analyse, with the network, tasks and coefficients of its run as far as there are any."""

    decomposition: Decomposition
    output: Path
    backbone: BackboneConfig | None
    image_size: ImageSize
    seed: int = 42
    data: SequentialTaskDataModule | None = None
    coefficients: dict[str, Tensor] = field(default_factory=dict)


def declare(parser: ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--run_dir", type=str | None, help="Folder of a run of tasks or of MimicryModule.")
    parser.add_argument("--decomposition", type=str | None, help="Or a decomposition.safetensors.")
    backbone = "Backbone of the file, to compare weights and features."
    parser.add_argument("--backbone", type=BackboneConfig | None, help=backbone)
    size = f"Image size for --backbone, in pixels (default: {_IMAGE_SIZE})."
    parser.add_argument("--image_size", type=int | None, help=size)
    images = f"Images or folders of images to compare features on (default: {_IMAGES} test images of the first task)."
    parser.add_argument("--images", type=str, nargs="+", default=[], help=images)
    output = "Folder for the results (default: analysis/ in DIR or beside FILE)."
    parser.add_argument("--output", type=str | None, help=output)
    declare_data_root(parser)
    declare_device(parser)
    declare_trust(parser)


def run(parser: ArgumentParser, config: Namespace) -> int:
    """Prints tables, and writes `analysis.json`, `analysis.md` and figures."""
    config, device = parser.instantiate(config), chosen_device(config)
    paths = find_images([Path(image) for image in config.images])
    subject = _of_file(config) if config.run_dir is None else _of_run(config)
    if paths and subject.backbone is None:
        raise RunError("--images compares features, which needs the network; give its --backbone")
    console = open_console()
    images = _images(subject, paths, console)
    analysis = _analyze(subject, images, device)
    sheets = analysis_sheets(analysis)
    console.print(*(sheet.printed() for sheet in sheets), crop=False)
    write_atomic(subject.output / "analysis.md", "\n".join(sheet.markdown() for sheet in sheets))
    for name, figure in analysis_figures(analysis).items():
        write_figure(figure, subject.output / name)
    write_atomic(subject.output / RunFolder.ANALYSIS, json_text(analysis.content()))
    console.print(f"analysis: {subject.output}", soft_wrap=True)
    return 0


def _of_file(config: Namespace) -> _Subject:
    if config.decomposition is None:
        raise RunError("there is nothing to analyse; give --run_dir or --decomposition")
    if config.image_size is not None and config.backbone is None:
        raise RunError("--image_size is the input size of a backbone; give --backbone, or leave it out")
    path = Path(config.decomposition)
    output = Path(config.output or path.parent / "analysis")
    image_size = _IMAGE_SIZE if config.image_size is None else config.image_size
    return _Subject(Decomposition.load(path), output, config.backbone, image_size)


def _of_run(config: Namespace) -> _Subject:
    for option in ("decomposition", "backbone", "image_size"):
        if config[option] is not None:
            raise RunError(f"--{option} does not work with --run_dir, which has its own; leave out one of them")
    run_dir, init = opened(config, templates=True)
    folder, model, data, seed = RunFolder(run_dir), init.model, init.data, init.seed_everything
    if not folder.decomposition.is_file():
        raise RunError(f"{run_dir} holds no decomposition; give a run with a Recast piece, or one of MimicryModule")
    decomposition, output = load_decompositions(run_dir), Path(config.output or folder.analysis)
    if isinstance(model, MimicryModule):
        return _Subject(decomposition, output, model.backbone, model.image_size, seed)
    backbone, coefficients = til(model).backbone_config, trained_coefficients(til(model), folder)
    return _Subject(decomposition, output, backbone, data.image_size, seed, data, coefficients)


def _images(subject: _Subject, paths: Sequence[Path], console: Console) -> Tensor | None:
    """Returns images (N, 3, S, S) to compare features on, or None."""
    if paths:
        files = FileDataset(paths, subject.image_size)
        return torch.stack([files[index][0] for index in range(len(files))])
    if subject.data is None:
        return None
    subject.data.tasks = subject.data.tasks[:1]  # the only task whose images are needed
    try:
        check_images(subject.data)
        return sample_images(subject.data, _IMAGES)
    except DataError as error:  # the user did not ask for features, so the rest is still worth showing
        console.print(f"features are not compared, because there are no images: {error}", soft_wrap=True)
        return None


def _analyze(subject: _Subject, images: Tensor | None, device: torch.device) -> Analysis:
    decomposition = subject.decomposition
    moved = {task: displacements(decomposition, trained) for task, trained in subject.coefficients.items()}
    analysis = replace(analyze(decomposition), displacements=moved)
    if subject.backbone is None:
        return analysis
    seed_everything(subject.seed, verbose=False)  # if the run started from random weights, this makes the same ones
    backbone = subject.backbone.build(subject.image_size)
    analysis = replace(analysis, targets=weight_similarity(decomposition, backbone.net))
    if images is None:
        return analysis
    features = feature_similarity(decomposition, backbone.to(device), images.to(device).split(_BATCH))
    return replace(analysis, features=features)
